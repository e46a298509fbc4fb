"""Every method against numbers worked out by hand, against its limits, and in federations.

The hand calculations use two-weight models on one image whose only pixel is x = 1. With
logits (a, b) and label 0 the gradient of the loss is (p − 1, 1 − p), p = 1/(1 + e^(b−a)):
p(0, 0) = 0.5, p(0.5, −0.5) = 0.731059, p(1, −1) = 0.880797.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights, last_layers, layers
from pfedgpa_app.data import images as images_module
from pfedgpa_app.data.client import ClientData, load_client
from pfedgpa_app.data.images import Images
from pfedgpa_app.diffusion.distribution import rank_of
from pfedgpa_app.methods import METHODS, federation_of, rounds_class
from pfedgpa_app.methods.base import ClientTask, Method, Trained
from pfedgpa_app.methods.cfl import bipartition
from pfedgpa_app.methods.fedfomo import AFFINITY, FedFomo
from pfedgpa_app.methods.fedproto import NEVER
from pfedgpa_app.methods.pfedhn import Hypernetwork, PFedHN, sgd_coefficients
from pfedgpa_app.methods.scaffold import CONTROL, Scaffold, effective_steps
from pfedgpa_app.models.networks import build, load, weights_of
from pfedgpa_app.run.experiment import run
from pfedgpa_app.training import evaluation
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe, pull_to
from tests.local_grid import InProcessGrid
from tests.test_federation import SMALL, federate, records, small, summary, train_messages

OWN_ROUNDS = [m for m in METHODS if federation_of(m) == m]


@pytest.fixture(autouse=True)
def pixels_as_they_are(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Networks see a pixel's value itself, in the hand calculations."""
    if "by_hand" not in request.keywords:
        yield
        return
    monkeypatch.setitem(images_module.NORMALISATION, 1, ((0.0,), (1 / 255,)))
    images_module._mean_and_std.cache_clear()
    yield
    images_module._mean_and_std.cache_clear()


by_hand = pytest.mark.by_hand


def one_image(label: int = 0, copies: int = 1) -> Images:
    pixels = torch.ones(copies, 1, 1, 1, dtype=torch.uint8)
    return Images(pixels, torch.full((copies,), label))


def configured(**settings: Any) -> Config:
    """Plain SGD of one epoch at learning rate 1, unless ``settings`` say otherwise."""
    plain = {"learning-rate": 1.0, "momentum": 0.0, "weight-decay": 0.0, "local-epochs": 1}
    return resolve(plain | {k.replace("_", "-"): v for k, v in settings.items()}).config


def column(*values: float) -> Tensor:
    return torch.tensor(values).float()[:, None]


