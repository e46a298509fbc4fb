"""Data sets of the Hugging Face Hub, or of a folder as it has them: ``hf:NAME?label=COLUMN&…``."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np

from pfedgpa_app.core.settings import ConfigError, DataError, near
from pfedgpa_app.data import HUGGING_FACE
from pfedgpa_app.data.arrays import dataset_of
from pfedgpa_app.data.dataset import Dataset
from pfedgpa_app.data.pictures import decoded

LABELS = ("label", "labels", "fine_label", "target", "y")  # if no single column has classes
NUMBERS = ("int", "uint", "float", "bool", "decimal")  # beginnings of their types' names
_SAVED = ("state.json", "dataset_dict.json")  # in the folders that save_to_disk makes
CHOICES = ("subset", "input", "label", "user", "train", "test")


def parsed(name: str) -> tuple[str, dict[str, str]]:
    """Split ``hf:PLACE?subset=…&label=…`` into the data set's place and the choices made.

    Raises:
        ConfigError: there is no such choice, or one split is to be both training and test split.
    """
    place, _, query = name.partition("?")
    chosen = dict(parse_qsl(query, keep_blank_values=True))
    for key in chosen:
        if key not in CHOICES:
            raise ConfigError(f"dataset = {name!r}: has no option {key!r}{near(key, CHOICES)}")
    if chosen.get("test") == chosen.get("train", "train"):
        raise ConfigError(
            f"dataset = {name!r}: would train on the split that it is tested on: name another "
            "test=…, or leave it out"
        )
    return place.removeprefix(HUGGING_FACE), chosen


def read(name: str, root: Path, size: int, test_share: float, download: bool) -> Dataset:
    """Load the data set called ``name``, from the Hub's cache or from a folder below ``root``.

    Args:
        size: the side of the squares that images are resized to; 0: they stay as they are.
        test_share: the share of the examples that are tested on where there is no test split.
        download: whether the Hub may be asked.

    Raises:
        DataError: it is not there, or lacks a column.
    """
    place, chosen = parsed(name)
    splits = _splits(name, root / place, place, chosen, download)
    used = {"train": chosen.get("train", "train"), "test": chosen.get("test", "test")}
    if used["train"] == used["test"]:  # the split called "test" is trained on
        del used["test"]
    train = splits[used["train"]]
    label = chosen.get("label") or _label_of(name, train)
    source = chosen.get("input") or _image_of(train)
    user = chosen.get("user")
    inputs = [source] if source else _numbers_of(train, {label, user})
    found: dict[str, Any] = {"columns": inputs} if len(inputs) > 1 else {}
    for ours, theirs in used.items():
        split = splits.get(theirs)
        if split is None:
            continue
        for column in (label, *inputs, *filter(None, [user])):
            if column not in split.column_names:
                raise DataError(
                    f"dataset {name}: has no column {column}{near(column, split.column_names)}"
                )
        found[f"x_{ours}"] = _inputs(name, split, inputs, size, train)
        found[f"y_{ours}"] = _recoded(np.asarray(split[label]), split, label, train)
        _check_named(name, found[f"y_{ours}"], split, label, train)
        if user:
            found[f"users_{ours}"] = _named(split, user)
    if names := _names(train, label):
        found["classes"] = names
    unused = tuple(each for each in splits if each not in used.values())
    return replace(dataset_of(name, found, test_share), unused=unused)


def _splits(
    name: str, folder: Path, place: str, chosen: dict[str, str], download: bool
) -> dict[str, Any]:
    """Load the data set: {split: its rows}.

    Raises:
        DataError: the library is not installed, or it finds no such data set, subset or split.
    """
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"dataset {name}: needs pip install 'pfedgpa-app[hf]': {error}") from error
    datasets.disable_progress_bars()
    here = str(folder) if folder.is_dir() else place
    is_saved = any((folder / file).is_file() for file in _SAVED)
    if is_saved and "subset" in chosen:
        raise DataError(f"dataset {name}: what save_to_disk makes has no subsets: leave it out")
    try:
        if is_saved:
            splits = datasets.load_from_disk(here)
            splits = splits if isinstance(splits, dict) else {"train": splits}
        else:
            with _hub(download):
                splits = datasets.load_dataset(here, chosen.get("subset"))
    except Exception as error:  # the library raises many kinds
        how = "" if download or folder.is_dir() else "; to ask the Hub, set download=true"
        raise DataError(f"dataset {name}: {type(error).__name__}: {error}{how}") from error
    for wanted in (chosen.get("train", "train"), *filter(None, [chosen.get("test")])):
        if wanted not in splits:
            there = ", ".join(splits)
            raise DataError(f"dataset {name}: has no split {wanted}; there are {there}")
    return dict(splits)


@contextlib.contextmanager
def _hub(may_be_asked: bool) -> Iterator[None]:
    """Keep the library from asking the Hub inside this block, unless that is allowed."""
    from datasets import config

    before = config.HF_HUB_OFFLINE  # True where the user's environment says so
    config.HF_HUB_OFFLINE = before or not may_be_asked
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _label_of(name: str, rows: Any) -> str:
    """Return the column of the labels: the only one with classes, else one with a usual name."""
    classes = [c for c, feature in rows.features.items() if hasattr(feature, "names")]
    called = [c for c in LABELS if c in rows.column_names]
    if len(classes) != 1 and not called:
        raise DataError(
            f"dataset {name}: which column is the label? Name it with ?label=…; there are "
            f"{', '.join(rows.column_names)}"
        )
    return classes[0] if len(classes) == 1 else called[0]


def _names(rows: Any, label: str) -> list[str]:
    """Return the classes that a split's labels count; [] if its labels are of another kind."""
    return list(getattr(rows.features[label], "names", None) or [])


