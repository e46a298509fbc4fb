"""Our safetensors files: numbers and JSON, nothing that runs."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


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