def linear(a: float = 0.0, b: float = 0.0) -> nn.Sequential:
    """Logits (a·x, b·x); its weights are called 1.weight."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2, bias=False))
    model.load_state_dict({"1.weight": column(a, b)})
    return model


def deep(u: float, a: float, b: float) -> nn.Sequential:
    """Logits (a·u·x, b·u·x): a body u, 1.weight, under a head (a, b), 2.weight."""
    body, head = nn.Linear(1, 1, bias=False), nn.Linear(1, 2, bias=False)
    model = nn.Sequential(nn.Flatten(), body, head)
    model.load_state_dict({"1.weight": column(u), "2.weight": column(a, b)})
    return model


def train(
    name: str,
    model: nn.Module,
    weights: Weights | None = None,
    state: Weights | None = None,
    label: int = 0,
    **settings: Any,
) -> tuple[Weights, Weights, float]:
    """One round on a client: what it uploads, what it keeps, its loss."""
    config = configured(method=name, **settings)
    data = ClientData(one_image(label), one_image(label), one_image(label))
    sent = weights_of(model) if weights is None else weights
    kept = dict(state or {})
    draws = lambda: torch_generator(0, "train")  # noqa: E731
    task = ClientTask(config, sent, model, data, 1, draws, MappingProxyType(kept))
    trained = rounds_class(name).train(task)
    assert kept.keys() == (state or {}).keys()  # nothing is changed on the side
    return trained.upload, trained.state, trained.loss


def near(tensor: Tensor, *values: float) -> bool:
    return torch.allclose(tensor.flatten(), torch.tensor(values).float(), atol=2e-6)


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
        more = {"local_epochs": 2, "fedprox.mu": 0.5}
        uploaded, _, _ = train("fedprox", linear(), **more)
        assert near(uploaded["1.weight"], 0.518941, -0.518941)

    def test_scaffold(self) -> None:
        sent = {"1.weight": column(0, 0), CONTROL + "1.weight": column(0.1, -0.1)}
        own = {CONTROL + "1.weight": column(0.2, 0)}
        uploaded, kept, _ = train("scaffold", linear(), sent, own)
        # step: g − c_i + c = (−0.5 − 0.2 + 0.1, 0.5 − 0 − 0.1) = (−0.6, 0.4)
        assert near(uploaded["1.weight"], 0.6, -0.4)
        # c_i⁺ = c_i − c + (x − y)/(1·1) = (0.2 − 0.1 − 0.6, 0 + 0.1 + 0.4): the gradient itself
        assert near(kept[CONTROL + "1.weight"], -0.5, 0.5)
        assert near(uploaded[CONTROL + "1.weight"], -0.7, 0.5)

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
        phases = {"fedrep.head-epochs": 1, "fedrep.body-epochs": 1}
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

    def test_ditto(self) -> None:
        more = {"ditto.lam": 0.5}
        uploaded, kept, _ = train("ditto", linear(), {"1.weight": column(1, -1)}, **more)
        # v from (0, 0): −0.5 + 0.5·(0 − 1) = −1
        assert near(kept["1.weight"], 1, -1)
        # w from (1, −1): + 0.119203
        assert near(uploaded["1.weight"], 1.119203, -1.119203)

    def test_pfedme(self) -> None:
        more: dict[str, Any] = {"pfedme.lam": 0.5, "pfedme.steps": 2}
        more |= {"pfedme.learning-rate": 1.0, "pfedme.personal-learning-rate": 1.0}
        uploaded, kept, _ = train("pfedme", linear(), **more)
        # θ: 0.5, then −0.268941 + 0.5·0.5 further: 0.518941; w ← 0 − 1·0.5·(0 − 0.518941)
        assert near(kept["1.weight"], 0.518941, -0.518941)
        assert near(uploaded["1.weight"], 0.259471, -0.259471)

    def test_per_fedavg(self) -> None:
        uploaded, kept, _ = train("per-fedavg", linear())
        # θ' = 0.5; the gradient there, −0.268941, moves θ = 0
        assert near(uploaded["1.weight"], 0.268941, -0.268941)
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

    def test_fedproto(self) -> None:
        sent = {"means": column(3, 0), "counts": torch.tensor([5.0, 0.0])}
        uploaded, kept, _ = train("fedproto", deep(1, 0, 0), sent, **{"fedproto.lam": 0.5})
        # the body: 2·0.5·(1 − 3) = −2, nothing through a head of 0; the head as ever
        assert near(kept["1.weight"], 3)
        assert near(kept["2.weight"], 0.5, -0.5)
        assert near(uploaded["means"], 3, 0)
        assert near(uploaded["counts"], 1, 0)

    def test_cfl(self) -> None:
        uploaded, kept, _ = train("cfl", linear())
        assert near(uploaded["1.weight"], 0.5, -0.5)
        assert not kept

    def test_fedfomo(self) -> None:
        sent = {"0/1.weight": column(1, -1), "1/1.weight": column(-1, 1)}
        uploaded, kept, _ = train("fedfomo", linear(), sent)
        # own loss 0.693147; the first's 0.126928, √2 away: (0.693147 − 0.126928)/√2 = 0.400377;
        # the second's 2.126928: (0.693147 − 2.126928)/√2 = −1.013836; the first alone helps
        assert near(uploaded[AFFINITY][:2], 0.400377, -1.013836)
        # so that it trains from (1, −1)
        assert near(kept["1.weight"], 1.119203, -1.119203)

    def test_pfedhn_clips(self) -> None:
        # the gradient (−0.5, 0.5) has the norm 0.707107: at most 0.1 of it is left
        uploaded, _, _ = train(
            "pfedhn", linear(), {"1.weight": column(0, 0)}, **{"pfedhn.clip": 0.1}
        )
        assert near(uploaded["1.weight"], 0.070711, -0.070711)

    def test_pfedhn(self) -> None:
        uploaded, kept, _ = train("pfedhn", linear(), {"1.weight": column(1, -1)})
        assert near(uploaded["1.weight"], 1.119203, -1.119203)
        assert not kept


class _Regression(nn.Module):
    """Predictions x @ w, x being an image's pixels."""

    def __init__(self, w: list[list[float]]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w


def _in_order(batches: list[list[int]]) -> tuple[Images, torch.Generator]:
    """Images of these pixels, and draws that put them into these batches in this order."""
    values = [value for batch in batches for value in batch]
    data = Images(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(values))
    recipe = Recipe(1, 1.0, batch_size=len(batches[0]))
    for seed in range(10_000):
        drawn = training.batches(len(values), recipe, torch.Generator().manual_seed(seed))
        if [{values[i] for i in batch} for batch, _ in drawn] == [set(b) for b in batches]:
            return data, torch.Generator().manual_seed(seed)
    raise AssertionError("no such draws")


@by_hand
class TestGoldenValues:
    """Of other projects' tests, worked out again here."""

    @pytest.mark.parametrize(
        ("batches", "change"),
        # w = 4, gradient w/Σx, rate 1: 4 − 4/12 − 3.666667/30, and 4 − 4/9 − 3.555556/27
        [([[2, 4, 6], [8, 10, 12]], 0.4555554), ([[1, 3, 5], [7, 9, 11]], 0.5761316)],
    )
    def test_fedavg_of_fedjax(self, batches: list[list[int]], change: float) -> None:
        model, (data, draws) = _Regression([[4.0]]), _in_order(batches)

        def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            assert isinstance(model, _Regression)
            return model.w.square().sum() / (2 * x.sum())

        training.train(model, data, Recipe(1, 1.0, 3, momentum=0), draws, loss_of)
        assert 4 - model.w.item() == pytest.approx(change, abs=1e-6)

    @pytest.mark.parametrize(
        ("batches", "change"),
        # loss mean(x)·w, μ = 0.01: 4 + (10 − 0.01·4), and 3 + (9 − 0.01·3)
        [([[2, 4, 6], [8, 10, 12]], 13.96), ([[1, 3, 5], [7, 9, 11]], 11.97)],
    )
    def test_fedprox_of_fedjax(self, batches: list[list[int]], change: float) -> None:
        model, (data, draws) = _Regression([[4.0]]), _in_order(batches)
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
        model = _Regression([[2.0, 4.0], [3.0, 5.0]])
        pixels = torch.tensor([[1, 0], [0, 2]], dtype=torch.uint8).view(2, 1, 1, 2)
        data = Images(pixels, torch.tensor([0, 1]))
        targets = torch.tensor([[4.0, 6.0], [8.0, 12.0]])

        def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return (model(x) - targets[y]).abs().sum() / 2

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
        model = _Regression([[1.0]])
        training.train(
            model,
            one_image(),
            Recipe(200, 0.1, momentum=0),
            torch.Generator(),
            lambda model, x, y: (model(x) - 5).square().sum(),
            pull_to({"w": torch.tensor([[1.0]])}, 3.0),
        )
        assert model.w.item() == pytest.approx(2.6, abs=1e-5)


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
        first, second = METHODS["fedrep"].recipes(configured(method="fedrep"), names, 1)
        assert (first.epochs, set(first.trainable)) == (10, head)
        assert (second.epochs, set(second.trainable)) == (1, set(names) - head)
        [only] = METHODS["fedbabu"].recipes(configured(method="fedbabu"), names, 1)
        assert set(only.trainable) == set(names) - head


def weights(folder: Path, method: str) -> Weights:
    return load_file(folder / "weights" / f"{method}.safetensors")


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_bfloat16_is_near_float32() -> None:
    """Eight bits of a number, in forward and backward; the weights have all of theirs."""
    model, other = build("digits", 10, 0), build("digits", 10, 0)
    draws = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, 10, (60,), generator=draws)
    data, before = Images(pixels, labels), weights_of(model)
    recipe = Recipe(2, 0.05, 20)
    for network, way in ((model, recipe), (other, replace(recipe, bfloat16=True))):
        training.train(network, data, way, torch.Generator().manual_seed(0))
    exact, rounded = weights_of(model), weights_of(other)
    for name, start in before.items():
        assert rounded[name].dtype == torch.float32
        assert not torch.equal(exact[name], rounded[name])
        apart = (exact[name] - rounded[name]).norm() / (exact[name] - start).norm()
        assert apart < 0.1  # 0.05 at most with this seed; the first layer's is the largest


