"""A data set of arrays that a user's code returns or a file holds."""

from __future__ import annotations

import re
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any

import numpy as np

from pfedgpa_app.core.settings import DataError, listed, near, shown
from pfedgpa_app.data.dataset import (
    SPLITS,
    Dataset,
    channels_last,
    least_classes,
    no_names,
    split_off_test,
)

KEYS = ("x_train", "y_train", "x_test", "y_test")
USERS = ("users_train", "users_test")
MORE = ("classes", "columns", *USERS)
ALONE = ("x", "y", "users")  # the names in use without a test split
# other names for the same arrays: MedMNIST's files
ALSO = {"train_images": "x_train", "train_labels": "y_train"}
ALSO |= {"test_images": "x_test", "test_labels": "y_test"}
UNUSED = "val_"  # arrays whose names begin so are left out
_MISSING = ("NAType", "NaTType")  # what pandas has for a missing value or date, besides NaN


def dataset_of(name: str, found: Any, test_share: float) -> Dataset:
    """Make a data set of what a user's code returns or a file holds.

    Args:
        found: {"x_train": …, "y_train": …, "x_test": …, "y_test": …}, arrays or tensors, optionally
            with "classes", "columns" (a table's column names; a pandas frame brings its own),
            "users_train" and "users_test"; or a tuple of the first four, optionally followed by the
            classes; or one or two torch Datasets. Without a test split the names may be "x", "y"
            and "users", and some training examples become the test split. Entries called "val_…"
            are left out.
        test_share: the share of the training examples that become the test split where there is
            none. With 0 there are no test examples, and one class is enough, as for a network that
            is already trained.

    Raises:
        DataError: the text says what is wrong with it, and what to do.
    """
    try:
        return _dataset_of(name, found, test_share)
    except DataError as error:
        raise DataError(_in_their_names(str(error), found)) from error


def _in_their_names(text: str, found: Any) -> str:
    """Return a message with the names that the user's own dict has for its arrays."""
    given = {*map(str, found)} if isinstance(found, Mapping) else set()
    theirs = {own: also for also, own in ALSO.items() if also in given}
    if given.intersection(ALONE):
        theirs |= {f"{key}_train": key for key in ALONE if f"{key}_train" not in given}
    return re.sub(r"\b(x|y|users)_(train|test)\b", lambda m: theirs.get(m[0], m[0]), text)


def _dataset_of(name: str, found: Any, test_share: float) -> Dataset:
    parts = _by_name(name, found)
    arrays = {key: _array(name, key, parts[key]) for key in KEYS if key in parts}
    users = {key: _users(name, key, parts[key]) for key in USERS if key in parts}
    for split in SPLITS:
        if f"x_{split}" in arrays:
            _check_lengths(name, split, arrays, users)
            _check_rows(name, split, parts)
    labels, classes = _labels(name, arrays, parts.get("classes"), least_classes(test_share))
    columns = _columns(name, parts, arrays["x_train"].shape[1:] or (1,))
    given = [key for key in KEYS[::2] if key in arrays]
    inputs = {key[2:]: _inputs(name, key, arrays[key], columns) for key in given}
    owners = {split: users.get(f"users_{split}", no_names()) for split in SPLITS}
    samples = {s: np.char.add(f"{s}/", np.arange(len(y)).astype(str)) for s, y in labels.items()}
    if "test" not in inputs:
        everyone = [inputs["train"], labels["train"], owners["train"]]
        rows = split_off_test(name, labels["train"], classes, test_share, owners["train"])
        for split, mine in zip(SPLITS, rows, strict=True):
            parted = [part[mine] if len(part) else part for part in everyone]
            inputs[split], labels[split], owners[split] = parted
            samples[split] = mine.astype(str)
    train, test = (inputs[split] for split in SPLITS)
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"dataset {name}: x_train holds {train.dtype} of shape {list(train.shape[1:])}, x_test "
            f"{test.dtype} of {list(test.shape[1:])}: both must be alike"
        )
    found_of = {"images": inputs, "labels": labels, "samples": samples, "users": owners}
    of_splits = {f"{s}_{what}": of[s] for what, of in found_of.items() for s in SPLITS}
    unused = tuple(key for key in parts if key.startswith(UNUSED))
    own_test = "x_test" in arrays
    return Dataset(name, classes, **of_splits, columns=columns, own_test=own_test, unused=unused)


