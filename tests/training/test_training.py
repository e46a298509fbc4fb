"""Networks, local SGD and evaluation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from pfedgpa_app.core.randomness import numpy_generator, torch_generator
from pfedgpa_app.data.images import Images
from pfedgpa_app.models import networks as models
from pfedgpa_app.training import evaluation
from pfedgpa_app.training import sgd as training


class TestModels:
    @pytest.mark.parametrize(
        ("name", "classes", "count"),
        [
            ("cifar", 10, 107_690),
            ("fashion", 10, 117_066),
            ("fashion", 62, 123_774),
            ("digits", 10, 5_510),
        ],
    )
    def test_parameter_counts(self, name: str, classes: int, count: int) -> None:
        model = models.build(name, classes, 0)
        assert sum(p.numel() for p in model.parameters()) == count
        shape = next(s for s, n in models.SHAPES.items() if n == name)
        assert model(torch.zeros(2, *shape)).shape == (2, classes)

    def test_last_two_layers_of_the_cifar_network(self) -> None:
        weights = models.weights_of(models.build("cifar", 10, 0))
        assert sum(t.numel() for name, t in weights.items() if name.startswith("fc")) == 75_146

    def test_pooling_first_is_the_same_function(self) -> None:
        block: Any = models.cifar()[0]
        x = torch.randn(2, 3, 32, 32)
        assert torch.equal(block(x), block.pool(block.act(block.conv(x))))

    def test_same_seed_same_weights_and_nothing_else_disturbed(self) -> None:
        torch.manual_seed(1)
        expected = torch.rand(1)
        torch.manual_seed(1)
        one, two, other = (models.weights_of(models.build("digits", 10, s)) for s in (3, 3, 4))
        assert torch.rand(1) == expected
        assert all(torch.equal(one[name], two[name]) for name in one)
        assert not torch.equal(one["fc1.weight"], other["fc1.weight"])


class Plain(Images):
    """Numbers that reach the network as they are."""

    def floats(self) -> torch.Tensor:
        return self.pixels


class TestTraining:
    def test_one_step_by_hand(self) -> None:
        # logits (w·x, 0) with w = 0: p = 1/2, gradient (p − 1)·x = −1/2·3; plus decay 0.1·w = 0
        # step: w = 0 + lr·1.5 = 0.15; then p = σ(0.45) = 0.61064, gradient −(1 − p)·3 + 0.1·w
        # = −1.168 + 0.015 = −1.15308; velocity 0.5·(−1.5) − 1.15308 = −1.90308; w = 0.340308
        model = nn.Linear(1, 2, bias=False)
        with torch.no_grad():
            model.weight.zero_()
        model.weight.register_hook(lambda g: g * torch.tensor([[1.0], [0.0]]))
        data = Plain(torch.tensor([[3.0]]), torch.tensor([0]))
        recipe = training.Recipe(2, 0.1, 1, momentum=0.5, weight_decay=0.1)
        training.train(model, data, recipe, torch.Generator())
        assert model.weight[0].item() == pytest.approx(0.340308, abs=1e-5)
        assert model.weight[1].item() == 0

    def test_every_image_once_an_epoch_and_the_mean_loss(self) -> None:
        seen: list[float] = []

        class Spy(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                seen.extend(x[:, 0].tolist())
                return super().forward(x)

        model = Spy(1, 2)
        data = Plain(torch.arange(7.0)[:, None], torch.zeros(7, dtype=torch.long))
        recipe = training.Recipe(2, 1e-12, 3)
        loss = training.train(model, data, recipe, torch.Generator().manual_seed(0))
        assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
        assert seen[:7] != seen[7:]
        score = evaluation.evaluate(model, data)
        assert loss == pytest.approx(score.loss / 7, rel=1e-4)

    @pytest.mark.parametrize("images", [1, 3, 4, 5])
    def test_the_mean_loss_is_of_what_was_trained_on(self, images: int) -> None:
        """BatchNorm takes no step on a last batch of one, unless it is frozen."""
        norm, head = nn.BatchNorm1d(2), nn.Linear(2, 4)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        model = nn.Sequential(norm, head)
        data = Plain(torch.randn(images, 2), torch.zeros(images, dtype=torch.long))
        recipe = training.Recipe(2, 1e-12, 2)
        draws = torch.Generator()
        assert training.train(model, data, recipe, draws) == pytest.approx(
            math.log(4) if images > 1 else math.nan, nan_ok=True
        )
        norm.requires_grad_(False)
        assert training.train(model, data, recipe, draws) == pytest.approx(math.log(4))

    def test_crop_and_flip_are_shifts_and_mirrors(self) -> None:
        image = torch.arange(1.0, 1 + 3 * 32 * 32).view(1, 3, 32, 32)
        crops = training.draw_crops(200, torch.Generator())
        out = training.crop_and_flip(image.expand(200, -1, -1, -1), crops)
        padded = nn.functional.pad(image, (4, 4, 4, 4))[0]
        allowed = set()
        for top in range(9):
            for left in range(9):
                crop = padded[:, top : top + 32, left : left + 32]
                allowed |= {crop.numpy().tobytes(), crop.flip(2).contiguous().numpy().tobytes()}
        drawn = {o.contiguous().numpy().tobytes() for o in out}
        assert drawn <= allowed
        assert len(drawn) > 80

    @pytest.mark.parametrize("affine", [True, False])
    def test_what_stands_still_sees_nothing(self, affine: bool) -> None:
        """A normalisation layer below what is trained, whether it has weights or none."""
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(4, affine=affine)
        seen = norm.get_buffer("running_mean")
        model = nn.Sequential(nn.Flatten(), norm, nn.Linear(4, 3))
        pixels = torch.randint(0, 256, (20, 1, 2, 2), dtype=torch.uint8)
        data = Images(pixels, torch.arange(20) % 3)
        names = ["1.running_mean", "1.running_var", *(["1.weight", "1.bias"] if affine else [])]
        cases = {("2.weight",): False, (*names, "2.weight"): True, None: True}
        for trainable, moves in cases.items():
            before = seen.clone()
            recipe = training.Recipe(1, 0.01, 10, trainable=trainable)
            training.train(model, data, recipe, torch.Generator().manual_seed(0))
            assert torch.equal(before, seen) != moves

    def test_evaluation_counts(self) -> None:
        model = nn.Identity()
        model.register_parameter("unused", nn.Parameter(torch.zeros(1)))
        logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]])
        score = evaluation.evaluate(model, Plain(logits, torch.tensor([0, 1, 1])))
        assert (score.correct, score.images) == (2, 3)

    def test_a_network_may_change_what_it_is_given(self) -> None:
        rows = torch.tensor([[-3.0, -2.0], [1.0, 2.0]])
        network = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(2, 2))
        evaluation.evaluate(network, Images(rows, torch.tensor([0, 1])))
        assert rows.tolist() == [[-3.0, -2.0], [1.0, 2.0]]

    def test_a_temperature_undoes_how_sure_a_network_is(self) -> None:
        images = Images(torch.rand(20, 1, 8, 8), torch.arange(20) % 10)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        losses = evaluation.tempered_losses(model, images)
        at = evaluation.TEMPERATURES.index
        assert losses[at(1.0)] == pytest.approx(evaluation.evaluate(model, images).loss / 20)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
        assert evaluation.tempered_losses(model, images)[at(3.0)] == pytest.approx(losses[at(1.5)])


def test_streams_are_named_and_independent() -> None:
    draws = {
        torch.rand(1, generator=torch_generator(0, *name)).item()
        for name in (("train", 1, 2), ("train", 2, 1), ("train", 1), ("evaluate", 1, 2))
    }
    assert len(draws) == 4
    same = [torch.rand(1, generator=torch_generator(7, "a", 1)).item() for _ in range(2)]
    assert same[0] == same[1]
    assert numpy_generator(7, "a").random() != numpy_generator(8, "a").random()