class TestLimits:
    """Settings at which a method is another one, bit for bit, over a whole federation."""

    @pytest.mark.parametrize(
        ("method", "limit", "more"),
        [
            ("fedprox", {"fedprox.mu": 0.0}, {}),
            ("fedper", {"fedper.head-layers": 0}, {}),
            ("lg-fedavg", {"lg-fedavg.global-layers": 9}, {}),
            ("lg-fedavg", {"lg-fedavg.global-layers": 9, "lg-fedavg.share": "first"}, {}),
            ("cfl", {"cfl.first-round": 99}, {}),
            ("ditto", {}, {}),  # its global model
            ("scaffold", {}, {"num_clients": 1}),
            ("per-fedavg", {"per-fedavg.alpha": 0.0}, {"batch_size": 60, "local_epochs": 1}),
            (
                "pfedme",
                {
                    "pfedme.steps": 1,
                    "pfedme.lam": 8.0,
                    "pfedme.learning-rate": 0.125,
                    "pfedme.personal-learning-rate": 0.05,
                },
                {"momentum": 0.0, "learning_rate": 0.05},
            ),
        ],
    )
    def test_fedavg(
        self, tmp_path: Path, method: str, limit: dict[str, Any], more: dict[str, Any]
    ) -> None:
        folder, _ = federate(tmp_path, method=f"fedavg,{method}", **limit, **more)
        ours, theirs = weights(folder, method), weights(folder, "fedavg")
        if method == "cfl":  # saves a client's cluster's weights for every client
            ours = {n.replace("client-0", "global"): t for n, t in ours.items() if "client-0" in n}
        tolerance = 1e-6 if method in ("scaffold", "cfl") else 0
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0)

    @pytest.mark.parametrize(
        ("method", "limit"),
        [
            ("ditto", {"ditto.lam": 0.0}),
            ("fedper", {"fedper.head-layers": 9, "fraction_train": 0.5}),
        ],
    )
    def test_local_only(self, tmp_path: Path, method: str, limit: dict[str, Any]) -> None:
        folder, _ = federate(tmp_path, method=f"local,{method}", **limit)
        told = {
            m: [
                (r["round"], r["client"], r.get("accuracy"), r.get("test_loss"))
                for r in records(folder)
                if r["federation"] == m
            ]
            for m in ("local", method)
        }
        assert told["local"] == told[method]
        assert told["local"]

    def test_fedala_without_learning_is_fedavg(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="fedavg,fedala", **{"fedala.eta": 0.0})
        assert same(weights(folder, "fedala"), weights(folder, "fedavg"))

    def test_fedrep_without_head_epochs_is_fedbabu(self, tmp_path: Path) -> None:
        limit = {"fedrep.head-epochs": 0, "fedrep.body-epochs": 2}
        folder, _ = federate(tmp_path, method="fedbabu,fedrep", **limit)
        assert same(weights(folder, "fedrep"), weights(folder, "fedbabu"))

    @by_hand
    def test_ditto_holds_on_to_the_global_model(self) -> None:
        # with η·λ = 1 a step leads to w − η∇F(v), wherever v was
        own, sent = {"1.weight": column(7, 3)}, {"1.weight": column(1, -1)}
        more = {"ditto.lam": 1000.0, "ditto.learning-rate": 0.001, "local_epochs": 3}
        _, kept, _ = train("ditto", linear(), sent, own, **more)
        assert (kept["1.weight"] - sent["1.weight"]).abs().max() < 0.001

    def test_pfedme_with_beta_zero_stays(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="pfedme", **{"pfedme.beta": 0.0})
        start = build("digits", 10, 0).state_dict()
        for name, tensor in weights(folder, "pfedme").items():
            assert torch.equal(tensor, start[name.removeprefix("global/")])


