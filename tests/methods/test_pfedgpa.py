"""pFedGPA: the server's half; what it learns is in tests/diffusion/."""

from __future__ import annotations

import pytest
import torch

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.diffusion.distribution import rank_of
from pfedgpa_app.methods.pfedgpa import PFedGPA
from tests.support.by_hand import (
    column,
    configured,
    server,
)


class TestServers:
    def test_rounds_that_end_with_generation(self) -> None:
        kind, names = PFedGPA, ["1.weight", "2.weight"]
        config = configured(method="pfedgpa", num_server_rounds=100, **{"pfedgpa.round-rate": 0.2})
        assert kind.first_generation(config) == 93  # the last 8 of 100
        rates = [kind.recipes(config, names, r)[0].learning_rate for r in (1, 92, 93, 100)]
        assert rates == pytest.approx([1, 1, 0.2, 0.2])
        method = server("pfedgpa", num_server_rounds=5, **{"pfedgpa.generate-from": 4})
        for number in range(1, 6):
            like = method.expected_upload()
            uploads = {i: {n: t + i + number for n, t in like.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(u, 10) for i, u in uploads.items()})
            assert bool(method.state.generated) == (number >= 4)
        rounds = method.state.buffer.stack()[2]
        assert rounds.tolist() == [4, 4, 5, 5]  # learned from these alone

    def test_the_rank_is_chosen_before_the_first_generation(self) -> None:
        # clients of two groups; then, trained on from generated weights, of four
        draws = torch.Generator().manual_seed(0)
        config = configured(
            method="pfedgpa",
            num_clients=8,
            num_server_rounds=6,
            **{"pfedgpa.generate-from": 5, "pfedgpa.fit-steps": 20},  # what is learned is no part
        )
        like = {"body.weight": column(0), "head.weight": torch.zeros(20, 10)}
        method = PFedGPA(config, PFedGPA.begin(config, like))
        two, four = (torch.randn(n, 20, 10, generator=draws) for n in (2, 4))
        for number in range(1, 7):
            uploads = {}
            for client in range(8):
                noise = 0.1 * torch.randn(20, 10, generator=draws)
                mine = two[client % 2] if number < 5 else four[client % 4]
                uploads[client] = Upload(like | {"head.weight": mine + noise}, 1)
            method.aggregate(number, uploads)
            assert method.state.rank == (None if number < 5 else 2)
        learned = method.learned()
        assert learned is not None
        assert learned.rank == 2
        assert rank_of(method.state.buffer, "shrinkage", 0) == 3  # by what clients are now
