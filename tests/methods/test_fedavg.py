"""FedAvg and what leaves its clients' weights whole: local training, FedProx, server momentum."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.data.images import Images
from pfedgpa_app.methods.averaging import toward, with_momentum
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe, pull_to
from tests.support.by_hand import (
    Regression,
    by_hand,
    in_order,
    linear,
    near,
    one_image,
    server,
    train,
)


@by_hand
class TestOneStepByHand:
    def test_fedavg(self) -> None:
        uploaded, kept, loss = train("fedavg", linear())
        # 0 − 1·(0.5 − 1) = 0.5; the loss at (0, 0) is ln 2
        assert near(uploaded["1.weight"], 0.5, -0.5)
        assert not kept
        assert loss == pytest.approx(0.693147, abs=1e-6)

    def test_local(self) -> None:
        uploaded, kept, _ = train("local", linear(), weights={})
        assert uploaded == {}
        assert near(kept["1.weight"], 0.5, -0.5)
        _, kept, _ = train("local", linear(), weights={}, state=kept)
        # from (0.5, −0.5): + (1 − 0.731059)
        assert near(kept["1.weight"], 0.768941, -0.768941)

    def test_fedprox(self) -> None:
        # step 1: (0.5, −0.5), nothing to pull back yet
        # step 2: gradient −0.268941 + 0.5·(0.5 − 0) = −0.018941
        more: dict[str, Any] = {"local_epochs": 2, "fedprox.mu": 0.5}
        uploaded, _, _ = train("fedprox", linear(), **more)
        assert near(uploaded["1.weight"], 0.518941, -0.518941)


@by_hand
class TestGoldenValues:
    """Of other projects' tests, worked out again here."""

    @pytest.mark.parametrize(
        ("batches", "change"),
        # w = 4, gradient w/Σx, rate 1: 4 − 4/12 − 3.666667/30, and 4 − 4/9 − 3.555556/27
        [([[2, 4, 6], [8, 10, 12]], 0.4555554), ([[1, 3, 5], [7, 9, 11]], 0.5761316)],
    )
    def test_fedavg_of_fedjax(self, batches: list[list[int]], change: float) -> None:
        model, (data, draws) = Regression([[4.0]]), in_order(batches)

        def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(model, Regression)
            return model.w.square().sum() / (2 * x.sum())

        training.train(model, data, Recipe(1, 1.0, 3, momentum=0), draws, loss_of)
        assert 4 - model.w.item() == pytest.approx(change, abs=1e-6)

    @pytest.mark.parametrize(
        ("batches", "change"),
        # loss mean(x)·w, μ = 0.01: 4 + (10 − 0.01·4), and 3 + (9 − 0.01·3)
        [([[2, 4, 6], [8, 10, 12]], 13.96), ([[1, 3, 5], [7, 9, 11]], 11.97)],
    )
    def test_fedprox_of_fedjax(self, batches: list[list[int]], change: float) -> None:
        model, (data, draws) = Regression([[4.0]]), in_order(batches)
        held = pull_to(weights_of(model), 0.01)
        training.train(
            model,
            data,
            Recipe(1, 1.0, 3, momentum=0),
            draws,
            lambda model, x, y: model(x).mean(),
            held,
        )
        assert 4 - model.w.item() == pytest.approx(change, abs=1e-5)

    @staticmethod
    def _pfl_research(epochs: int, rate: float, **how: Any) -> tuple[Tensor, float]:
        """w = [[2, 4], [3, 5]]; x = (1, 0), (0, 2); targets (4, 6), (8, 12); Σ|error|/2."""
        model = Regression([[2.0, 4.0], [3.0, 5.0]])
        pixels = torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8).view(2, 1, 1, 2)
        data = Images(pixels, torch.tensor([0, 1]))
        targets = torch.tensor([[4.0, 6.0], [8.0, 12.0]])

        def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            errors: Tensor = model(x) - targets[y]
            return errors.abs().sum() / 2

        recipe, before = Recipe(epochs, rate, 2, momentum=0), weights_of(model)
        if "mu" in how:
            how = {"gradient_hook": pull_to(before, how["mu"])}
        training.train(model, data, recipe, torch.Generator(), loss_of, **how)
        x = pixels.flatten(1).float()
        loss = (x @ model.w - targets).abs().sum() / 2
        return model.w.detach() - before["w"], loss.item()

    @pytest.mark.parametrize(
        ("mu", "change", "loss"), [(0, (0.5, 1), 1.5), (1, (0.375, 0.75), 2.125)]
    )
    def test_fedprox_of_pfl_research(
        self, mu: float, change: tuple[float, float], loss: float
    ) -> None:
        # gradient (−0.5, −1) a row; the second step is held back by μ times the first, (0.25, 0.5)
        moved, left = self._pfl_research(2, 0.5, mu=mu)
        assert near(moved, change[0], change[0], change[1], change[1])
        assert left == pytest.approx(loss, abs=1e-5)

    @pytest.mark.parametrize(
        ("c", "change", "loss"), [(0.0, (0.05, 0.1), 3.75), (0.1, (0.04, 0.09), 3.78)]
    )
    def test_scaffold_of_pfl_research(
        self, c: float, change: tuple[float, float], loss: float
    ) -> None:
        # a step of −0.1·(g + c) with g = (−0.5, −1) a row
        def shifted(_: Any, gradients: Any) -> list[Tensor]:
            return [g + c for g in gradients.values()]

        moved, left = self._pfl_research(1, 0.1, gradient_hook=shifted)
        assert near(moved, change[0], change[0], change[1], change[1])
        assert left == pytest.approx(loss, abs=1e-5)

    def test_the_proximal_minimum(self) -> None:
        # of ½a(θ − m)² + ½λ(θ − w)²: (a·m + λ·w)/(a + λ) = (2·5 + 3·1)/5 = 2.6
        model = Regression([[1.0]])
        training.train(
            model,
            one_image(),
            Recipe(200, 0.1, momentum=0),
            torch.Generator(),
            lambda model, x, y: (model(x) - 5).square().sum(),
            pull_to({"w": torch.tensor([[1.0]])}, 3.0),
        )
        assert model.w.item() == pytest.approx(2.6, abs=1e-5)


