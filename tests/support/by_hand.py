"""One step of a method, small enough to be worked out by hand.

The calculations use two-weight models on one image whose only pixel is x = 1. With logits (a, b)
and label 0 the gradient of the loss is (p − 1, 1 − p), p = 1/(1 + e^(b−a)):
p(0, 0) = 0.5, p(0.5, −0.5) = 0.731059, p(1, −1) = 0.880797.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.data.images import Images
from pfedgpa_app.methods import METHODS, rounds_class
from pfedgpa_app.methods.base import ClientTask, Method
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe

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
    """Train one round on a client; return what it uploads, what it keeps, and its loss."""
    config = configured(method=name, **settings)
    data = ClientData(one_image(label), one_image(label), one_image(label))
    sent = weights_of(model) if weights is None else weights
    kept = dict(state or {})
    draws = lambda: torch_generator(0, "train")  # noqa: E731
    task = ClientTask(config, sent, model, data, 1, draws, MappingProxyType(kept))
    trained = rounds_class(name).train(task)
    assert kept.keys() == (state or {}).keys()  # training has not changed the state in place
    return trained.upload, trained.state, trained.loss


def near(tensor: Tensor, *values: float) -> bool:
    return torch.allclose(tensor.flatten(), torch.tensor(values).float(), atol=2e-6)


def server(name: str, clients: int = 2, **settings: Any) -> Method[Any]:
    """Return a method's server half before round 1, over the weights of ``deep``'s network."""
    config = configured(method=name, num_clients=clients, **settings)
    initial = weights_of(deep(0, 0, 0))
    kind: Any = METHODS[name]
    method: Method[Any] = kind(config, kind.begin(config, initial))
    return method


class Regression(nn.Module):
    """Predictions x @ w, x being an image's pixels."""

    def __init__(self, w: list[list[float]]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.w


def in_order(batches: list[list[int]]) -> tuple[Images, torch.Generator]:
    """Return images of these pixel values, and draws that give these batches in this order."""
    values = [value for batch in batches for value in batch]
    data = Images(torch.tensor(values, dtype=torch.uint8).view(-1, 1, 1, 1), torch.tensor(values))
    recipe = Recipe(1, 1.0, batch_size=len(batches[0]))
    for seed in range(10_000):
        drawn = training.batches(len(values), recipe, torch.Generator().manual_seed(seed))
        if [{values[i] for i in batch} for batch, _ in drawn] == [set(b) for b in batches]:
            return data, torch.Generator().manual_seed(seed)
    raise AssertionError("no such draws")