def resolve_demo(more: dict[str, Any]) -> Config:
    """The configuration that ``federate`` runs."""
    return resolve(small({key.replace("_", "-"): value for key, value in more.items()})).config


def took_part(folder: Path) -> set[int]:
    return {r["client"] for r in records(folder) if r["participated"]}


def server(name: str, clients: int = 2, **settings: Any) -> Method[Any]:
    """A method's server half before round 1, over ``linear``'s or ``deep``'s weights."""
    config = configured(method=name, num_clients=clients, **settings)
    initial = weights_of(deep(0, 0, 0))
    kind = METHODS[name]
    return kind(config, kind.begin(config, initial))


class TestServers:
    @pytest.mark.parametrize("examples", [1e308, 1e-320, 10**300])
    def test_no_count_overflows_the_mean(self, examples: float) -> None:
        one, other = Upload({"w": column(1.0)}, examples), Upload({"w": column(3.0)}, examples)
        assert near(weighted_mean({0: one, 1: other})["w"], 2.0)
        mask = {"w": column(-torch.inf)}
        rare = {0: Upload(mask, examples), 1: Upload(mask, 1.0), 2: Upload(mask, 1e-320)}
        assert weighted_mean(rare)["w"].item() == -torch.inf

    @pytest.mark.parametrize(
        ("name", "mean"),
        # uploads 0 and 4 of clients with 1 and 3 images: (1·0 + 3·4)/4 = 3, or (0 + 4)/2
        [
            *((name, 3.0) for name in ("fedavg", "fedprox", "fedper", "lg-fedavg", "fedbabu")),
            *((name, 3.0) for name in ("ditto", "fedala", "cfl")),
            *((name, 2.0) for name in ("fedrep", "scaffold", "pfedme", "per-fedavg")),
        ],
    )
    def test_clients_weigh_as_the_paper_says(self, name: str, mean: float) -> None:
        method = server(name)
        like = method.expected_upload()
        uploads = {i: {n: torch.full_like(t, 4.0 * i) for n, t in like.items()} for i in (0, 1)}
        method.aggregate(1, {0: Upload(uploads[0], 1), 1: Upload(uploads[1], 3)})
        for tensor in method.evaluation_download(0).values():
            assert near(tensor, *[mean] * tensor.numel())

    @pytest.mark.parametrize("name", OWN_ROUNDS)
    def test_the_initial_weights_are_left_alone(self, name: str) -> None:
        """The next method of a run starts from them, too."""
        config, kind = configured(method=name, num_clients=2), METHODS[name]
        initial = weights_of(build("digits", 10, 0))
        before = {n: t.clone() for n, t in initial.items()}
        method = kind(config, kind.begin(config, initial))
        for number in (1, 2):
            like = method.expected_upload()
            uploads = {i: {n: torch.full_like(t, 1.0 + i) for n, t in like.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(upload, 1) for i, upload in uploads.items()})
        assert same(initial, before)

    def test_scaffold_counts_all_clients(self) -> None:
        method = server("scaffold", clients=4)
        upload = {n: torch.full_like(t, 4.0) for n, t in method.expected_upload().items()}
        method.aggregate(1, {2: Upload(upload, 10)})
        # c ← 0 + 4·(1 of 4 clients)
        for name, tensor in method.download(0).items():
            assert near(tensor, *[1.0 if name.startswith(CONTROL) else 4.0] * tensor.numel())

    @given(st.integers(1, 30), st.floats(0, 0.95))
    def test_effective_steps(self, steps: int, momentum: float) -> None:
        velocity = moved = 0.0
        for _ in range(steps):  # by a gradient of 1
            velocity = momentum * velocity + 1
            moved += velocity
        assert effective_steps(steps, momentum) == pytest.approx(moved)

    @pytest.mark.parametrize(
        ("name", "third"),
        # β = 0.5, and every round's mean is 1 above what was sent: from 0 to 1, then
        # m = 1 + 0.5·1 and w = 2.5; in round 3 m = 1 + 0.5·1.5 and w = 4.25. pFedGPA generates
        # from round 3 on, whose clients' mean, 3.5, is taken as it is
        [("fedavgm", 4.25), ("pfedgpa", 3.5)],
    )
    def test_momentum(self, name: str, third: float) -> None:
        own = {"pfedgpa.generate-from": 3} if name == "pfedgpa" else {}
        method = server(name, num_server_rounds=4, **{f"{name}.momentum": 0.5}, **own)
        for number, expected in ((1, 1.0), (2, 2.5), (3, third)):
            sent = method.download(0)
            uploads = {i: {n: t + 2 * i for n, t in sent.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(u, 10) for i, u in uploads.items()})
            for tensor in method.state.global_weights.values():
                assert near(tensor, *[expected] * tensor.numel())

    def test_rounds_that_end_with_generation(self) -> None:
        kind, names = METHODS["pfedgpa"], ["1.weight", "2.weight"]
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
        kind = METHODS["pfedgpa"]
        like = {"body.weight": column(0), "head.weight": torch.zeros(20, 10)}
        method = kind(config, kind.begin(config, like))
        two, four = (torch.randn(n, 20, 10, generator=draws) for n in (2, 4))
        for number in range(1, 7):
            uploads = {}
            for client in range(8):
                noise = 0.1 * torch.randn(20, 10, generator=draws)
                mine = two[client % 2] if number < 5 else four[client % 4]
                uploads[client] = Upload(like | {"head.weight": mine + noise}, 1)
            method.aggregate(number, uploads)
            assert method.state.rank == (None if number < 5 else 2)
        assert method.learned().rank == 2
        assert rank_of(method.state.buffer, "shrinkage", 0) == 3  # by what clients are now

    def test_pfedme_goes_part_of_the_way(self) -> None:
        method = server("pfedme", **{"pfedme.beta": 0.25})
        four = {n: torch.full_like(t, 4.0) for n, t in method.expected_upload().items()}
        method.aggregate(1, {0: Upload(four, 1), 1: Upload(four, 9)})
        assert all(near(t, *[1.0] * t.numel()) for t in method.download(0).values())

    def test_fedproto_means_and_nearest_prototype(self) -> None:
        config, kind = configured(method="fedproto"), METHODS["fedproto"]
        initial = {
            "body.weight": column(0),
            "head.weight": column(0, 0),
            "head.bias": torch.zeros(2),
        }
        method = kind(config, kind.begin(config, initial))
        counts = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]
        sent = [
            {"means": column(2, 9), "counts": counts[0]},
            {"means": column(6, 9), "counts": counts[1]},
        ]
        method.aggregate(1, {i: Upload(upload, 4) for i, upload in enumerate(sent)})
        # class 0: (1·2 + 3·6)/4 = 5; class 1 has never been shown, whatever its mean says
        assert near(method.download(0)["means"], 5, 0)
        head = method.evaluation_download(0)
        assert near(head["head.weight"], 10, 0)
        assert head["head.bias"].tolist() == [-25, NEVER]

    def test_fedfomo_sends_what_helped(self) -> None:
        method = server("fedfomo", clients=4, **{"fedfomo.models": 2, "fedfomo.explore": 0.0})
        assert method.download(0) == {}
        like = method.expected_upload()

        def upload(client: int, *affinity: float) -> Upload:
            model = {n: torch.full_like(t, client) for n, t in like.items()}
            return Upload(model | {AFFINITY: torch.tensor(affinity)}, 1)

        method.aggregate(1, {i: upload(i, 0, 0) for i in range(4)})
        first = method.state.sent[0]
        assert len(first) == 2
        assert 0 not in first
        method.aggregate(2, {0: upload(0, 0.1, 0.5)})
        # the better of the two stays, and comes first; the other one's place is open
        assert method.state.sent[0][0] == first[1]
        assert method.state.affinity[0, first[0]] == pytest.approx(0.1)
        sent = method.download(0)
        assert near(sent["0/1.weight"], first[1])
        assert len(sent) == 2 * (len(like) - 1)


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

    def test_stays_while_all_agree(self) -> None:
        method = server("cfl", clients=4, **{"cfl.first-round": 1})
        self._round(method, 1, dict.fromkeys(range(4), (2.0, 0.0)))  # the mean still moves
        self._round(method, 2, {i: (0.1 * (-1) ** i, 0.0) for i in range(4)})  # nobody pulls
        assert len(method.state) == 1