def _by_name(name: str, found: Any) -> dict[str, Any]:
    """Return the parts of ``found`` by name, such as "x_train", whatever form they come in."""
    several = found if isinstance(found, (tuple, list)) else [found]
    if several and all(map(_is_torch_dataset, several)):
        if len(several) > 2:
            raise DataError(f"dataset {name}: is {len(several)} torch Datasets: give one, or two")
        splits = [_of_torch(name, *each) for each in zip(SPLITS, several, strict=False)]
        lists = [list(map(str, part["classes"])) for part in splits if "classes" in part]
        if any(each != lists[0] for each in lists):
            raise DataError(
                f"dataset {name}: its torch Datasets have different classes: {listed(lists[0])} "
                f"to train on, {listed(lists[1])} to test on; give both the same list"
            )
        return {key: value for part in splits for key, value in part.items()}
    if isinstance(found, (tuple, list)):
        if len(found) not in (2, 4, 5):
            raise DataError(
                f"dataset {name}: is a {type(found).__name__} of {len(found)}, but must be "
                "(x_train, y_train, x_test, y_test), optionally with the classes, or (x, y)"
            )
        return dict(zip((*KEYS, "classes"), found, strict=False))
    if not isinstance(found, Mapping):
        frame = hasattr(found, "columns")
        how = '; of a frame, give {"x": frame[COLUMNS], "y": frame[LABEL]}' if frame else ""
        raise DataError(
            f"dataset {name}: is a {type(found).__name__}, but must be a dict of "
            f"{', '.join(KEYS)}, a tuple of these, or one or two torch Datasets{how}"
        )
    parts = {ALSO.get(str(key), str(key)): value for key, value in found.items()}
    parts |= {f"{k}_train": parts.pop(k) for k in ALONE if k in parts}
    known = (*KEYS, *MORE, *ALONE)
    odd = [key for key in parts if key not in known and not key.startswith(UNUSED)]
    if odd:
        raise DataError(
            f"dataset {name}: unknown name {odd[0]!r}{near(odd[0], known)} Known are "
            f"{', '.join(known)}"
        )
    for key in KEYS[:2] if "x_test" not in parts and "y_test" not in parts else KEYS:
        if key not in parts:
            raise DataError(f"dataset {name}: has no {key}")
    return parts


def _is_torch_dataset(value: Any) -> bool:
    data = sys.modules.get("torch.utils.data")  # None: nobody can have made one
    return data is not None and isinstance(value, data.Dataset)


def _of_torch(name: str, split: str, data: Any) -> dict[str, Any]:
    """Return the parts of one split from a torch Dataset of (example, label) pairs.

    Raises:
        DataError: it has no length, an item is no such pair, or examples differ in shape.
    """
    where = f"dataset {name}: the torch Dataset to {'train on' if split == 'train' else 'test on'}"
    if not hasattr(data, "__len__"):
        raise DataError(f"{where} has no length: it needs __len__ and __getitem__")
    inputs, labels = [], []
    for i in range(len(data)):
        item = data[i]
        if not isinstance(item, (tuple, list)) or len(item) != 2:
            raise DataError(f"{where} has {shown(item)} as item {i}: it must be (example, label)")
        inputs.append(_example(name, f"{where}: item {i}", f"x_{split}", item[0]))
        labels.append(item[1])
    for i, array in enumerate(inputs):
        if array.shape != inputs[0].shape:
            raise DataError(
                f"{where} has examples of shape {list(inputs[0].shape)}, but item {i} is of "
                f"{list(array.shape)}: all must be alike"
            )
    parts = {f"x_{split}": np.array(inputs), f"y_{split}": np.array(labels)}
    return parts | ({"classes": data.classes} if getattr(data, "classes", None) else {})


