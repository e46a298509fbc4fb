"""Methods whose clients keep a part of the network: FedPer, FedRep, LG-FedAvg, FedBABU, FedALA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from pfedgpa_app.core.weights import last_layers, layers
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.data.images import Images
from pfedgpa_app.methods.base import ClientTask
from pfedgpa_app.methods.fedala import FedALA
from pfedgpa_app.methods.fedbabu import FedBABU
from pfedgpa_app.methods.fedrep import FedRep
from pfedgpa_app.models.networks import build, weights_of
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    deep,
    linear,
    near,
    train,
)


@by_hand
class TestOneStepByHand:
    def test_fedper(self) -> None:
        sent = {"1.weight": column(1)}
        uploaded, kept, _ = train("fedper", deep(1, 0, 0), sent, local_epochs=2)
        # step 1: head (0.5, −0.5); the body's gradient goes through a head of 0
        # step 2: head + 0.268941·u = 0.768941; body: 1 + 0.268941·(0.5 + 0.5)
        assert list(uploaded) == ["1.weight"]
        assert near(uploaded["1.weight"], 1.268941)
        assert list(kept) == ["2.weight"]
        assert near(kept["2.weight"], 0.768941, -0.768941)

    def test_fedrep(self) -> None:
        phases: dict[str, Any] = {"fedrep.head-epochs": 1, "fedrep.body-epochs": 1}
        uploaded, kept, _ = train("fedrep", deep(1, 0, 0), {"1.weight": column(1)}, **phases)
        # head first: (0.5, −0.5); then the body alone: 1 + 0.268941
        assert near(uploaded["1.weight"], 1.268941)
        assert near(kept["2.weight"], 0.5, -0.5)

    def test_lg_fedavg(self) -> None:
        sent, own = {"2.weight": column(0.5, -0.5)}, {"1.weight": column(2)}
        uploaded, kept, _ = train("lg-fedavg", deep(1, 0, 0), sent, own)
        # logits (1, −1), p = 0.880797: head 0.5 + 0.119203·2, body 2 + 0.119203·(0.5 + 0.5)
        assert near(uploaded["2.weight"], 0.738406, -0.738406)
        assert near(kept["1.weight"], 2.119203)

    def test_fedbabu(self) -> None:
        uploaded, kept, _ = train("fedbabu", deep(1, 1, -1), {"1.weight": column(1)})
        # p = 0.880797; the body: 1 + 0.119203·(1 + 1)
        assert near(uploaded["1.weight"], 1.238406)
        assert list(uploaded) == ["1.weight"]
        assert not kept

    def test_fedala(self) -> None:
        own = {"1.weight": column(0, 0), "share/1.weight": column(1, 1)}
        sent = {"1.weight": column(1, -1)}
        uploaded, kept, _ = train("fedala", linear(), sent, own, label=1)
        # Θ̂ = (1, −1) is wrong for label 1: gradient (0.880797, −0.880797), change (1, −1),
        # so both shares fall to 1 − 0.880797 and Θ̂ = (0.119203, −0.119203)
        assert near(kept["share/1.weight"], 0.119203, 0.119203)
        # one step from there: p = 1/(1 + e^−0.238406) = 0.559321
        assert near(uploaded["1.weight"], 0.119203 - 0.559321, 0.559321 - 0.119203)
        assert near(kept["1.weight"], 0.119203 - 0.559321, 0.559321 - 0.119203)


class TestUnderBatchNorm:
    @pytest.mark.parametrize("images", [1, 20])
    def test_fedala_learns_shares_on_two_images_at_least(self, images: int) -> None:
        """A share of 0.05 is one of 20; a client of one learns nothing."""
        model = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(2), nn.Linear(2, 3))
        weights = weights_of(model)
        kept = {name: weights[name] + 1 for name in ("2.weight", "2.bias")}
        pixels = torch.randint(0, 256, (images, 1, 1, 2), dtype=torch.uint8)
        held = Images(pixels, torch.zeros(images, dtype=torch.long))
        config = configured(method="fedala", batch_size=10, **{"fedala.data-share": 0.05})
        data, draws = ClientData(held, held, held), torch.Generator
        trained = FedALA.train(ClientTask(config, weights, model, data, 2, draws, kept))
        assert bool((trained.state["share/2.bias"] < 1).any()) == (images > 1)


class TestNothingFrozenMoves:
    """With momentum and decay on: a gradient set to zero would still let weights drift."""

    @pytest.mark.parametrize("part", ["head", "body"])
    def test_only_what_a_recipe_names(self, part: str) -> None:
        model = build("digits", 10, 0)
        before, head = weights_of(model), last_layers(model.state_dict(), 1)
        names = [n for n in before if (n in head) == (part == "head")]
        data = Images(
            torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8), torch.randint(0, 10, (60,))
        )
        recipe = Recipe(2, 0.1, 20, momentum=0.9, weight_decay=0.01, trainable=tuple(names))
        training.train(model, data, recipe, torch.Generator())
        after = weights_of(model)
        for name in before:
            assert torch.equal(before[name], after[name]) == (name not in names)

    def test_recipes_of_fedrep_and_fedbabu(self) -> None:
        names = list(build("digits", 10, 0).state_dict())
        head = {"fc2.weight", "fc2.bias"}
        first, second = FedRep.recipes(configured(method="fedrep"), names, 1)
        assert (first.epochs, set(first.trainable or ())) == (10, head)
        assert (second.epochs, set(second.trainable or ())) == (1, set(names) - head)
        [only] = FedBABU.recipes(configured(method="fedbabu"), names, 1)
        assert set(only.trainable or ()) == set(names) - head


class TestLayers:
    def test_of_our_networks(self) -> None:
        names = list(build("cifar", 10, 0).state_dict())
        assert [len(layer) for layer in layers(names)] == [2, 2, 2, 2, 2]
        assert last_layers(names, 1) == ["fc2.weight", "fc2.bias"]
        assert last_layers(names, 0) == []
        assert last_layers(names, 99) == names
