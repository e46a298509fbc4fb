"""Every random number of a run comes from one seed, through a named stream.

A stream is named by what it is for, such as ``("train", round, client)``, so the
order in which clients happen to be served can never change a result.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

Name = str | int


def _entropy(seed: int, names: tuple[Name, ...]) -> np.random.SeedSequence:
    words = [zlib.crc32(name.encode()) if isinstance(name, str) else int(name) for name in names]
    return np.random.SeedSequence([seed, *words])


def numpy_generator(seed: int, *names: Name) -> np.random.Generator:
    """A NumPy generator for the stream ``names`` of the run's ``seed``."""
    return np.random.default_rng(_entropy(seed, names))


def torch_generator(seed: int, *names: Name) -> torch.Generator:
    """A torch generator, on the CPU, for the stream ``names`` of the run's ``seed``."""
    state = _entropy(seed, names).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 31 ^ int(state[1]))


@contextmanager
def seeded(start: int) -> Iterator[None]:
    """Seed torch's, NumPy's and Python's own generators with ``start`` while the block lasts.

    Some code draws from them because it is passed no generator: layers as they are made, dropout,
    and users' code. Afterwards NumPy's, Python's and torch's CPU generators are as they were.
    """
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 (others' code)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        np.random.seed(start % 2**32)  # noqa: NPY002
        random.seed(start)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)  # noqa: NPY002
