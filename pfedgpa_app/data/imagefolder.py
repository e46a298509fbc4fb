"""Users' own images: a folder for each class, maybe below train/ and test/."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.dataset import SPLITS, Dataset, least_classes, split_off_test
from pfedgpa_app.data.pictures import decoded, decoder

SUFFIXES = {".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".bmp", ".webp", ".avif", ".gif"}
SUFFIXES |= {".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".tif", ".tiff"}
UNREAD = {".heic", ".heif", ".jxl", ".dcm"}  # images that Pillow cannot read
_ALSO = {  # other names of folders that hold splits
    "train": {"train", "training"},
    "test": {"test", "testing", "val", "valid", "validation"},
}
Cached = Callable[[Any, Callable[[], Dataset]], Dataset]


class File(NamedTuple):
    """An image's file."""

    path: str  # relative to the data set's folder
    label: str  # the name of its class
    stamp: tuple[int, ...]  # by which a changed file is known


def _is_there(entry: os.DirEntry[str] | Path) -> bool:
    """Whether an entry counts: hidden ones do not, nor what macOS packs beside the files."""
    return not entry.name.startswith(".") and entry.name != "__MACOSX"


def files_below(folder: str | Path, above: tuple[str, ...] = ()) -> Iterator[os.DirEntry[str]]:
    """Yield every file below ``folder``; this is by far the quickest way.

    Raises:
        DataError: a link leads back to one of the folders ``above``.
    """
    real = os.path.realpath(folder)
    if real in above:
        raise DataError(f"{folder}: is a link to a folder that contains it: remove it")
    with os.scandir(folder) as entries:
        for entry in filter(_is_there, entries):
            if entry.is_dir():
                yield from files_below(entry.path, (*above, real))
            else:
                yield entry


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # pathlib's would take as long as all the rest


def is_image(file: str | Path) -> bool:
    """Whether a file is an image, by its name.

    Raises:
        DataError: it is an image of a kind that is not read; it would be left out silently.
    """
    suffix = _suffix(os.fspath(file))
    if suffix in UNREAD:
        raise DataError(
            f"{file}: images of this kind cannot be read: save it as PNG or JPEG, or remove it"
        )
    return suffix in SUFFIXES


def stamped(entry: os.DirEntry[str] | Path) -> tuple[str, tuple[int, ...]]:
    """Return (path, stamp), which tell whether a file has changed, or another is in its place.

    An archive or a copy may have given all files one time, and swapping two folders' names changes
    nothing in their files.
    """
    found = entry.stat()
    stamp = found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino
    return os.fspath(entry), stamp


def has_splits(path: Path) -> bool:
    """Whether a folder's images lie below train/ and test/."""
    return all((path / split).is_dir() for split in SPLITS)


def _folders(path: Path) -> list[str]:
    """Return the names of the folders in ``path``, sorted."""
    return sorted(e.name for e in filter(_is_there, os.scandir(path)) if e.is_dir())


def _listing(path: Path, least: int) -> dict[str, list[File]]:
    """Return {split: its files, sorted}; the only split is "" in a folder without train/ and test/.

    Args:
        least: how many classes a folder without splits must have.

    Raises:
        DataError: ``path`` does not hold labelled images, or not in folders as expected.
    """
    splits = SPLITS if has_splits(path) else ("",)
    if alone := [split for split in SPLITS if (path / split).is_dir() and "" in splits]:
        [other] = {*SPLITS} - {*alone}
        raise DataError(
            f"dataset imagefolder:{path}: has {alone[0]}/ but no {other}/: add it, or name "
            f"{path / alone[0]}, whose images are then split by test-share"
        )
    names = _folders(path)
    alike = {split: [n for n in names if n.lower() in _ALSO[split]] for split in SPLITS}
    if "" in splits and all(alike.values()):
        raise DataError(
            f"dataset imagefolder:{path}: has {alike['train'][0]}/ and {alike['test'][0]}/, which "
            "are not classes: rename them train and test"
        )
    listing = {split: _classes_in(path, split) for split in splits}
    for split, files in listing.items():
        if not files:
            raise DataError(
                f"dataset imagefolder:{path}: no images in the folders of {path / split}; images "
                "are expected as CLASS/IMAGE, or as train/CLASS/IMAGE and test/CLASS/IMAGE"
            )
    first, *others = ({file.label for file in files} for files in listing.values())
    if others and (unknown := others[0] - first):
        raise DataError(
            f"dataset imagefolder:{path}: test/ has classes that train/ lacks: "
            + ", ".join(sorted(unknown))
        )
    if "" in listing and len(first) < least:
        raise DataError(
            f"dataset imagefolder:{path}: has only one class, {next(iter(first))}: add a second"
        )
    return listing


def _classes_in(path: Path, split: str) -> list[File]:
    """List the images of ``split``, whose folders are classes; an empty folder is none."""
    start, found = len(str(path)) + 1, []
    for entry in sorted(filter(_is_there, (path / split).iterdir())):
        if stat.S_ISDIR(entry.stat().st_mode):  # a link to nothing raises an error
            files = list(files_below(entry))
            images = [file for file in files if is_image(file.path)]
            if files and not images:
                raise DataError(
                    f"dataset imagefolder:{path}: the folder {entry} has no image, only "
                    f"{files[0].name} or the like: images end in {', '.join(sorted(SUFFIXES))}; "
                    "add some, or remove the folder"
                )
            for file, stamp in sorted(map(stamped, images)):
                found.append(File(file[start:], entry.name, stamp))
    return found


def image_folder(
    path: Path,
    size: int,
    test_share: float,
    cached: Cached,
) -> Dataset:
    """Load the images in ``path``.

    Args:
        size: the side of the squares that images are resized to; 0: they stay as they are.
        test_share: the share of each class that is tested on where there is no test split; 0: none.
        cached: is given the files' identity and a reader, and returns the data set that is stored
            for this identity, else the reader's.

    Raises:
        DataError: there are no images, or one of them cannot be read.
    """
    listing = _listing(path, least_classes(test_share))
    unused = () if "" in listing else tuple(f"{n}/" for n in _folders(path) if n not in SPLITS)
    classes = tuple(sorted({file.label for files in listing.values() for file in files}))

    def read() -> Dataset:
        files = [file for split in listing.values() for file in split]
        labels = np.array([classes.index(file.label) for file in files], dtype=np.int64)
        if "" in listing:
            train, test = split_off_test(f"imagefolder:{path}", labels, classes, test_share)
        else:
            train, test = np.split(np.arange(len(files)), [len(listing["train"])])
        places = (path / file.path for file in files)
        images = decoded(((place, str(place)) for place in places), len(files), size)
        samples = np.array([Path(file.path).as_posix() for file in files])
        return Dataset(
            f"imagefolder:{path.name}",
            classes,
            images[train],
            labels[train],
            images[test],
            labels[test],
            samples[train],
            samples[test],
            own_test="" not in listing,
            unused=unused,
        )

    identity: list[Any] = [str(path), size, listing, unused, decoder()]
    return cached(identity + ([test_share] if "" in listing else []), read)