class TestServers:
    @pytest.mark.parametrize(
        ("name", "third"),
        # β = 0.5, and every round's mean is 1 above what was sent: from 0 to 1, then
        # m = 1 + 0.5·1 and w = 2.5; in round 3 m = 1 + 0.5·1.5 and w = 4.25. pFedGPA generates
        # from round 3 on, whose clients' mean, 3.5, is taken as it is
        [("fedavgm", 4.25), ("pfedgpa", 3.5)],
    )
    def test_momentum(self, name: str, third: float) -> None:
        own: dict[str, Any] = {f"{name}.momentum": 0.5}
        if name == "pfedgpa":
            own["pfedgpa.generate-from"] = 3
        method = server(name, num_server_rounds=4, **own)
        for number, expected in ((1, 1.0), (2, 2.5), (3, third)):
            sent = method.state.global_weights
            uploads = {i: {n: t + 2 * i for n, t in sent.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(u, 10) for i, u in uploads.items()})
            for tensor in method.state.global_weights.values():
                assert near(tensor, *[expected] * tensor.numel())

    def test_momentum_makes_no_variance_negative(self) -> None:
        """Whatever its name is; a weight that has both signs goes where it goes."""
        before = {"moving_variance": torch.ones(2), "w": torch.tensor([1.0, -1.0])}
        mean = {"moving_variance": torch.tensor([0.2, 0.9]), "w": torch.tensor([0.2, -1.0])}
        after, _ = with_momentum(before, mean, {n: torch.full((2,), -0.6) for n in mean}, 0.9)
        assert near(after["moving_variance"], 0.2, 0.36)  # 1 − 0.8 − 0.54 and 1 − 0.1 − 0.54
        assert near(after["w"], -0.34, -1.54)

    def test_a_step_beyond_the_mean_leaves_statistics_at_it(self) -> None:
        before = {"norm.running_var": torch.ones(1), "w": torch.ones(1)}
        mean = {name: torch.full((1,), 0.2) for name in before}
        for step, statistic, weight in ((0.5, 0.6, 0.6), (1, 0.2, 0.2), (2, 0.2, -0.6)):
            after = toward(before, mean, step)
            assert near(after["norm.running_var"], statistic)
            assert near(after["w"], weight)
