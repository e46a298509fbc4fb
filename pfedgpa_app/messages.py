"""Weights as messages carry them.

Flower keeps a tensor as a file of NumPy's in bytes. Writing and reading one takes 0.3 ms, which is
most of what thirty clients cost a server beside their training, and what never leaves a machine
needs no bytes: here they are made when somebody asks for them, a network for instance.
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
    """Flower's, with a tensor that stays one until its bytes are asked for.

    It bears the name of Flower's class, which goes over the network with it.
    """

    def __init__(self, tensor: Tensor) -> None:
        values = tensor.detach().cpu().contiguous().numpy()
        self.dtype, self.shape, self.stype = str(values.dtype), values.shape, SType.NUMPY
        self.__dict__["_values"] = values

    @functools.cached_property
    def data(self) -> bytes:  # type: ignore[override]
        """As NumPy writes it."""
        file = BytesIO()
        np.save(file, self.__dict__["_values"], allow_pickle=False)
        return file.getvalue()

    def numpy(self) -> np.ndarray:
        """A copy, which is the reader's own."""
        if "data" in self.__dict__:  # and somebody may have replaced it
            return super().numpy()
        values: np.ndarray = self.__dict__["_values"].copy()
        return values


def record_of(weights: Weights) -> ArrayRecord:
    """Weights by name, for a message."""
    record = ArrayRecord()
    for name, tensor in weights.items():
        record[name] = Array(tensor)
    return record


@functools.lru_cache(maxsize=1024)
def _size(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a file of NumPy's."""
    like = np.lib.stride_tricks.as_strided(np.empty(1, dtype), shape, (0,) * len(shape))
    header = BytesIO()
    fields = {"descr": like.dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, fields)
    return header.tell() + like.nbytes


def bytes_of(array: flwr.app.Array) -> int:
    """How many it takes as it travels."""
    if isinstance(array, Array) and "data" not in array.__dict__:
        return _size(array.dtype, array.shape)
    return len(array.data)
