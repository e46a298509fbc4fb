"""Files written whole or not at all, and our safetensors files, which hold no code."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to; that file then replaces ``path``, whole or not at all."""
    new = path.with_name(path.name + ".new")
    try:
        yield new
        sync(new)
        new.replace(path)
    except OSError as error:
        if error.filename in (None, str(new)):  # users do not know the temporary name
            error.filename = str(path)
        raise


def sync(path: Path) -> None:
    """Wait until what was written to ``path`` is on the disk."""
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, replacing the file whole or not at all."""
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write ``value`` to ``path`` by ``as_json``, replacing the file whole or not at all."""
    write_text(path, as_json(value, indent) + "\n")


def as_json(value: Any, indent: int | None = None) -> str:
    """Return ``value`` as JSON text; NaN and infinity, which JSON lacks, become null."""
    return json.dumps(_plain(value), indent=indent, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def checksum(path: Path) -> int:
    """Return the CRC-32 of the file's bytes, which reveals damage."""
    return zlib.crc32(path.read_bytes())


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors, strided ones too, to ``path`` as safetensors, whole or not at all.

    Raises:
        OSError: the file cannot be written.
        KeyError: safetensors does not know a tensor's type.
    """
    apart: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        data = tensor.detach().cpu().contiguous()
        storage = data.untyped_storage().data_ptr()
        apart[name] = data.clone() if storage in storages else data  # no two may share a storage
        storages.add(storage)
    with replacing(path) as new:
        try:
            save_file(apart, new, metadata)
        except SafetensorError as error:  # the system's error number is only in its text
            found = re.search(r"os error (\d+)", str(error))
            number = int(found[1]) if found else errno.EIO
            raise OSError(number, os.strerror(number) if found else str(error)) from error


@contextmanager
def _opened(path: Path, file_format: str) -> Iterator[tuple[Any, dict[str, str]]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != file_format:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {file_format}")
            yield file, metadata
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error


def read_metadata(path: Path, file_format: str) -> dict[str, str]:
    """Return the metadata of one of our files.

    Raises:
        ValueError: there is no such file, it has another format, or it is truncated.
    """
    with _opened(path, file_format) as (_, metadata):
        return metadata


def read_tensors(
    path: Path, file_format: str, below: str = ""
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors whose names begin with ``below``, and the metadata, of one of our files.

    Raises:
        ValueError: there is no such file, it has another format, or it is truncated.
    """
    with _opened(path, file_format) as (file, metadata):
        names = [name for name in file.keys() if name.startswith(below)]  # noqa: SIM118
        return {name: file.get_tensor(name) for name in names}, metadata