def _example(name: str, where: str, key: str, value: Any) -> np.ndarray:
    """Return an item's example as an array; a Pillow picture as [C, H, W] uint8, grey or RGB."""
    if not hasattr(value, "getbands"):
        return _array(name, key, value)
    from pfedgpa_app.data.pictures import eight_bits, pixels_of

    try:
        return pixels_of(eight_bits(value))
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error


def _array(name: str, key: str, value: Any) -> np.ndarray:
    """Return ``value``, which may be a tensor or a pandas frame, as an array.

    Raises:
        DataError: it is not made of numbers, or of text without gaps, in rows of equal length.
    """
    try:
        if hasattr(value, "detach"):
            value = _of_tensor(value.detach().cpu())
        array = _decoded(np.asarray(value))
        if array.dtype == object and _is_of_numbers(value):  # of several types, or some missing
            array = value.to_numpy(dtype=float, na_value=np.nan)
    except (ValueError, TypeError, RuntimeError) as error:  # torch's own are of all three kinds
        why = _uneven(key, value) or f"is not an array: {error}"
        raise DataError(f"dataset {name}: {key} {why}") from error
    if not key.startswith("x") and array.ndim == 2 and array.shape[1] == 1:
        value = array = array[:, 0]  # a frame of one column
    if array.ndim == 1 and array.dtype.kind in "UO":
        texts = [isinstance(each, (str, bytes)) for each in value]
        if any(texts) and not all(texts):  # NumPy would make missing text a class "nan"
            row = texts.index(False)
            raise DataError(f"dataset {name}: {key} has text, but row {row} has none: fill it in")
        array = array.astype(str) if all(texts) else array  # pandas keeps text as objects
    if array.dtype == object or not array.ndim:
        kind = "objects" if array.ndim else "one value"
        what = f"holds {kind}, not numbers in rows of equal length{_in_columns(value)}"
        raise DataError(f"dataset {name}: {key} {_uneven(key, value) or what}")
    return array


def _uneven(key: str, examples: Any) -> str:
    """Say which of the ``examples``, lists or arrays, differ in length or shape; "" if none do."""
    rows = list(examples) if key.startswith("x") and isinstance(examples, Iterable) else []
    if not all(
        isinstance(row, (Sequence, np.ndarray)) and not isinstance(row, str) for row in rows
    ):
        return ""
    shapes = [row.shape if isinstance(row, np.ndarray) else (len(row),) for row in rows]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            first, other = (s[0] if len(s) == 1 else list(s) for s in (shapes[0], shape))
            what = "shape" if isinstance(first, list) else "length"
            return (
                f"has examples that differ in {what}, as row 0 with {first} and row {number} with "
                f"{other}: pad them to one"
            )
    return ""


def _decoded(array: np.ndarray) -> np.ndarray:
    """Return an array of bytes, as HDF5 keeps text, as one of text; any other as it is."""
    if array.dtype.kind == "S":
        return np.char.decode(array, "utf-8")
    if array.dtype == object and array.ndim == 1:
        texts = [each.decode() if isinstance(each, bytes) else each for each in array]
        array = array.copy()
        array[:] = texts
    return array


def _users(name: str, key: str, value: Any) -> np.ndarray:
    """Return each example's user as text: of names, bytes, numbers or dates.

    Raises:
        DataError: they are not one for each example, or one is missing.
    """
    if hasattr(value, "detach"):
        value = _of_tensor(value.detach().cpu())
    try:
        array = np.asarray(value)
        dates = array.dtype.kind == "M"  # as objects, those of nanoseconds would be numbers
        array = np.asarray(array.astype("M8[us]") if dates else value, dtype=object)
    except ValueError as error:
        raise DataError(f"dataset {name}: {key} is not an array: {error}") from error
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]  # a frame of one column
    if array.ndim != 1:
        raise DataError(
            f"dataset {name}: {key} is of shape {list(array.shape)}: give one user for each example"
        )
    return np.array([_user(name, key, row, each) for row, each in enumerate(array)], dtype=str)


