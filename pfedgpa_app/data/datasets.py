"""Data sets as arrays: images [N, C, H, W] uint8, labels [N] int64."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data import EMNIST_SPLITS
from pfedgpa_app.models.networks import SHAPES

if TYPE_CHECKING:
    from PIL.Image import Image

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
SPLITS = ("train", "test")
ABOUT, STAMPS = "about.json", "stamps.json"
IMAGEFOLDER = "imagefolder:"
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


def resolve_data_dir(data_dir: str, name: str) -> Path:
    """The folder below which the data set ``name`` is looked for, absolute.

    The setting, else $PFEDGPA_DATA, else ./data; but the current folder where a relative
    ``imagefolder:`` lies below that.
    """
    if name.startswith(IMAGEFOLDER) and not _missing(Path.cwd() / _path(name)):
        return Path.cwd()
    return user_path(data_dir or os.environ.get("PFEDGPA_DATA") or "data").absolute()


def _path(name: str) -> Path:
    """The path in an ``imagefolder:PATH``; folder / it is itself where it is absolute."""
    return user_path(name.removeprefix(IMAGEFOLDER))


def _missing(path: Path) -> Path | None:
    """What the image folder ``path`` lacks."""
    return next((path / split for split in SPLITS if not (path / split).is_dir()), None)


@lru_cache(maxsize=2)
def load(name: str, data_dir: str, download: bool = False, image_size: int = 0) -> Dataset:
    """The data set called ``name`` (see ``DATASET_HELP``), once a process.

    Raises:
        DataError: it is not there, or cannot be read as labelled images.
    """
    root = resolve_data_dir(data_dir, name)
    try:
        if name == "digits":
            return _cached(["digits"], _digits)  # scikit-learn takes longer to import than a round
        if name.startswith(IMAGEFOLDER):
            return _imagefolder(name, root, image_size)
        folder = _folder(name, root)
        if not folder.is_dir():
            return _torchvision(name, root, download)  # downloads, or says what to do
        identity = [name, sorted(map(_stamped, _files(folder)))]
        return _cached(identity, lambda: _torchvision(name, root, download))
    except OSError as error:
        raise DataError(
            f"dataset {name}: {error.filename} cannot be read: {error.strerror}; if it is a link, "
            "mend what it points to, or remove it"
        ) from error


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


def _folder(name: str, root: Path) -> Path:
    """Where torchvision keeps a data set's files."""
    return root / FOLDERS.get(name, "EMNIST")


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
    except Exception as error:  # torchvision raises all kinds on damaged files
        if not isinstance(error, OSError) and "download" not in str(error):
            raise DataError(
                f"dataset {name}: its files in {_folder(name, root)} are damaged "
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
        images = images.transpose(0, 3, 1, 2) if images.ndim == 4 else images[:, None]
        return np.ascontiguousarray(images), np.asarray(split.targets, dtype=np.int64)

    classes, shift = [str(c) for c in train.classes], 0
    if name == "emnist-letters":  # labelled 1..26, with an empty class 0
        classes, shift = classes[1:], 1
    (train_images, train_labels), (test_images, test_labels) = arrays(train), arrays(test)
    return Dataset(
        name, tuple(classes), train_images, train_labels - shift, test_images, test_labels - shift
    )


def _is_there(entry: os.DirEntry[str] | Path) -> bool:
    """Whether it counts: what is hidden does not, nor what macOS packs beside the files."""
    return not entry.name.startswith(".") and entry.name != "__MACOSX"


def _files(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """Every file below ``folder``; by far the quickest way.

    Raises:
        DataError: a link leads back to one of the folders ``above``.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: is a link to a folder that it lies in itself: remove it")
    with os.scandir(folder) as entries:
        for entry in filter(_is_there, entries):
            if entry.is_dir():
                yield from _files(entry.path, (*above, real))
            else:
                yield entry


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # pathlib's takes as long as all the rest


def _stamped(entry: os.DirEntry[str] | Path) -> tuple[str, int, int]:
    """(path, bytes, mtime), which tell whether the file has changed."""
    found = entry.stat()
    return os.fspath(entry), found.st_size, found.st_mtime_ns


def _listing(path: Path) -> dict[str, list[tuple[str, str, int, int]]]:
    """{split: [(relative path, class, bytes, mtime)]}, sorted; refuses what is no image folder."""
    listing = {}
    for split in SPLITS:
        folder = path / split
        start = len(str(path)) + 1
        files = []
        for entry in sorted(filter(_is_there, folder.iterdir())):
            if stat.S_ISDIR(entry.stat().st_mode):  # a link to nothing is an error
                images = (f for f in _files(entry) if _suffix(f.name) in SUFFIXES)
                for file, size, changed in sorted(map(_stamped, images)):
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


def _eight_bits(image: Image) -> Image:
    """``image`` in grey or RGB, of 8 bits a channel; without its transparency.

    Raises:
        ValueError: it cannot be told which values are black and white.
    """
    from PIL import ExifTags, Image

    if image.mode in ("1", "L"):
        return image.convert("L")
    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):
        bits = image.getexif()[ExifTags.Base.BitsPerSample] if image.format == "TIFF" else 16
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"its pixels have no defined range (mode {image.mode}); save it with 8 or 16 bits"
        )
    return image.convert("RGB")


def _pixels(file: Path, size: int) -> np.ndarray:
    """An image as [C, H, W] uint8, upright; C is 1 if it is grey, else 3.

    Raises:
        DataError: it cannot be read, or is too large.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as opened:
            opened.load()
            with suppress(Exception):  # garbled EXIF does not say how the image lies
                ImageOps.exif_transpose(opened, in_place=True)
            image = _eight_bits(opened)
            if size:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            array = np.asarray(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            f"{file}: has more than {Image.MAX_IMAGE_PIXELS:,} pixels: make it smaller, or "
            "remove it"
        ) from error
    except Exception as error:  # Pillow raises all kinds on damaged files
        raise DataError(
            f"{file}: cannot be read as an image: {str(error) or type(error).__name__}; mend it, "
            "or remove it"
        ) from error
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode(files: Sequence[Path], size: int) -> np.ndarray:
    """The images [N, C, H, W]: all in colour if any is."""
    from PIL import Image

    with warnings.catch_warnings(action="error", category=Image.DecompressionBombWarning):
        first = _pixels(files[0], size)
        images = np.empty((len(files), *first.shape), dtype=np.uint8)
        for i, file in enumerate(files):
            image = _pixels(file, size)
            if image.shape[1:] != first.shape[1:]:
                sizes = ["×".join(map(str, a.shape[1:])) for a in (image, first)]
                raise DataError(
                    f"{file}: is {sizes[0]} (H×W) but {files[0]} is {sizes[1]}; set image-size to "
                    "resize all images alike"
                )
            if len(image) > images.shape[1]:  # the first one in colour
                images = images.repeat(len(image), axis=1)
            images[i] = image
    return images


def _imagefolder(name: str, root: Path, size: int) -> Dataset:
    """Anyone's own images."""
    path = root / _path(name)
    if _missing(path):
        places = dict.fromkeys(str(_missing(p / _path(name))) for p in (Path.cwd(), root))
        raise DataError(
            f"dataset {name}: no folder {' nor '.join(places)}; images are expected as "
            "train/CLASS/IMAGE and test/CLASS/IMAGE"
        )
    if size and size not in (sizes := sorted({height for _, height, _ in SHAPES})):
        raise DataError(f"image-size = {size}: networks take {', '.join(map(str, sizes))}")
    listing = _listing(path)
    classes = tuple(sorted({f[1] for f in listing["train"]}))

    def read() -> Dataset:
        train, test = listing.values()
        images = _decode([path / f[0] for f in (*train, *test)], size)
        labels = np.array([classes.index(f[1]) for f in (*train, *test)], dtype=np.int64)
        cut = len(train)
        return Dataset(
            f"imagefolder:{path.name}",
            classes,
            images[:cut],
            labels[:cut],
            images[cut:],
            labels[cut:],
        )

    return _cached([str(path), size, listing], read)


def _cached(identity: Any, read: Callable[[], Dataset]) -> Dataset:
    """What ``read`` returns, read once a machine and then mapped into all processes' memory.

    Args:
        identity: JSON-ready; changes whenever the source's files do.
    """
    text = json.dumps(identity, separators=(",", ":"))
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfedgpa"
    cache = home / f"3-{hashlib.sha256(text.encode()).hexdigest()[:24]}"
    if found := _stored(cache):
        return found
    data = read()
    try:
        _store(data, cache)
    except OSError as error:
        logger.warning("%s: data sets cannot be kept there for other processes: %s", home, error)
    return _stored(cache) or data


def _stamps(cache: Path) -> str:
    """When each file of ``cache`` was written, and its size."""
    files = (ABOUT, *(f"{name}.npy" for name in ARRAYS))
    return json.dumps([(name, *_stamped(cache / name)[1:]) for name in files])


def _stored(cache: Path) -> Dataset | None:
    """The data set in ``cache``; None if it is not there, or any file is not as it was stored."""
    try:
        if (cache / STAMPS).read_text(encoding="utf-8") != _stamps(cache):
            return None
        about = json.loads((cache / ABOUT).read_text(encoding="utf-8"))
        arrays = {
            name: np.load(cache / f"{name}.npy", mmap_mode="r" if "images" in name else None)
            for name in ARRAYS
        }
    except (OSError, ValueError, EOFError):  # gone or garbled
        return None
    return Dataset(about["name"], tuple(about["classes"]), **arrays)


def _store(data: Dataset, cache: Path) -> None:
    """Write ``data`` to the folder ``cache``, which nobody ever sees half full.

    A damaged one is moved away: who has mapped its files keeps them.
    """
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent, ignore_cleanup_errors=True) as place:
        building = Path(place) / "new"
        building.mkdir(mode=0o700)
        for name in ARRAYS:
            np.save(building / f"{name}.npy", getattr(data, name))
        about = json.dumps({"name": data.name, "classes": data.classes})
        (building / ABOUT).write_text(about, encoding="utf-8")
        (building / STAMPS).write_text(_stamps(building), encoding="utf-8")
        with suppress(FileNotFoundError):
            cache.rename(Path(place) / "damaged")
        try:
            building.rename(cache)
        except OSError:
            if not cache.is_dir():  # else another process was faster, with the same content
                raise
