"""Files: written whole or not at all, and our safetensors, which hold nothing that runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to in the place of ``path``, which is replaced whole or not at all."""
    new = path.with_name(path.name + ".new")
    yield new
    with new.open("rb+") as written:
        os.fsync(written.fileno())
    new.replace(path)


def read_tensors(path: Path, file_format: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file of ours.

    Raises:
        ValueError: no such file, or another format.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot be read: {error}") from error
    if metadata.get("format") != file_format:
        raise ValueError(f"format {metadata.get('format')!r}, not {file_format}")
    return tensors, metadata