def _named(rows: Any, column: str) -> np.ndarray:
    """Return a column; classes by their names."""
    found, names = np.asarray(rows[column]), _names(rows, column)
    if not names or found.dtype.kind not in "iu":
        return found
    return np.array([names[i] if i >= 0 else str(i) for i in found.tolist()])


def _recoded(found: np.ndarray, rows: Any, column: str, train: Any) -> np.ndarray:
    """Return what is ``found`` in a split's column, by the training split's codes of classes.

    Splits whose columns were encoded one by one count their classes differently. Classes that the
    training split does not name come after its own.
    """
    ours, theirs = _names(rows, column), _names(train, column)
    if found.dtype.kind not in "iu" or not ours or not theirs or ours == theirs:
        return found
    every = theirs + [name for name in ours if name not in theirs]
    place = {i: every.index(name) for i, name in enumerate(ours)}
    return np.array([place.get(i, i) for i in found.tolist()])  # those without a class stay so


def _check_named(name: str, labels: np.ndarray, rows: Any, label: str, train: Any) -> None:
    """Refuse labels of a class that the training split does not name.

    Raises:
        DataError: says which.
    """
    theirs = _names(train, label)
    if not theirs or labels.dtype.kind not in "iu" or labels.max(initial=0) < len(theirs):
        return
    other = [each for each in _names(rows, label) if each not in theirs]
    which = f" {other[0]!r}" if other else ""
    raise DataError(
        f"dataset {name}: column {label} has a class{which} that the training split does not have"
        + (near(other[0], theirs) if other else "")
    )


def _image_of(rows: Any) -> str | None:
    """Return the first column of images, if there is one."""
    kinds = {column: type(feature).__name__ for column, feature in rows.features.items()}
    return next((column for column, kind in kinds.items() if kind == "Image"), None)


def _numbers_of(rows: Any, others: set[str | None]) -> list[str]:
    """Return the columns of a table that hold numbers, apart from ``others``."""
    numbers = rows.select_columns([c for c in rows.column_names if c not in others])
    return [c for c, f in numbers.features.items() if getattr(f, "dtype", "").startswith(NUMBERS)]


def _inputs(name: str, rows: Any, columns: list[str], size: int, train: Any) -> np.ndarray:
    """Return the examples: images [N, C, H, W], or numbers."""
    if not columns:
        raise DataError(f"dataset {name}: has no column of images or numbers; name one: ?input=…")
    first = columns[0]
    if type(rows.features[first]).__name__ == "Image":
        from datasets import Image

        raw = rows.cast_column(first, Image(decode=False))[first]

        def files() -> Iterator[tuple[Any, str]]:
            for i, each in enumerate(raw):
                data = each["bytes"]
                where = f"row {i} of {name}"
                yield (each["path"], each["path"]) if data is None else (io.BytesIO(data), where)

        return decoded(files(), len(raw), size)
    every = rows.with_format("numpy")
    parts = [_recoded(np.asarray(every[c]), rows, c, train) for c in columns]
    return parts[0] if len(parts) == 1 else np.stack(parts, 1)
