"""Load data sets by name: torchvision's, scikit-learn's digits, and users' own."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import traceback
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from pfedgpa_app.core.own_code import imported, in_users_folder
from pfedgpa_app.core.paths import PACKAGE, remembered, user_path
from pfedgpa_app.core.randomness import seeded
from pfedgpa_app.core.settings import ConfigError, DataError, near
from pfedgpa_app.data import (
    DATASETS,
    EMNIST_SPLITS,
    HUGGING_FACE,
    IMAGEFOLDER,
    NPZ,
    hugging_face,
    is_own_code,
)
from pfedgpa_app.data.arrays import dataset_of
from pfedgpa_app.data.dataset import SPLITS, Dataset
from pfedgpa_app.data.imagefolder import files_below, has_splits, image_folder, stamped
from pfedgpa_app.data.pictures import decoder

ARRAYS = tuple(f"{split}_{what}" for what in ("images", "labels") for split in SPLITS)
NAMES = tuple(f"{split}_{what}" for what in ("samples", "users") for split in SPLITS)
WORDS = ("name", "classes", "columns", "own_test", "unused")
ABOUT, STAMPS = "about.json", "stamps.json"
# {name: (torchvision's class, the folder below the data folder in which it keeps its files)}
TORCHVISIONS = {
    "mnist": ("MNIST", "MNIST"),
    "fashion-mnist": ("FashionMNIST", "FashionMNIST"),
    "kmnist": ("KMNIST", "KMNIST"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "svhn"),
    **{f"emnist-{split}": ("EMNIST", "EMNIST") for split in EMNIST_SPLITS},
}
logger = logging.getLogger("pfedgpa")


def resolve_data_dir(data_dir: str, name: str) -> Path:
    """Return the absolute folder below which the data set ``name`` is looked for.

    This is the setting, else $PFEDGPA_DATA, else ./data. It is the current folder if a relative
    ``imagefolder:``, ``npz:`` or ``hf:`` path is there (of an image folder that both have, the
    current folder's counts only with train/ and test/).
    """
    below = user_path(data_dir or os.environ.get("PFEDGPA_DATA") or "data").absolute()
    here, there = (place / _path(name) for place in (Path.cwd(), below))
    if name.startswith((NPZ, HUGGING_FACE)) and here.exists():
        return Path.cwd()
    if name.startswith(IMAGEFOLDER) and here.is_dir() and (has_splits(here) or not there.is_dir()):
        return Path.cwd()
    return below


def _path(name: str) -> Path:
    """Return the path in a name such as ``imagefolder:PATH``.

    Joined to a folder, an absolute path stays as it is.
    """
    if name.startswith(HUGGING_FACE):
        name = hugging_face.parsed(name)[0]
    return user_path(name.removeprefix(IMAGEFOLDER).removeprefix(NPZ))


@remembered(2)
def load(
    name: str,
    data_dir: str,
    download: bool = False,
    image_size: int = 0,
    test_share: float = 0.2,
    code_dir: str = "",
) -> Dataset:
    """Load the data set called ``name`` (see ``DATASET_HELP``), once per process.

    Raises:
        DataError: it is not there, or cannot be read as labelled examples.
    """
    root = resolve_data_dir(data_dir, name)
    try:
        if name == "digits":
            return _cached(["digits"], _digits)  # scikit-learn takes longer to import than a round
        if name.startswith(IMAGEFOLDER):
            return image_folder(_there(name, root), image_size, test_share, _cached)
        if name.startswith(NPZ):
            return _npz(name, _there(name, root), test_share)
        if name.startswith(HUGGING_FACE):
            return _hugging_face(name, root, image_size, test_share, download)
        if is_own_code(name):
            return _own(name, code_dir, test_share)
        if name not in TORCHVISIONS:
            raise DataError(f"dataset {name}: no such data set{near(name, DATASETS)}")
        folder = root / TORCHVISIONS[name][1]
        if not folder.is_dir():
            return _torchvision(name, root, download)  # downloads, or says what to do
        identity = [name, sorted(map(stamped, files_below(folder)))]
        return _cached(identity, lambda: _torchvision(name, root, download))
    except OSError as error:
        path = Path(error.filename or root)
        advice = "; it is a link: repair its target, or remove it" if path.is_symlink() else ""
        raise DataError(
            f"dataset {name}: {path} cannot be read: {error.strerror or error}{advice}"
        ) from error


def _there(name: str, root: Path) -> Path:
    """Return where the folder or file of ``name`` is.

    Raises:
        DataError: it does not exist.
    """
    path = root / _path(name)
    wants_folder = name.startswith(IMAGEFOLDER)
    if not (path.is_dir() if wants_folder else path.is_file()):
        places = dict.fromkeys(str(p / _path(name)) for p in (Path.cwd(), root))
        kind, how = "file", ""
        if wants_folder:
            kind = "folder"
            how = "; images are expected as CLASS/IMAGE in it, or below train/ and test/"
        raise DataError(f"dataset {name}: no {kind} {' nor '.join(places)}{how}")
    return path


def _npz(name: str, path: Path, test_share: float) -> Dataset:
    """Load arrays of NumPy's format; pickled objects are not read."""

    def read() -> Dataset:
        if not zipfile.is_zipfile(path):
            raise DataError(
                f"dataset {name}: {path} is not what numpy.savez writes; anything else is read by "
                "your own function: dataset=MODULE:CALLABLE (docs/own.md)"
            )
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {key: file[key] for key in file.files}
        except (ValueError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"dataset {name}: {path} cannot be read as arrays: {error}") from error
        return dataset_of(name, found, test_share)

    return _cached([name, stamped(path), test_share], read)


def _hugging_face(name: str, root: Path, size: int, test_share: float, download: bool) -> Dataset:
    """Load a data set of the Hub, or of a folder below ``root``, read once per machine."""
    folder = root / _path(name)
    files = sorted(map(stamped, files_below(folder))) if folder.is_dir() else []
    read = functools.partial(hugging_face.read, name, root, size, test_share, download)
    return _cached([name, files, size, test_share, decoder()], read)


def _own(name: str, code_dir: str, test_share: float) -> Dataset:
    """Return the data set that the user's own code makes; each process calls it once.

    A torch Dataset's items are made only when they are read.
    """
    make = imported(name, code_dir, "dataset")
    if not callable(make):
        raise ConfigError(f"dataset = {name!r}: is a {type(make).__name__}, not a callable")
    doing = "calling it without arguments"
    try:
        with seeded(0), in_users_folder():  # all processes get the same data
            found = make()
            doing = "reading what it returns"
            return dataset_of(name, found, test_share)
    except DataError:
        raise
    except Exception as error:  # whatever foreign code raises
        frames = traceback.extract_tb(error.__traceback__)
        files = [(Path(each.filename).resolve(), each.lineno) for each in frames]
        theirs = [(file.name, line) for file, line in files if not file.is_relative_to(PACKAGE)]
        where = "".join(f" ({file}, line {line})" for file, line in theirs[:1])
        raise DataError(
            f"dataset {name}: {doing} raises {type(error).__name__}{where}: {error}"
        ) from error


def _digits() -> Dataset:
    """Load scikit-learn's 1,797 handwritten digits, 8×8; 30 % of every class are the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images[:, None] * (255 / 16)).round().astype(np.uint8)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    rank_in_class = np.empty(len(labels), dtype=int)
    for c in range(10):
        members = order[labels[order] == c]
        rank_in_class[members] = np.arange(len(members)) * 10 // len(members)
    test = rank_in_class >= 7
    return Dataset(
        "digits",
        tuple(str(c) for c in range(10)),
        images[~test],
        labels[~test],
        images[test],
        labels[test],
    )


def _torchvision(name: str, root: Path, download: bool) -> Dataset:
    from torchvision import datasets

    kind, folder = TORCHVISIONS[name]
    make = getattr(datasets, kind)
    if kind == "EMNIST":
        make = functools.partial(make, split=name.removeprefix("emnist-"))
    try:
        if kind == "SVHN":
            train, test = (make(root / folder, split=s, download=download) for s in SPLITS)
        else:
            train, test = (make(root, train=t, download=download) for t in (True, False))
    except Exception as error:  # torchvision raises all kinds on damaged files
        if not isinstance(error, OSError) and "download" not in str(error):
            raise DataError(
                f"dataset {name}: its files in {root / folder} are damaged "
                f"({str(error) or type(error).__name__}): delete them, and then run once with "
                "download=true where there is internet, or put the official files there"
            ) from error
        how = (
            "the download failed (no internet connection?); put the official files there"
            if download
            else "run once with download=true where there is internet, or put the files there"
        )
        raise DataError(f"dataset {name}: not found in {root}: {how} ({error})") from error

    def arrays(split: Any) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(split.data)
        if kind != "SVHN":  # its channels are first already
            images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        if kind == "EMNIST":  # its files swap rows and columns
            images = images.swapaxes(-1, -2)
        labels = split.labels if kind == "SVHN" else split.targets
        return np.ascontiguousarray(images), np.asarray(labels, dtype=np.int64)

    classes, shift = [str(c) for c in getattr(train, "classes", range(10))], 0
    if name == "emnist-letters":  # labelled 1..26, with an empty class 0
        classes, shift = classes[1:], 1
    (train_images, train_labels), (test_images, test_labels) = arrays(train), arrays(test)
    return Dataset(
        name, tuple(classes), train_images, train_labels - shift, test_images, test_labels - shift
    )


def _cached(identity: Any, read: Callable[[], Dataset]) -> Dataset:
    """Return what ``read`` returns, read once per machine and mapped into all processes' memory.

    Args:
        identity: JSON-ready; it must change whenever the source's files do.
    """
    text = json.dumps(identity, separators=(",", ":"))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfedgpa"
    cache = home / f"8-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if found := _stored(cache):
        return found
    data = read()
    try:
        _store(data, cache)
    except OSError as error:
        logger.warning("%s: data sets cannot be cached there for other processes: %s", home, error)
    return _stored(cache) or data


def _stamps(cache: Path) -> str:
    """Return the stamp of each file in ``cache``, as text."""
    files = (ABOUT, *(f"{name}.npy" for name in (*ARRAYS, *NAMES)))
    return json.dumps([(name, stamped(cache / name)[1]) for name in files])


def _stored(cache: Path) -> Dataset | None:
    """Load the data set in ``cache``; None if it is absent, or a file is not as it was stored."""
    try:
        if (cache / STAMPS).read_text(encoding="utf-8") != _stamps(cache):
            return None
        about = json.loads((cache / ABOUT).read_text(encoding="utf-8"))
        arrays = {
            name: np.load(cache / f"{name}.npy", mmap_mode="r" if "images" in name else None)
            for name in (*ARRAYS, *NAMES)
        }
    except (OSError, ValueError, EOFError):  # gone or garbled
        return None
    words: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in about.items()
    }
    return Dataset(**words, **arrays)


def _store(data: Dataset, cache: Path) -> None:
    """Write ``data`` to the folder ``cache``, which nobody ever sees half full.

    A damaged folder is moved away: processes that have mapped its files keep them.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, ignore_cleanup_errors=True) as place:
        building = Path(place) / "new"
        building.mkdir(mode=0o700)
        for name in (*ARRAYS, *NAMES):
            np.save(building / f"{name}.npy", getattr(data, name))
        about = {key: getattr(data, key) for key in WORDS}
        (building / ABOUT).write_text(json.dumps(about), encoding="utf-8")
        (building / STAMPS).write_text(_stamps(building), encoding="utf-8")
        with suppress(FileNotFoundError):
            cache.rename(Path(place) / "damaged")
        try:
            building.rename(cache)
        except OSError:
            if not cache.is_dir():  # else another process was faster, with the same content
                raise
