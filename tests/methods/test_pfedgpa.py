"""pFedGPA: the server's half; what it learns is in tests/diffusion/."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import own_statistics
from pfedgpa_app.diffusion.distribution import likeness_of
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.pfedgpa import PFedGPA, _best
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training.evaluation import TEMPERATURES
from tests.support.by_hand import (
    column,
    configured,
    deep,
    server,
)

MEAN, GENERATED, OWN = range(3)


@pytest.mark.parametrize(
    ("made", "own"),
    [
        (["a.weight", "b.weight", "head.weight"], ["in", "a", "b"]),
        (["head.weight"], []),
        (["b.weight", "head.weight"], []),
        (["a.weight", "head.weight"], ["b"]),
    ],
)
def test_whose_statistics_are_a_clients_own(made: list[str], own: list[str]) -> None:
    """A layer's see what is below it, not its own weights."""
    names = ["in.running_mean", "a.weight", "a.running_mean", "b.weight", "b.running_mean"]
    names += ["head.weight"]
    assert [name.partition(".")[0] for name in own_statistics(names, made)] == own


def led_to(momentum: list[float], steps: Tensor) -> list[float]:
    """Where steps [rounds, 3], each with the momentum of its round, lead from 0."""
    weights, velocity = torch.zeros(3), torch.zeros(3)
    for beta, step in zip(momentum, steps, strict=True):
        velocity = step + beta * velocity
        weights += velocity
    found: list[float] = weights.tolist()
    return found


