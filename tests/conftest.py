"""Shared fixtures."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from pfedgpa_app.engine.flower import POLL_INTERVAL
from pfedgpa_app.engine.ray import Simulation

# else each process that a test starts compiles the package and what it imports
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# while Flower's processes wait, as they mostly do here, they hardly compute
os.environ.setdefault(POLL_INTERVAL, "1")
torch.set_num_threads(1)  # small matrices: more threads only contend
settings.register_profile("untimed", deadline=None)  # how long a test takes is no part of it
settings.load_profile("untimed")


def pytest_configure(config: pytest.Config) -> None:
    """xdist would begin with the group of the most tests; here, with the longest."""
    config.option.loadscopereorder = False


# what takes longest, most of it waiting: begun first, so that the others fill the time that is left
LONGEST = (
    "tests/engine/test_simulation.py::test_so_it_does_on_a_ray_cluster",
    "tests/engine/test_simulation.py",
    "tests/deployment/test_faults.py",
    "tests/deployment/test_networks.py",
    "tests/test_user_path.py",
    "tests/deployment/test_deployment.py",
    "tests/test_wheel.py",
)


def _turn(item: pytest.Item) -> int:
    """The longest first, then what else starts processes, then all others."""
    for place, name in enumerate(LONGEST):
        if "slow" in item.keywords and item.nodeid.startswith(name):
            return place
    return len(LONGEST) + ("slow" not in item.keywords)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort tests by their turn; a group stays together.

    xdist 3.8 writes a group's name where pytest 9.2 no longer reads it.
    """
    items.sort(key=_turn)
    if not getattr(config.option, "loadgroup", False):
        return
    for item in items:
        if mark := item.get_closest_marker("xdist_group"):
            group = f"@{mark.args[0]}"
            if not item.nodeid.endswith(group):
                item._id = item.id.parse(item.nodeid + group)


def _real(name: str) -> Path:
    root = os.environ.get("PFEDGPA_DATA")
    if not root or not (Path(root) / name).is_dir():
        pytest.skip(f"needs real data: set PFEDGPA_DATA to a folder that holds {name}")
    return Path(root)


@pytest.fixture(scope="session")
def fashion_mnist() -> Path:
    """The data folder, with Fashion-MNIST in it."""
    return _real("FashionMNIST")


@pytest.fixture(scope="session")
def emnist() -> Path:
    """The data folder, with EMNIST in it."""
    return _real("EMNIST")


@pytest.fixture(scope="session")
def cifar10_folder() -> Path:
    """The data folder, with CIFAR-10 as images in it."""
    return _real("cifar10")


@pytest.fixture(scope="session")
def simulation() -> Iterator[Simulation]:
    """A SuperLink for the tests of the group "simulation"."""
    with Simulation() as flower:
        flower.wait_until_ready()
        yield flower


@pytest.fixture(autouse=True)
def path_as_it_was() -> Iterator[None]:
    """An app that a test runs in this process may put its folder first."""
    before = list(sys.path)
    yield
    sys.path[:] = before