class TestHypernetwork:
    def test_coefficients_are_sgd(self) -> None:
        draws = torch.Generator().manual_seed(0)
        gradients = torch.randn(5, 3, generator=draws)
        parameter = nn.Parameter(torch.randn(3, generator=draws))
        start = parameter.detach().clone()
        optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        for gradient in gradients:
            parameter.grad = gradient
            optimiser.step()
        rows = torch.from_numpy(sgd_coefficients(5, 0.1, 0.9, 0.01)).float()
        known = torch.stack([start, torch.zeros(3), *gradients])
        torch.testing.assert_close(rows[0] @ known, parameter.detach())
        velocity = optimiser.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(rows[1] @ known, velocity)

    def test_the_update_is_the_chain_rule(self) -> None:
        """One plain inner step: Δθ = η∇L(θ), so that the server's step is a step on L∘h."""
        rate, inner = 0.1, 0.05
        more = {"pfedhn.hidden": 7, "pfedhn.hidden-layers": 1, "pfedhn.server-momentum": 0.0}
        more |= {"pfedhn.server-learning-rate": rate, "pfedhn.server-weight-decay": 0.0}
        config = configured(method="pfedhn", num_clients=3, **more)
        initial = weights_of(deep(0, 0, 0))
        method = PFedHN(config, PFedHN.begin(config, initial))
        reference = _copy(method.state.network)

        def loss(theta: Tensor) -> Tensor:
            return (theta - torch.arange(3.0)).square().sum()

        theta = method.state.made[1].clone().requires_grad_()
        [gradient] = torch.autograd.grad(loss(theta), theta)
        moved = (theta - inner * gradient).detach()
        method.aggregate(1, {1: Upload(_unflatten(moved, initial), 60)})

        composed = loss(reference(torch.tensor([1]))[0])
        parameters = list(reference.parameters())
        for p, g in zip(parameters, torch.autograd.grad(composed, parameters), strict=True):
            p.data -= rate * inner * g
        for ours, theirs in zip(method.state.network.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("clip", [50.0, 0.01])
    def test_a_round_is_a_step_for_each_client_in_turn(self, clip: float) -> None:
        """Against torch's SGD, clipping and autograd, gradients taken at the round's start."""
        more = {"pfedhn.hidden": 5, "pfedhn.clip": clip}
        config = configured(method="pfedhn", num_clients=4, **more)
        initial = weights_of(deep(0, 0, 0))
        method = PFedHN(config, PFedHN.begin(config, initial))
        live = _copy(method.state.network)
        optimiser = torch.optim.SGD(live.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        draws = torch.Generator().manual_seed(1)
        for number in (1, 2):  # the velocity goes on from round to round
            frozen, uploads = _copy(live), {}
            for client in (0, 2, 3):
                back = torch.randn(3, generator=draws)
                uploads[client] = Upload(_unflatten(back, initial), 60 + client)
                theta = frozen(torch.tensor([client]))[0]
                objective = ((theta - back).detach() * theta).sum()
                gradients = torch.autograd.grad(objective, list(frozen.parameters()))
                for p, g in zip(live.parameters(), gradients, strict=True):
                    p.grad = g
                nn.utils.clip_grad_norm_(live.parameters(), clip)
                optimiser.step()
            method.aggregate(number, uploads)
            for ours, theirs in zip(
                method.state.network.parameters(), live.parameters(), strict=True
            ):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
            made = _flatten(method.download(1))
            torch.testing.assert_close(
                made, live(torch.tensor([1]))[0].detach(), atol=1e-5, rtol=1e-4
            )


def _copy(network: Hypernetwork) -> Hypernetwork:
    sizes = network.embeddings.num_embeddings, network.output.out_features
    own = replace(
        configured(method="pfedhn").of(METHODS["pfedhn"].settings),
        hidden=network.output.in_features,
        hidden_layers=len(network.trunk) // 2,
    )
    copy = Hypernetwork(*sizes, own)
    copy.load_state_dict(network.state_dict())
    return copy


def _flatten(named: Weights) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in named.values()])


