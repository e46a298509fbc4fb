"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # small matrices: more threads only contend
settings.register_profile("untimed", deadline=None)  # how long a test takes is no part of it
settings.load_profile("untimed")


def _real(name: str) -> Path:
    root = os.environ.get("PFEDGPA_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs real data: set PFEDGPA_DATA to a folder that holds {name}")
    return Path(root)


@pytest.fixture
def fashion_mnist() -> Path:
    """The data folder, with Fashion-MNIST in it."""
    return _real("FashionMNIST")


@pytest.fixture
def emnist() -> Path:
    """The data folder, with EMNIST in it."""
    return _real("EMNIST")


@pytest.fixture
def cifar10_folder() -> Path:
    """The data folder, with CIFAR-10 as images in it."""
    return _real("cifar10")


@pytest.fixture(autouse=True)
def path_as_it_was() -> Iterator[None]:
    """An app that a test runs in this process may put its folder first."""
    before = list(sys.path)
    yield
    sys.path[:] = before