class TestServers:
    def test_rounds_that_end_with_generation(self) -> None:
        kind = PFedGPA
        config = configured(method="pfedgpa", num_server_rounds=100, **{"pfedgpa.round-rate": 0.2})
        assert kind.first_gentle(config) == 93  # the last 8 of 100
        assert kind.first_generation(config) == 92
        asked = PFedGPA(config, PFedGPA.begin(config, {}))
        assert [asked.rate(r) for r in (1, 92, 93, 100)] == [1, 1, 0.2, 0.2]
        assert server("pfedgpa", num_server_rounds=1).rate(1) == 1  # nothing is learned yet
        method = server("pfedgpa", num_server_rounds=5, **{"pfedgpa.generate-from": 4})
        for number in range(1, 6):
            like = method.expected_upload()
            uploads = {i: {n: t + i + number for n, t in like.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(u, 10) for i, u in uploads.items()})
            assert bool(method.state.generated) == (number >= 3)
        rounds = method.state.buffer.stack()[2]
        assert rounds.tolist() == [4, 4, 5, 5]  # learned from these alone

    @pytest.mark.parametrize(("rounds", "chosen"), [(6, 4), (24, 20)])
    def test_the_rank_is_chosen_once_and_soon(self, rounds: int, chosen: int) -> None:
        # clients of two groups; then, with images known by heart or on from generated weights, of
        # four
        draws = torch.Generator().manual_seed(0)
        config = configured(
            method="pfedgpa",
            num_clients=8,
            num_server_rounds=rounds,
            # what is learned is no part
            **{"pfedgpa.generate-from": rounds - 1, "pfedgpa.fit-steps": 20},
        )
        like = {"body.weight": column(0), "head.weight": torch.zeros(20, 10)}
        method = PFedGPA(config, PFedGPA.begin(config, like))
        two, four = (torch.randn(n, 20, 10, generator=draws) for n in (2, 4))
        for number in range(1, rounds + 1):
            uploads = {}
            for client in range(8):
                noise = 0.1 * torch.randn(20, 10, generator=draws)
                mine = two[client % 2] if number <= chosen else four[client % 4]
                uploads[client] = Upload(like | {"head.weight": mine + noise}, 1)
            method.aggregate(number, uploads)
            known = method.state.likeness
            assert (known and known.rank) == (None if number < chosen else 2)
        learned = method.learned()
        assert learned is not None
        assert learned.rank == 2
        now = likeness_of(method.state.buffer, "shrinkage", 0)  # by what clients are now
        assert now.rank == 3

    @pytest.mark.parametrize("present", [[0], [0, 1], [2, 3]])
    def test_clients_that_are_absent_keep_what_is_theirs(self, present: list[int]) -> None:
        """Six clients in three groups, of which gentle rounds see ``present`` ones only."""
        draws = torch.Generator().manual_seed(0)
        config = configured(
            method="pfedgpa",
            num_clients=6,
            num_server_rounds=12,
            **{"pfedgpa.generate-from": 10, "pfedgpa.fit-steps": 20, "pfedgpa.momentum": 0.0},
        )
        like = {"body.weight": column(0), "head.weight": torch.zeros(20, 10)}
        method = PFedGPA(config, PFedGPA.begin(config, like))
        centres = torch.randn(3, 20, 10, generator=draws)
        for number in range(1, 13):
            uploads = {}
            for client in range(6) if number < 10 else present:
                start, goal = method.download(client)["head.weight"], centres[client // 2]
                step = 0.9 if number < 10 else 0.1
                noise = 0.1 * torch.randn(20, 10, generator=draws)
                mine = start + step * (goal - start) + noise
                uploads[client] = Upload(like | {"head.weight": mine}, 1)
            method.aggregate(number, uploads)
            for client, weights in method.state.generated.items():
                distances = (centres - weights["head.weight"]).flatten(1).norm(dim=1)
                assert int(distances.argmin()) == client // 2
                assert distances.min() < 0.35 * distances.sort().values[1]
        held = [(e.server_round, e.client) for e in method.state.buffer.entries()]
        gentle = [(number, client) for number in (10, 11, 12) for client in present]
        assert held == [(9, c) for c in range(6) if c not in present] + gentle
        # what stands in for those that are absent is no upload of theirs
        sent = {client: method.reference(client) for client in range(6)}
        assert {client for client, weights in sent.items() if weights} == set(present)
        for client in present:
            last = uploads[client].weights["head.weight"]
            assert torch.equal((sent[client] or {})["head.weight"], last)

    @pytest.mark.parametrize("best", [MEAN, GENERATED, OWN])
    def test_clients_choose_by_their_validation_losses(self, best: int) -> None:
        # four clients in two groups, at 1 and 5, each with something of its own
        theirs = torch.tensor([1.0, 1.2, 5.0, 5.2])
        losses = [[2.0] * len(TEMPERATURES) for _ in range(3)]
        losses[best] = [1.0] * len(TEMPERATURES)
        settings = {
            "pfedgpa.generate-from": 4,
            "pfedgpa.fit-steps": 20,
            "pfedgpa.rank-rule": "shrinkage",
            "pfedgpa.momentum": 0.5,
        }
        config = configured(method="pfedgpa", num_clients=4, num_server_rounds=6, **settings)
        initial = weights_of(deep(0, 0, 0)) | {"norm.running_mean": torch.zeros(1)}
        method = PFedGPA(config, PFedGPA.begin(config, initial))
        like = method.expected_upload()
        for number in range(1, 7):
            assert (method.rival(0) is not None) == (number == 4)
            told = [losses[MEAN]] if number < 4 else losses[GENERATED:] if number == 4 else []
            sent = {c: method.download(c) for c in range(4)}
            if number < 4:
                uploads = {c: {n: t + theirs[c] for n, t in like.items()} for c in range(4)}
            else:
                uploads = {c: {n: t + 0.01 for n, t in sent[c].items()} for c in range(4)}
            seen = {c: {"norm.running_mean": torch.tensor([float(c)])} for c in range(4)}
            every = {c: Upload(u | seen[c], 1 + c, [], told) for c, u in uploads.items()}
            method.aggregate(number, every)
        assert method.state.chosen == ("mean", "generated", "own")[best]
        made = [float(method.personalise()[c]["2.weight"][0, 0]) for c in range(4)]
        assert [method.rate(number) for number in (3, 4, 5)] == (
            [1, 1, 1] if best == MEAN else [1, 0.1, 0.1]
        )
        if best == MEAN:  # the other rounds go on as FedAvgM's: 1, 2 and 3, then 5 and 6
            weights, velocity = 0.0, 0.0
            for mean in (*[float((theirs * torch.arange(1, 5)).sum() / 10)] * 3, None, None):
                velocity = 0.5 * velocity + (0.01 if mean is None else mean - weights)
                weights += velocity
            assert made == pytest.approx([weights] * 4)
            # what the mean's normalisation layers have seen belongs to its weights: (0·1 … 3·4)/10
            assert all(float(method.personalise()[c]["norm.running_mean"]) == 2 for c in range(4))
            assert method.join({2: every[2]}) == {2: method.state.global_weights}
        else:
            shared = made[1] - made[0], made[3] - made[2]
            assert made[2] - made[1] > 3
            assert all(0.15 < gap < 0.25 for gap in shared) == (best == OWN)
            own = [float(method.personalise()[c]["norm.running_mean"]) for c in range(4)]
            assert own == [0, 1, 2, 3]
            joined = method.join({7: every[2]})
            assert (joined[7] is every[2].weights) == (best == OWN)  # its own, as all have theirs

    def test_what_clients_learn_is_measured_from_what_they_were_sent(self) -> None:
        """Also by one whose first upload is of a gentle round: it was sent the mean."""
        how: dict[str, Any] = {"pfedgpa.generate-from": 4, "pfedgpa.rank": 1, "num_clients": 6}
        config = configured(method="pfedgpa", num_server_rounds=6, **how)
        method = PFedGPA(config, PFedGPA.begin(config, {"fc.weight": torch.zeros(4, 10)}))

        def moved(client: int, by: float) -> Upload:
            return Upload({n: t + by for n, t in method.download(client).items()}, 10)

        for number in (1, 2, 3):
            method.aggregate(number, {c: moved(c, 1 + 0.5 * (c % 2) + 0.1 * c) for c in range(4)})
        made = [each["fc.weight"].flatten() for each in method.state.generated.values()]
        method.aggregate(4, {client: moved(client, 0.01) for client in (0, 4)})
        learned = method.state.buffer.means[4] - torch.stack(made).mean(0)
        assert (learned - 0.01).abs().max() < 1e-5

    @pytest.mark.parametrize("strength", ["auto", 900])
    def test_clients_own_weights_are_their_own_at_any_strength(self, strength: Any) -> None:
        how: dict[str, Any] = {"pfedgpa.strength": strength, "num_clients": 8}
        config = configured(method="pfedgpa", **how)
        method = PFedGPA(config, PFedGPA.begin(config, {"fc.weight": torch.zeros(4, 10)}))
        draws = torch.Generator().manual_seed(0)
        own = 3 * torch.randn(8, 4, 10, generator=draws)
        for number in range(1, 6):
            for client, weights in enumerate(own + 0.3 * torch.randn(own.shape, generator=draws)):
                method.state.buffer.add(number, client, {"fc.weight": weights})
        method.state.chosen = "own"
        made = torch.stack([method._generated()[client]["fc.weight"] for client in range(8)])
        assert (made - own).norm() < 0.2 * (made - own.mean(0)).norm()

    def test_who_joins_has_but_begun_until_it_is_sent_something(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        method = server("pfedgpa", num_server_rounds=1, **{"pfedgpa.fit-steps": 20})
        like = method.expected_upload()
        every = {c: Upload({n: t + c for n, t in like.items()}, 10) for c in range(6)}
        method.aggregate(1, {c: every[c] for c in range(4)})
        made = METHODS["pfedgpa-once"](method.config, method.state)
        begun: list[set[int]] = []

        def place(given: dict[int, Any], *_: Any, **how: Any) -> dict[int, Any]:
            begun.append(set(how["begun"]))
            return given

        monkeypatch.setattr(made.learned(), "place", place)
        for clients in ([4], [4, 5], [4, 5]):
            made.join({client: every[client] for client in clients})
        assert begun == [{4}, {5}, set()]

    @pytest.mark.parametrize(
        ("losses", "momentum"),
        [
            # of the rounds 6/8 and 5/8 are left: 0.7 of what is of the loss, where that is 0.1 more
            ([4.0, 3.5, 3.0], [0.7, 0.7 * 0.875, 0.7 * 0.75]),
            ([4.0, 3.2, 2.7], [0.7, 0.7 * 0.8 / 2, 0.7 * 0.675 / 2]),  # half where 0.05
            ([4.0, 3.0, 1.0], [0.7, 0.0, 0.0]),
            ([1.0, 9.0, math.nan], [0.7, 0.7, 0.0]),  # never more, and none where nobody tells
            ([math.nan, 2.0, 1.8], [0.0, 0.7, 0.7 * 0.9]),
            ([0.0, 0.0, 1.0], [0.0, 0.0, 0.0]),
            ([2.0, -1.0, 1.8], [0.7, 0.0, 0.7 * 0.9]),  # a loss of somebody's own
        ],
    )
    def test_momentum_is_for_a_loss_that_falls_later_than_the_rounds_pass(
        self, losses: list[float], momentum: list[float]
    ) -> None:
        steps = torch.eye(3)  # no round points where another one did
        assert self.moved(losses, steps) == pytest.approx(led_to(momentum, steps), abs=1e-6)

    @pytest.mark.parametrize(
        ("losses", "momentum"),
        [
            ([4.0, 4.0, 4.0], [0.7, 0.9, 0.9]),  # no loss falls: all that there is
            ([4.0, 3.2, 2.7], [0.7, 0.9 / 2, 0.9 / 2]),  # half of it where the loss is 0.05 behind
            ([4.0, 3.0, 1.0], [0.7, 0.0, 0.0]),  # none where it is not
            ([math.nan, math.nan, math.nan], [0.0, 0.0, 0.0]),  # nobody tells
        ],
    )
    def test_momentum_is_more_where_rounds_point_the_same_way(
        self, losses: list[float], momentum: list[float]
    ) -> None:
        steps = torch.eye(3)[[0, 0, 0]]
        assert self.moved(losses, steps) == pytest.approx(led_to(momentum, steps), abs=1e-6)
        turning = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.75**0.5, 0.0]])  # by 60°
        by_loss = {4.0: 0.7, 3.2: 0.7 * 0.8 / 2}  # of the second
        left = [momentum[0], by_loss.get(losses[1], 0.0)]
        found = self.moved(losses[:2], turning)
        assert found == pytest.approx(led_to(left, turning), abs=1e-6)

    def test_where_all_train_from_the_mean_to_the_end_it_ends_with_the_loss(self) -> None:
        assert self.momentum(9, [4.0, 0.0, 2.0, 4.0]) == pytest.approx([0.7, 0, 0.35, 0.7])

    def test_where_few_take_part_momentum_is_of_as_many_rounds_as_hear_everyone(self) -> None:
        for share, momentum in ((0.5, 0.5), (0.4, 0.6), (0.1, 0.7)):  # never more than 0.7
            losses = [1.0, 0.0, math.nan]  # whatever is left, and whoever tells
            found = self.momentum(1, losses, fraction_train=share)
            assert found[1:] == pytest.approx([momentum, momentum])
            assert found[0] == pytest.approx(0.7)  # and more where the loss is late

    def momentum(self, number: int, losses: list[float], **settings: Any) -> list[float]:
        """Of round ``number``, of 9, by each of these losses in turn."""
        method: Any = server("pfedgpa", clients=10, num_server_rounds=9, **settings)
        told = [{0: Upload({}, 1, loss=loss)} for loss in losses]
        return [method._momentum(number, each, cosine=0.0) for each in told]

    def test_momentum_is_less_where_rounds_turn_a_little(self) -> None:
        """Cosines of 0.5 and 0.75 are none and all of 0.9; 0.85 of the loss is left, 0.1 behind."""
        steps = torch.tensor([[1.0, 0.0, 0.0], [0.7, (1 - 0.7**2) ** 0.5, 0.0]])
        found = self.moved([4.0, 3.4], steps)
        assert found == pytest.approx(led_to([0.7, 0.9 * 0.8], steps), abs=1e-6)

    def moved(self, losses: list[float], steps: Tensor) -> list[float]:
        """Where clients' steps [rounds, 3] and momentum take the three weights from 0."""
        method = server("pfedgpa", clients=5, num_server_rounds=9)
        assert not any(t.any() for t in method.expected_upload().values())
        for number, (loss, step) in enumerate(zip(losses, steps, strict=True), start=1):
            # a client or two may tell anything
            told = [loss, loss, loss, math.nan if math.isnan(loss) else 1e9, math.inf]
            before = method.state.global_weights
            parts = {"1.weight": column(*step[:1]), "2.weight": column(*step[1:])}
            sent = {name: before[name] + part for name, part in parts.items()}
            method.aggregate(number, {c: Upload(sent, 1, loss=told[c]) for c in range(5)})
        after = method.state.global_weights
        return [*after["1.weight"].flatten().tolist(), *after["2.weight"].flatten().tolist()]

    def test_a_network_that_is_too_sure_is_not_worse_for_that(self) -> None:
        worse = torch.tensor([1.0, 0.9, 0.8, 0.9, 1.0, 1.1])
        sure = torch.tensor([3.0, 2.0, 1.2, 0.9, 0.7, 0.6])
        losses = torch.stack([worse + 1, worse, sure]).expand(5, 3, 6)
        assert _best(losses) == "own"
        assert _best(losses[:, [1, 0, 0]]) == "mean"
        tie = losses[:, [1, 0, 0]].clone()
        tie[:2, 0] += 3  # three of five are most, and all together are worse off
        assert _best(tie) == "generated"
        hurt = losses.clone()
        hurt[:2, 2] += 1  # two of five are not most
        assert _best(hurt) == "own"