def _user(name: str, key: str, row: int, user: Any) -> str:
    if isinstance(user, bytes):
        return user.decode("utf-8", "backslashreplace")
    if not isinstance(user, Hashable):
        raise DataError(f"dataset {name}: {key} has {shown(user)} in row {row}: name one user")
    if isinstance(user, (float, np.floating)):
        if user.is_integer():
            return str(int(user))  # tables turn whole numbers into such
        if np.isnan(user):
            user = None
    if isinstance(user, date) and type(user).__name__ not in _MISSING:
        return user.isoformat().removesuffix("T00:00:00")
    if user is None or type(user).__name__ in _MISSING:
        raise DataError(f"dataset {name}: {key} names no user in row {row}: fill it in")
    return str(user)


def _of_tensor(tensor: Any) -> np.ndarray:
    """Return a tensor as an array; as float32 if NumPy does not have its type, as bfloat16."""
    try:
        return np.asarray(tensor.numpy())
    except TypeError:
        return np.asarray(tensor.float().numpy())


def _columns(name: str, parts: Mapping[str, Any], shape: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of a table's columns: those given, or those of a pandas frame.

    Raises:
        DataError: they are not a different name for each column, or x_test's differ from x_train's.
    """
    of = {key: _named(parts[key]) for key in KEYS[::2] if key in parts}
    train, test = of["x_train"], of.get("x_test", ())
    if train and test and train != test:
        raise DataError(
            f"dataset {name}: x_train has the columns {listed(train)}, and x_test "
            f"{listed(test)}: they must be the same, in the same order"
        )
    if "columns" not in parts:
        return train
    columns = tuple(map(str, np.asarray(parts["columns"]).ravel()))
    if (len(columns),) != shape or len(set(columns)) < len(columns):
        raise DataError(
            f"dataset {name}: names {len(columns)} columns, but an example is of shape "
            f"{list(shape)}: give each column of a table a different name"
        )
    return columns


def _named(frame: Any) -> tuple[str, ...]:
    """Return the column names of a pandas ``frame`` if they are all different texts, else ()."""
    columns = tuple(getattr(frame, "columns", ()))
    named = len(set(columns)) == len(columns) and all(isinstance(each, str) for each in columns)
    return columns if named else ()


def _is_of_numbers(frame: Any) -> bool:
    """Whether ``frame`` is a pandas frame whose columns are all numbers or booleans."""
    return hasattr(frame, "columns") and all(
        getattr(dtype, "kind", "O") in "biuf" for dtype in frame.dtypes
    )


def _in_columns(frame: Any) -> str:
    """Say which columns of a pandas ``frame`` hold no numbers; "" for anything else."""
    if not hasattr(frame, "columns"):
        return ""
    others = [
        _other_than_numbers(str(column), values)
        for column, values in frame.items()
        if values.dtype.kind not in "biuf"
    ]
    return f", in {listed(others)}: encode these as numbers" if others else ""


def _other_than_numbers(column: str, values: Iterable[Any]) -> str:
    """Return a column's name with the first of its values that is no number."""
    for row, value in enumerate(values):
        if not isinstance(value, (int, float)):
            return f"{column} (row {row} has {shown(value)})"
    return column


def _check_lengths(
    name: str, split: str, arrays: Mapping[str, np.ndarray], users: Mapping[str, np.ndarray]
) -> None:
    rows = len(arrays[f"x_{split}"])
    others = {f"y_{split}": arrays[f"y_{split}"]}
    others |= {key: users[key] for key in users if key == f"users_{split}"}
    for key, array in others.items():
        if len(array) != rows:
            raise DataError(
                f"dataset {name}: x_{split} has {rows} examples, but {key} has {len(array)}"
            )
    if not rows:
        raise DataError(f"dataset {name}: x_{split} is empty")


def _check_rows(name: str, split: str, parts: Mapping[str, Any]) -> None:
    """Refuse pandas frames and series of one split that have different row indices.

    Rows are taken as they lie, but pandas would align them by index.
    """
    keys = [f"{kind}_{split}" for kind in ("x", "y", "users")]
    indexed = [key for key in keys if hasattr(parts.get(key), "iloc")]
    for key in indexed[1:]:
        if not parts[key].index.equals(parts[indexed[0]].index):
            raise DataError(
                f"dataset {name}: {indexed[0]} and {key} have different row indices: align them; "
                "if their rows belong together as they lie, give both as .to_numpy()"
            )


def _labels(
    name: str, arrays: Mapping[str, np.ndarray], classes: Any, least: int
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Return each split's labels as class indices, and the classes' names.

    Args:
        classes: their names in order; None: they are found in the labels.
        least: how many classes there must be.
    """
    given = {}
    for split in SPLITS:
        if f"y_{split}" in arrays:
            given[split] = _one_each(name, f"y_{split}", arrays[f"y_{split}"])
    kinds = {s: "text" if y.dtype.kind == "U" else "numbers" for s, y in given.items()}
    if len(set(kinds.values())) > 1:
        raise DataError(
            f"dataset {name}: y_train holds {kinds['train']}, but y_test {kinds['test']}: "
            "labels must be alike in both"
        )
    if classes is None:
        known = np.unique(np.concatenate(list(given.values())))  # some may be in the test only
        names = tuple(str(each) for each in known)
    else:
        values = np.asarray(classes).ravel()
        names = tuple(str(each) for each in values)
        known = np.array(names) if given["train"].dtype.kind == "U" else np.arange(len(names))
        if values.dtype.kind in "iu" and all(np.isin(y, values).all() for y in given.values()):
            known = values.astype(np.int64)  # such labels are names, too
    if len(names) < least or len(set(names)) < len(names):
        raise DataError(f"dataset {name}: must have {least} or more classes, of different names")
    indices = {}
    for split, labels in given.items():
        if unknown := sorted(set(labels.tolist()) - set(known.tolist())):
            raise DataError(
                f"dataset {name}: y_{split} has the label {unknown[0]!r}, which is not one of the "
                f"{len(names)} classes ({listed(names)})"
            )
        order = np.argsort(known, kind="stable")
        indices[split] = order[np.searchsorted(known[order], labels)].astype(np.int64)
    return indices, names


def _one_each(name: str, key: str, labels: np.ndarray) -> np.ndarray:
    """Return one label per example: names, or whole numbers, even if given as floats."""
    if labels.ndim != 1 or labels.dtype.kind not in "iubUf":
        is_one_hot = key.startswith("y") and labels.ndim == 2
        rows = f"; {key}.argmax(1) makes one label of each row" if is_one_hot else ""
        raise DataError(
            f"dataset {name}: {key} holds {labels.dtype} of shape {list(labels.shape)}: "
            f"give one whole number or name for each example{rows}"
        )
    if labels.dtype.kind == "f":
        odd = np.flatnonzero(~np.isfinite(labels) | (labels % 1 != 0))
        if len(odd):
            raise DataError(
                f"dataset {name}: {key} has {labels[odd[0]]:g} in row {odd[0]}: give a whole "
                "number or a name"
            )
        labels = labels.astype(np.int64)
    return labels


def _inputs(name: str, key: str, array: np.ndarray, columns: Sequence[str]) -> np.ndarray:
    """Return examples as networks take them: pixels [N, C, H, W] uint8, float32 or int64.

    Args:
        columns: a table's column names, for error messages; empty if unknown.
    """
    if array.ndim < 2:
        array = array[:, None]
    if array.dtype == np.uint8 and array.ndim in (3, 4):
        if array.ndim == 3:
            array = array[:, None]
        elif channels_last(array.shape[1:]):
            array = array.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(array)
    if array.dtype.kind == "f":
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            row, *place = np.argwhere(~np.isfinite(array))[0].tolist()
            column = f", column {columns[place[0]] if columns else place[0]}"
            raise DataError(
                f"dataset {name}: {key} has a number that is not finite, the first in row "
                f"{row}{column if len(place) == 1 else ''}: fill it in, or leave the row out"
            )
        return np.ascontiguousarray(array)
    if array.dtype.kind in "iub":
        return np.ascontiguousarray(array.astype(np.int64))
    kind, how = str(array.dtype), ""
    if array.dtype.kind == "U":
        kind = f"text, as {shown(str(array.flat[0]))}"
        how = ": make token ids of texts, padded to one length, and numbers of categories"
    raise DataError(f"dataset {name}: {key} holds {kind}, but must hold numbers{how}")
