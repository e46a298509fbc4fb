"""Weights as messages carry them: to everybody else they are Flower's own arrays."""

from __future__ import annotations

import pickle

import flwr.app
import numpy as np
import pytest
import torch

from pfedgpa_app.messages import Array, bytes_of, record_of

TENSORS = {
    "matrix": torch.arange(6.0).view(2, 3),
    "half": torch.ones(5, dtype=torch.float16),
    "whole": torch.arange(7),
    "mask": torch.tensor([True, False]),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 3),
    "transposed": torch.arange(6.0).view(2, 3).T,
    "channels last": torch.rand(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("name", TENSORS)
def test_they_are_flowers(name: str) -> None:
    tensor = TENSORS[name]
    mine, theirs = Array(tensor), flwr.app.Array(tensor.contiguous())
    assert bytes_of(mine) == len(theirs.data)  # before there are any
    assert np.array_equal(mine.numpy(), theirs.numpy())
    assert (mine.dtype, mine.shape, mine.stype) == (theirs.dtype, theirs.shape, theirs.stype)
    assert mine.data == theirs.data
    assert bytes_of(mine) == len(theirs.data)


def test_they_go_over_a_network_and_to_another_process() -> None:
    mine = Array(TENSORS["matrix"])
    there = flwr.app.Array.inflate(mine.deflate(), mine.children)
    assert type(there) is flwr.app.Array
    assert np.array_equal(there.numpy(), TENSORS["matrix"])
    again = pickle.loads(pickle.dumps(Array(TENSORS["matrix"])))
    assert np.array_equal(again.numpy(), TENSORS["matrix"])


def test_a_reader_has_a_copy_and_replaced_bytes_count() -> None:
    record = record_of({"w": TENSORS["matrix"].clone()})
    record["w"].numpy()[:] = 7
    assert torch.equal(record.to_torch_state_dict()["w"], TENSORS["matrix"])
    record["w"].data = flwr.app.Array(torch.ones(2, 3)).data
    assert torch.equal(record.to_torch_state_dict()["w"], torch.ones(2, 3))
