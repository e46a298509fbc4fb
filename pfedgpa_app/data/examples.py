"""Read examples without labels from the files that a user names."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from pfedgpa_app.core.schema import Schema, column_places
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.data.imagefolder import files_below, is_image
from pfedgpa_app.data.partition_file import delimiter_of, is_number
from pfedgpa_app.data.pictures import BILINEAR, pixels_of, read_image

_DECIMAL = re.compile(r"^(\s*[+-]?\d+),(\d+(?:[eE][+-]?\d+)?\s*)$")  # a decimal comma
ARRAYS = (".npy", ".npz", ".csv")


def examples(places: Sequence[Path], schema: Schema, resize: bool) -> tuple[list[str], np.ndarray]:
    """Return the names of examples, and the examples [N, *shape].

    Args:
        places: images, folders of images, or files of arrays (.npy, .npz with x, .csv).
        resize: whether images are resized where the network takes another size.

    Raises:
        DataError: a file is absent, cannot be read, or does not fit.
    """
    names: list[str] = []
    rows: list[np.ndarray] = []
    for place in _files(places, schema.pixels):
        if place.suffix.lower() in ARRAYS:
            found = _array(place, schema)
            names += [f"{place}[{i}]" for i in range(len(found))]
            rows.append(found)
        elif schema.pixels:
            names.append(str(place))
            rows.append(_image(place, schema, resize)[None])
        else:
            raise DataError(
                f"{place}: the run's examples are not images: give a file of arrays, "
                f"{', '.join(ARRAYS)}"
            )
    if not rows:
        kinds = "images" if schema.pixels else f"files of arrays ({', '.join(ARRAYS)})"
        raise DataError(f"{', '.join(map(str, places))}: holds no {kinds}")
    return names, np.concatenate(rows)


def _files(places: Sequence[Path], pixels: bool) -> Iterator[Path]:
    for place in places:
        if place.is_dir():
            for path in sorted(Path(entry.path) for entry in files_below(place)):
                if is_image(path) if pixels else path.suffix.lower() in ARRAYS:
                    yield path
        elif not place.exists():
            raise DataError(f"{place}: does not exist")
        else:
            yield place


def _image(file: Path, schema: Schema, resize: bool) -> np.ndarray:
    """Read one image as [C, H, W] uint8, in grey or colour as the network wants it."""
    channels, height, width = schema.shape
    image = read_image(file)
    if channels in (1, 3):
        image = image.convert("L" if channels == 1 else "RGB")
    if resize and image.size != (width, height):
        image = image.resize((width, height), BILINEAR)
    array = pixels_of(image)
    if array.shape != schema.shape:
        found = "×".join(map(str, array.shape))
        raise DataError(
            f"{file}: is {found}, but the network takes {'×'.join(map(str, schema.shape))}: "
            "resize it, or use --resize"
        )
    return array


def _array(file: Path, schema: Schema) -> np.ndarray:
    """Read the rows of a file, [N, *shape]."""
    try:
        if file.suffix.lower() == ".csv":
            found = _numbers(file, _in_order(file, _lines(file), schema.columns))
        else:
            loaded = np.load(file, allow_pickle=False)
            found = loaded if isinstance(loaded, np.ndarray) else loaded["x"]
    except KeyError as error:
        raise DataError(f"{file}: has no array called x") from error
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise DataError(f"{file}: cannot be read as an array of numbers: {error}") from error
    if found.dtype.kind not in "biuf":
        raise DataError(f"{file}: holds {found.dtype}, but the network takes numbers")
    if found.shape == schema.shape:
        found = found[None]
    if found.shape[1:] != schema.shape:
        raise DataError(
            f"{file}: has rows of shape {list(found.shape[1:])}, but the network takes "
            f"{list(schema.shape)}"
        )
    if schema.pixels and found.dtype.kind in "iu":
        return found  # prediction refuses what is not uint8
    if not np.isfinite(found).all():
        row = int(np.argwhere(~np.isfinite(found))[0][0])
        raise DataError(f"{file}: has a number that is not finite, the first in row {row}")
    if schema.tokens and (odd := found[found % 1 != 0]).size:
        raise DataError(f"{file}: has {odd[0]:g}, but the network takes whole numbers")
    return found.astype(np.int64 if schema.tokens else np.float32)


def _lines(file: Path) -> list[list[str]]:
    """Return the lines of a CSV file, but empty ones.

    Where semicolons separate cells, numbers may have decimal commas, as Excel writes them.
    """
    text = file.read_bytes().decode("utf-8-sig")
    mark = _separator(text.splitlines())
    lines = [line for line in csv.reader(io.StringIO(text, newline=""), delimiter=mark) if line]
    if mark == ";":
        lines = [[_DECIMAL.sub(r"\1.\2", cell) for cell in line] for line in lines]
    return lines


def _separator(lines: Sequence[str]) -> str:
    """Return what separates cells: the last line has as many of them as the first.

    Columns' names, in the first line, may have commas and semicolons of their own, and numbers, in
    the last, decimal commas.
    """
    first, last = next(iter(lines), ""), next((line for line in reversed(lines) if line), "")
    for mark in (";", "\t", ","):
        cells = [len(row) for row in csv.reader([first, last], delimiter=mark)]
        if mark in last and len({*cells}) == 1:
            return mark
    return delimiter_of(last)


def _in_order(
    file: Path, lines: Sequence[Sequence[str]], columns: Sequence[str]
) -> list[Sequence[str]]:
    """Return the rows of a table; of named columns only ``columns``, in their order.

    Args:
        columns: the names of those wanted; empty: all are taken as they stand.

    Raises:
        DataError: a column is missing or there twice, or a row has another length.
    """
    there = [name.strip() for name in lines[0]] if lines else []
    if not lines or (is_number(there[0]) and not (columns and set(columns) <= set(there))):
        return list(lines)
    rows = list(lines[1:])
    if not columns:
        return rows
    places = column_places(str(file), there, columns)
    for number, row in enumerate(rows):
        if len(row) != len(there):
            raise DataError(
                f"{file}: row {number} has {len(row)} cells, but there are {len(there)} columns"
            )
    return [[row[place] for place in places] for row in rows]


def _numbers(file: Path, lines: Sequence[Sequence[str]]) -> np.ndarray:
    """Return a table's cells as numbers.

    Raises:
        DataError: a cell is no number.
        ValueError: the rows differ in length.
    """
    try:
        return np.array(lines, dtype=np.float64)
    except ValueError as error:
        for row, line in enumerate(lines):
            if others := [cell for cell in line if not is_number(cell)]:
                said = f"{file}: row {row} has {others[0]!r}, which is not a number"
                raise DataError(said) from error
        raise
