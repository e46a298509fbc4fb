"""Files are written whole or not at all, and what cannot be written is the system's error."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pfedgpa_app.core import files
from pfedgpa_app.core.files import write_tensors


@contextmanager
def no_file_larger_than(size: int) -> Iterator[None]:
    """As on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


class TestWriteTensors:
    def test_what_is_there_stays_where_there_is_no_room(self, tmp_path: Path) -> None:
        path = tmp_path / "weights.safetensors"
        write_tensors(path, {"w": torch.ones(3)})
        with no_file_larger_than(4096), pytest.raises(OSError) as raised:
            write_tensors(path, {"w": torch.zeros(10_000)})
        assert raised.value.errno == errno.EFBIG
        assert raised.value.strerror == os.strerror(errno.EFBIG)
        assert raised.value.filename == str(path)
        assert load_file(path)["w"].tolist() == [1, 1, 1]

    def test_is_on_the_disk_before_it_takes_the_place(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "weights.safetensors"
        synced: list[tuple[str, bool]] = []
        monkeypatch.setattr(files, "sync", lambda new: synced.append((new.name, path.exists())))
        write_tensors(path, {"w": torch.ones(3)})
        assert synced == [("weights.safetensors.new", False)]
        assert [each.name for each in tmp_path.iterdir()] == ["weights.safetensors"]
