"""Clustered federated learning."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.base import Method
from pfedgpa_app.methods.cfl import ClusteredFL, bipartition
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    linear,
    near,
    server,
    train,
)


@by_hand
class TestOneStepByHand:
    def test_cfl(self) -> None:
        uploaded, kept, _ = train("cfl", linear())
        assert near(uploaded["1.weight"], 0.5, -0.5)
        assert not kept


class TestClusters:
    @given(st.integers(0, 100), st.sampled_from(["complete", "single", "average"]))
    def test_two_directions_are_told_apart(self, seed: int, linkage: str) -> None:
        draws = torch.Generator().manual_seed(seed)
        side = torch.tensor([0, 1, 1, 0, 0, 1])
        updates = torch.randn(2, 20, generator=draws)[side]
        updates = updates + 0.05 * torch.randn(6, 20, generator=draws)
        found = bipartition(updates * torch.rand(6, 1, generator=draws).add(0.5), linkage)
        assert torch.equal(found, side) or torch.equal(found, 1 - side)

    @staticmethod
    def _round(method: Method[Any], number: int, moves: dict[int, tuple[float, float]]) -> None:
        uploads = {}
        for client, (a, b) in moves.items():
            upload = {n: t.clone() for n, t in method.download(client).items()}
            upload["2.weight"] += column(a, b)
            uploads[client] = Upload(upload, 1)
        method.aggregate(number, uploads)

    def test_splits_when_settled_and_all_are_known(self) -> None:
        method = server("cfl", clients=4, **{"cfl.first-round": 2})
        apart = {0: (2.0, 0.0), 1: (-2.0, 0.1), 2: (2.0, 0.1), 3: (-2.0, 0.0)}
        self._round(method, 1, apart)
        assert len(method.state) == 1  # too early
        method = server("cfl", clients=4, **{"cfl.first-round": 2})
        self._round(method, 2, {i: apart[i] for i in range(3)})
        assert len(method.state) == 1  # client 3 is not known
        self._round(method, 3, {3: apart[3]})
        assert sorted(c.members for c in method.state) == [[0, 2], [1, 3]]
        # from now on, each its own mean
        self._round(method, 4, apart)
        assert near(method.download(0)["2.weight"] - method.download(2)["2.weight"], 0, 0)
        assert (method.download(0)["2.weight"] - method.download(1)["2.weight"])[0] > 3

    def test_what_normalisation_layers_have_seen_is_no_step(self) -> None:
        config = configured(method="cfl", num_clients=4, **{"cfl.first-round": 1})
        initial = {"2.weight": column(0.0, 0.0), "norm.running_mean": torch.zeros(3)}
        method = ClusteredFL(config, ClusteredFL.begin(config, initial))
        uploads = {}
        for client in range(4):
            sign = (-1.0) ** client
            moved = {"2.weight": column(2 * sign, 0.0), "norm.running_mean": torch.full((3,), 9.0)}
            uploads[client] = Upload(moved, 1)
        method.aggregate(1, uploads)
        assert sorted(c.members for c in method.state) == [[0, 2], [1, 3]]

    def test_stays_while_all_agree(self) -> None:
        method = server("cfl", clients=4, **{"cfl.first-round": 1})
        self._round(method, 1, dict.fromkeys(range(4), (2.0, 0.0)))  # the mean still moves
        self._round(method, 2, {i: (0.1 * (-1) ** i, 0.0) for i in range(4)})  # nobody pulls
        assert len(method.state) == 1