def _unflatten(vector: Tensor, like: Weights) -> Weights:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Every method with rounds of its own, half of the clients a round."""
    return federate(
        tmp_path_factory.mktemp("everything"),
        method=",".join(OWN_ROUNDS),
        fraction_train=0.5,
        learning_rate=0.05,
        **{"cfl.first-round": 2, "cfl.eps1": 100.0, "cfl.eps2": 0.0, "pfedgpa.round-rate": 1.0},
    )


def test_training_never_sees_test_or_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, really = [], training.training_batches

    def spied(data: Images, *rest: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(data)
        return really(data, *rest)

    for name in ("training.sgd", "methods.pfedme", "methods.per_fedavg", "methods.fedala"):
        monkeypatch.setattr(f"pfedgpa_app.{name}.training_batches", spied)
    methods = "fedavg-ft,fedrep,fedbabu,per-fedavg,pfedme,fedala,ditto,fedfomo"
    federate(tmp_path, method=methods, num_server_rounds=2)
    clients = [load_client(resolve_demo({}), client) for client in range(4)]
    held = [{bytes(image.numpy().data) for image in client.train.pixels} for client in clients]
    assert len(seen) > 100
    for data in seen:
        images = {bytes(image.contiguous().numpy().data) for image in data.pixels}
        assert any(images <= own for own in held)


@pytest.mark.xdist_group("everything")  # which is built once
class TestFederations:
    def test_all_learn_under_partial_participation(self, everything: tuple[Path, Any]) -> None:
        folder, _ = everything
        rows = summary(folder)
        assert list(rows) == OWN_ROUNDS
        for name, row in rows.items():
            # pFedHN has hardly begun, Krum has one upload a round
            least = {"pfedhn": 5, "krum": 20}.get(name, 30)
            assert row["accuracy_as_its_paper"] > least, name
        assert not [e for e in records(folder, "events.jsonl") if e["kind"] == "rejected"]

    def test_what_travels(self, everything: tuple[Path, Any]) -> None:
        _, grid = everything
        every = set(build("digits", 10, 0).state_dict())
        head = {"fc2.weight", "fc2.bias"}

        def sent(method: str) -> set[str]:
            message = train_messages(grid, method)[-1]
            return set(message.content.array_records["arrays"])

        assert sent("local") == set()
        for method in ("fedper", "fedrep", "fedbabu"):
            assert sent(method) == every - head
        assert sent("lg-fedavg") == head
        for method in ("fedavg", "fedprox", "ditto", "pfedme", "per-fedavg", "fedala", "cfl"):
            assert sent(method) == every
        assert sent("pfedhn") == every
        assert sent("scaffold") == every | {CONTROL + name for name in every}
        assert sent("fedproto") == {"means", "counts"}

    def test_what_clients_keep(self, everything: tuple[Path, Any]) -> None:
        _, grid = everything
        kept: dict[str, set[str]] = {}
        for context in grid.contexts.values():
            for key, record in context.state.array_records.items():
                kept.setdefault(key.partition(".")[0], set()).update(record)
        every = set(build("digits", 10, 0).state_dict())
        head = {"fc2.weight", "fc2.bias"}
        assert kept == {
            "local": every,
            "scaffold": {CONTROL + name for name in every},
            "fedper": head,
            "fedrep": head,
            "lg-fedavg": every - head,
            "fedala": head | {f"share/{name}" for name in head},
            "fedproto": every,
            "ditto": every,
            "pfedme": every,
            "fedfomo": every,
        }

    def test_a_client_without_personal_parts_has_the_initial_ones(self, tmp_path: Path) -> None:
        one = {"fraction_train": 0.25, "num_server_rounds": 1}
        folder, _ = federate(tmp_path, method="fedavg,ditto,fedper,local", **one)
        rows = records(folder, "clients.jsonl")
        [seen] = took_part(folder)
        told = {(r["method"], r["client"]): r["before_ft"] for r in rows}
        for client in set(range(4)) - {seen}:
            # Ditto's has the global weights, which after one round of one client are FedAvg's
            assert told["ditto", client] == told["fedavg", client]
        # FedPer's has the global body under the head that all start with
        body = weights(folder, "fedper")
        body = {name.removeprefix("global/"): tensor for name, tensor in body.items()}
        model, data = build("digits", 10, 0), load_client(resolve_demo(one), 0 if seen else 1)
        load(model, body)
        score = evaluation.evaluate(model, data.test)
        assert told["fedper", 0 if seen else 1] == pytest.approx(score.accuracy)

    def test_fine_tuning_is_each_papers_own(self) -> None:
        config = configured(method="fedrep,fedbabu,per-fedavg,fedavg-ft")
        own = {m: METHODS[m].own_fine_tuning(config) for m in config.method}
        told = {m: (w.epochs, w.learning_rate, w.part, w.full_batch) for m, w in own.items() if w}
        assert told == {
            "fedrep": (10, 1.0, "head", False),
            "fedbabu": (5, 0.001, "all", False),
            "per-fedavg": (1, 1.0, "all", True),
            "fedavg-ft": (1, 1.0, "all", False),
        }


class Forgetful(InProcessGrid):
    """Nodes whose contexts are empty at every message, as after a SuperNode's restart."""

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies = []
        for message in messages:
            replies += super().serve([message], timeout)
            self.contexts[message.metadata.dst_node_id].state = RecordDict()
        return replies


