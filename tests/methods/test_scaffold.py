"""SCAFFOLD: control variates."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.data.images import Images
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.methods.scaffold import CONTROL, Scaffold, effective_steps
from pfedgpa_app.models.networks import weights_of
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    linear,
    near,
    server,
    train,
)
from tests.support.federations import federate, records


@by_hand
class TestOneStepByHand:
    def test_scaffold(self) -> None:
        sent = {"1.weight": column(0, 0), CONTROL + "1.weight": column(0.1, -0.1)}
        sent["counted"] = torch.tensor(0)
        own = {CONTROL + "1.weight": column(0.2, 0)}
        uploaded, kept, _ = train("scaffold", linear(), sent, own)
        # step: g − c_i + c = (−0.5 − 0.2 + 0.1, 0.5 − 0 − 0.1) = (−0.6, 0.4)
        assert near(uploaded["1.weight"], 0.6, -0.4)
        # c_i⁺ = c_i − c + (x − y)/(1·1) = (0.2 − 0.1 − 0.6, 0 + 0.1 + 0.4): the gradient itself
        assert near(kept[CONTROL + "1.weight"], -0.5, 0.5)
        assert near(uploaded[CONTROL + "1.weight"], -0.7, 0.5)

    def test_what_did_not_count_is_taken_back(self) -> None:
        """A control variate that only its client has moved is no part of the server's."""
        sent = {"1.weight": column(0, 0), CONTROL + "1.weight": column(0.1, -0.1)}
        _, first, _ = train("scaffold", linear(), sent | {"counted": torch.tensor(0)}, {})
        assert first["sent"] == 1
        assert near(first[CONTROL + "1.weight"], -0.5, 0.5)  # from 0
        _, lost, _ = train("scaffold", linear(), sent | {"counted": torch.tensor(0)}, first)
        _, known, _ = train("scaffold", linear(), sent | {"counted": torch.tensor(1)}, first)
        assert near(lost["before/1.weight"], 0, 0)
        assert near(known["before/1.weight"], -0.5, 0.5)


class TestUnderBatchNorm:
    @pytest.mark.parametrize(("images", "steps"), [(1, 0), (10, 1), (11, 1), (12, 2)])
    def test_steps_are_those_that_are_made(self, images: int, steps: int) -> None:
        """Of a last batch of one none is; a client that takes none keeps its control variate."""
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 3))
        x = weights_of(model)
        c, c_i = ({CONTROL + n: torch.full_like(t, to) for n, t in x.items()} for to in (0.1, 0.3))
        pixels = torch.randint(0, 256, (images, 1, 1, 2), dtype=torch.uint8)
        held = Images(pixels, torch.zeros(images, dtype=torch.long))
        config = configured(method="scaffold", batch_size=10, learning_rate=0.5)
        data, draws = ClientData(held, held, held), torch.Generator
        none = {"counted": torch.tensor(0)}
        trained = Scaffold.train(ClientTask(config, x | c | none, model, data, 1, draws, c_i))
        moved = x["2.bias"] - trained.upload["2.bias"]
        change = trained.upload[CONTROL + "2.bias"]
        assert near(trained.state[CONTROL + "2.bias"] - change, 0.3, 0.3, 0.3)
        # (x − y)/(Kη) − c
        expected = moved / (steps * 0.5) - 0.1 if steps else torch.zeros(3)
        torch.testing.assert_close(change, expected)
        assert moved.any() == bool(steps)


class TestServers:
    def test_scaffold_counts_all_clients(self) -> None:
        method = server("scaffold", clients=4)
        upload = {n: torch.full_like(t, 4.0) for n, t in method.expected_upload().items()}
        method.aggregate(1, {2: Upload(upload, 10)})
        # c ← 0 + 4·(1 of 4 clients)
        for name, tensor in method.expected_upload().items():
            assert near(tensor, *[1.0 if name.startswith(CONTROL) else 4.0] * tensor.numel())

    def test_clients_are_told_which_of_their_uploads_counted(self) -> None:
        method = server("scaffold", clients=3)
        for server_round, clients in ((1, (0, 1)), (2, (1, 2)), (3, (2,))):
            like = method.expected_upload()
            method.aggregate(server_round, {c: Upload(like, 10) for c in clients})
        assert [int(method.download(c)["counted"]) for c in range(3)] == [1, 2, 3]

    def test_scaffold_counts_those_that_are_there_from_the_start(self) -> None:
        method = server("scaffold", clients=6, join_clients=2)
        upload = {n: torch.full_like(t, 4.0) for n, t in method.expected_upload().items()}
        method.aggregate(1, {2: Upload(upload, 10)})
        assert near(method.download(0)[CONTROL + "1.weight"], 1.0)

    @given(st.integers(1, 30), st.floats(0, 0.95))
    def test_effective_steps(self, steps: int, momentum: float) -> None:
        velocity = moved = 0.0
        for _ in range(steps):  # by a gradient of 1
            velocity = momentum * velocity + 1
            moved += velocity
        assert effective_steps(steps, momentum) == pytest.approx(moved)


class TestMemory:
    def test_training_that_went_to_infinity_is_forgotten(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It costs a round, not the client."""
        train = Scaffold.train
        rounds: list[int] = []

        def diverging(task: ClientTask) -> Trained:
            trained = train(task)
            rounds.append(task.round)
            if rounds.count(2) == 1 and task.round == 2:
                for tensor in (*trained.upload.values(), *trained.state.values()):
                    tensor.fill_(torch.inf)
            return trained

        monkeypatch.setattr(Scaffold, "train", diverging)
        folder, _ = federate(tmp_path, method="scaffold")
        took_part = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
        everything = {(r, c) for r in range(1, 5) for c in range(4)}
        assert everything - took_part == {(2, 0)}
