"""Data sets as arrays: images [N, C, H, W] uint8, labels [N] int64."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from pfedgpa_app.data import EMNIST_SPLITS
from pfedgpa_app.settings import DataError

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
FOLDERS = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST", "cifar10": "cifar-10-batches-py"}
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".ppm", ".tif", ".tiff"}


logger = logging.getLogger("pfedgpa")


@dataclass(frozen=True)
class Dataset:
    """A labelled image set with its own test split.

    Images are uint8 of shape [N, C, H, W]; labels are int64 of shape [N].
    """

    name: str
    classes: tuple[str, ...]
    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def resolve_data_dir(data_dir: str) -> Path:
    """Where data sets lie: the setting, else $PFEDGPA_DATA, else ./data; absolute."""
    return Path(data_dir or os.environ.get("PFEDGPA_DATA") or "data").expanduser().absolute()


@lru_cache(maxsize=2)
def load(name: str, data_dir: str, download: bool = False, image_size: int = 0) -> Dataset:
    """The data set called ``name`` (see ``DATASET_HELP``), once a process.

    Raises:
        DataError: it is not there, or cannot be read as labelled images.
    """
    root = resolve_data_dir(data_dir)
    if name == "digits":
        return _cached(["digits"], _digits)  # scikit-learn takes longer to import than a round
    if name.startswith("imagefolder:"):
        path = Path(name.removeprefix("imagefolder:")).expanduser()
        return _imagefolder(path if path.is_absolute() else root / path, image_size)
    folder = root / FOLDERS.get(name, "EMNIST")
    if not folder.is_dir():
        return _torchvision(name, root, download)  # downloads, or says what to do
    return _cached([name, _files(folder)], lambda: _torchvision(name, root, download))


def _digits() -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8×8; every class gives 30 % to the test split."""
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

    makers: dict[str, Any] = {
        "mnist": datasets.MNIST,
        "fashion-mnist": datasets.FashionMNIST,
        "cifar10": datasets.CIFAR10,
    }
    for split in EMNIST_SPLITS:
        makers[f"emnist-{split}"] = lambda *a, split=split, **k: datasets.EMNIST(
            *a, split=split, **k
        )
    try:
        train, test = (makers[name](root, train=t, download=download) for t in (True, False))
    except (RuntimeError, OSError) as error:
        how = (
            "the download failed (no internet connection?); put the official files there"
            if download
            else "run once with download=true where there is internet, or put the files there"
        )
        raise DataError(f"dataset {name}: not found in {root}: {how} ({error})") from error

    def arrays(split: Any) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(split.data)
        images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        return np.ascontiguousarray(images), np.asarray(split.targets, dtype=np.int64)

    classes, shift = [str(c) for c in train.classes], 0
    if name == "emnist-letters":  # labelled 1..26, with an empty class 0
        classes, shift = classes[1:], 1
    (train_images, train_labels), (test_images, test_labels) = arrays(train), arrays(test)
    return Dataset(
        name, tuple(classes), train_images, train_labels - shift, test_images, test_labels - shift
    )


def _files(folder: Path) -> list[tuple[str, int, int]]:
    """(path, bytes, mtime) of every file below ``folder``, sorted; by far the quickest way."""
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                found += _files(Path(entry.path))
            else:
                stat = entry.stat()
                found.append((entry.path, stat.st_size, stat.st_mtime_ns))
    return sorted(found)


def _listing(path: Path) -> dict[str, list[tuple[str, str, int, int]]]:
    """{split: [(relative path, class, bytes, mtime)]}, sorted; refuses what is no image folder."""
    listing = {}
    for split in ("train", "test"):
        folder = path / split
        if not folder.is_dir():
            raise DataError(
                f"dataset imagefolder:{path}: no folder {folder}; images are expected as "
                "train/CLASS/IMAGE and test/CLASS/IMAGE"
            )
        start = len(str(path)) + 1
        files = []
        for entry in sorted(p for p in folder.iterdir() if p.is_dir()):
            for file, size, changed in _files(entry):
                if os.path.splitext(file)[1].lower() in SUFFIXES:
                    files.append((file[start:], entry.name, size, changed))
        if not files:
            raise DataError(f"dataset imagefolder:{path}: no images in the folders of {folder}")
        listing[split] = files
    unknown = {f[1] for f in listing["test"]} - {f[1] for f in listing["train"]}
    if unknown:
        raise DataError(
            f"dataset imagefolder:{path}: test/ has classes that train/ lacks: "
            + ", ".join(sorted(unknown))
        )
    return listing


def _decode(path: Path, files: list[tuple[str, str, int, int]], size: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    def pixels(file: str) -> np.ndarray:
        try:
            with Image.open(path / file) as opened:
                image = opened.convert("L" if opened.mode in ("1", "L") else "RGB")
                if size:
                    image = image.resize((size, size), Image.Resampling.BILINEAR)
                array = np.asarray(image)
        except (UnidentifiedImageError, OSError) as error:
            raise DataError(f"{path / file}: cannot be read as an image: {error}") from error
        return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)

    first = pixels(files[0][0])
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    for i, (file, *_) in enumerate(files):
        image = pixels(file)
        if image.shape != first.shape:
            raise DataError(
                f"{path / file}: is {image.shape} (C, H, W) but {path / files[0][0]} is "
                f"{first.shape}; set image-size to resize all images alike"
            )
        images[i] = image
    return images


def _imagefolder(path: Path, size: int) -> Dataset:
    """Anyone's own images."""
    listing = _listing(path)
    classes = tuple(sorted({f[1] for f in listing["train"]}))

    def read() -> Dataset:
        arrays = []
        for files in listing.values():
            arrays.append(_decode(path, files, size))
            arrays.append(np.array([classes.index(f[1]) for f in files], dtype=np.int64))
        return Dataset(f"imagefolder:{path.name}", classes, *arrays)

    return _cached([str(path), size, listing], read)


def _cached(identity: Any, read: Callable[[], Dataset]) -> Dataset:
    """What ``read`` returns, read once a machine and then mapped into all processes' memory.

    Args:
        identity: JSON-ready; changes whenever the source's files do.
    """
    text = json.dumps(identity, separators=(",", ":"))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfedgpa"
    cache = home / f"2-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if not cache.is_dir():
        data = read()
        try:
            _store(data, cache)
        except OSError as error:
            logger.warning(
                "%s: data sets cannot be kept there for other processes: %s", home, error
            )
            return data
    about = json.loads((cache / "about.json").read_text())
    arrays = {
        name: np.load(cache / f"{name}.npy", mmap_mode="r" if "images" in name else None)
        for name in ARRAYS
    }
    return Dataset(about["name"], tuple(about["classes"]), **arrays)


def _store(data: Dataset, cache: Path) -> None:
    """Write ``data`` to the folder ``cache``, which nobody ever sees half full."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=cache.parent))
    try:
        for name in ARRAYS:
            np.save(building / f"{name}.npy", getattr(data, name))
        (building / "about.json").write_text(
            json.dumps({"name": data.name, "classes": data.classes})
        )
        try:
            building.rename(cache)
        except OSError:
            if not cache.is_dir():  # else another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