class TestMemory:
    METHODS = "local,scaffold,fedper,fedala,ditto,fedfomo"

    def _run(self, out: Path, state_dir: Path | None) -> list[dict[str, Any]]:
        settings = {k: v for k, v in SMALL.items() if not k.startswith("pfedgpa.")}
        settings |= {"method": self.METHODS, "out-dir": str(out), "run-name": "run"}
        settings["num-server-rounds"] = 2
        settings["checkpoint-every"] = 0  # with checkpoints a simulation keeps it by itself
        grid = Forgetful(settings, 2)  # which host two clients each
        for context in grid.contexts.values():
            context.node_config["state-dir"] = str(state_dir or "")
        return records(run(grid, resolve(settings)), "clients.jsonl")

    def test_a_node_that_starts_again_goes_on_where_it_was(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path / "reference", method=self.METHODS, num_server_rounds=2)
        reference = records(folder, "clients.jsonl")
        assert self._run(tmp_path / "kept", tmp_path / "state") == reference
        assert self._run(tmp_path / "lost", None) != reference
        kept = {path.name for path in (tmp_path / "state").glob("run-*/*")}
        assert kept == {
            f"{m}.{c}@{r}.safetensors"
            for m in self.METHODS.split(",")
            for c in range(4)
            for r in (1, 2)
        }

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


class TestLayers:
    def test_of_our_networks(self) -> None:
        names = list(build("cifar", 10, 0).state_dict())
        assert [len(layer) for layer in layers(names)] == [2, 2, 2, 2, 2]
        assert last_layers(names, 1) == ["fc2.weight", "fc2.bias"]
        assert last_layers(names, 0) == []
        assert last_layers(names, 99) == names

    def test_fedfomo_needs_validation_images(self) -> None:
        from pfedgpa_app.core.settings import ConfigError

        with pytest.raises(ConfigError, match="validation-share"):
            configured(method="fedfomo", validation_share=0.0)
        assert FedFomo.title
