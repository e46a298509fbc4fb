"""Weights as messages carry them.

Flower keeps a tensor as the bytes of a NumPy file. Writing and reading one takes 0.3 ms, which is
most of what thirty clients cost a server beside their training. Weights that never leave a machine
need no bytes, so here bytes are made only when they are asked for, as by a network.
"""

from __future__ import annotations

import functools
from io import BytesIO

import flwr.app
import numpy as np
from flwr.app import ArrayRecord
from flwr.common.constant import SType
from torch import Tensor

from pfedgpa_app.core.weights import Weights


class Array(flwr.app.Array):
    """Flower's array, with a tensor that becomes bytes only when these are asked for.

    It has the name of Flower's class, because that name is sent with it.
    """

    def __init__(self, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().numpy()
        self.dtype, self.shape, self.stype = str(values.dtype), values.shape, SType.NUMPY
        self.__dict__["_values"] = values

    @functools.cached_property
    def data(self) -> bytes:  # type: ignore[override]
        """The tensor as the bytes of a NumPy file."""
        file = BytesIO()
        np.save(file, self.__dict__["_values"], allow_pickle=False)
        return file.getvalue()

    def numpy(self) -> np.ndarray:
        """Return a copy, which the reader may change."""
        if "data" in self.__dict__:  # and it may have been replaced
            return super().numpy()
        values: np.ndarray = self.__dict__["_values"].copy()
        return values


def record_of(weights: Weights) -> ArrayRecord:
    """Return weights, by name, as a record for a message."""
    record = ArrayRecord()
    for name, tensor in weights.items():
        record[name] = Array(tensor)
    return record


@functools.lru_cache(maxsize=1024)
def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Return how many bytes a NumPy file of such an array takes."""
    like = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, (0,) * len(shape))
    header = BytesIO()
    fields = {"descr": like.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.tell() + like.nbytes


def bytes_of(array: flwr.app.Array) -> int:
    """Return how many bytes ``array`` takes when it is sent."""
    if isinstance(array, Array) and "data" not in array.__dict__:
        return _size(array.dtype, array.shape)
    return len(array.data)
