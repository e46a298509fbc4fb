"""pFedHN (Shamsian et al. 2021, Algorithm 1): a hypernetwork makes each client's weights.

"Personalized Federated Learning using Hypernetworks", arXiv 2103.04628.

shared: the hypernetwork φ and the clients' embeddings v_i, all of them on the server · kept:
nothing · client: local-epochs of SGD from θ_i = h_φ(v_i) · server: for each client a step on φ and
v_i by the vector–Jacobian product of θ_i with Δθ_i = θ_i − (what came back) · evaluated: h_φ(v_i),
also for a client that was never sampled.

The paper visits one client per step. Here a round's clients train at the same time: every product
is taken at the φ that made θ_i, and then follow the round's steps (one per client, in the clients'
order, with momentum and weight decay). For given gradients g_1 … g_S, SGD is linear in
(φ, velocity, g): it ends at a·φ + b·velocity + Σ c_k g_k, where Σ c_k g_k is the gradient of
Σ c_k ⟨Δθ_k, h_φ(v_k)⟩. This takes two passes through the hypernetwork, whatever the number of
clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from pfedgpa_app.core.randomness import seeded, torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Layout, Weights, is_statistic
from pfedgpa_app.methods.base import Method
from pfedgpa_app.training.sgd import Recipe

_EMBEDDING_STEPS = 200  # optimiser steps per iteration of joining


@dataclass(frozen=True)
class PFedHNSettings(MethodSettings):
    """The hypernetwork and its optimiser; the authors' values."""

    embedding: int | None = setting(
        None, "size of a client's embedding; auto: 1 + clients/4", low=1
    )
    hidden: int = setting(100, "width of the hypernetwork", low=1)
    hidden_layers: int = setting(3, "hidden layers of the hypernetwork after the first", low=0)
    server_learning_rate: float = setting(
        0.01, "the hypernetwork's learning rate", above=0, grid=(0.005, 0.01, 0.05)
    )
    server_momentum: float = setting(
        0.9, "momentum of the hypernetwork's training", low=0, high=0.999
    )
    server_weight_decay: float = setting(1e-3, "weight decay of the hypernetwork's training", low=0)
    clip: float = setting(
        50.0,
        "largest norm of a gradient: of a client's in training, and of the hypernetwork's for one "
        "client",
        above=0,
    )


class Hypernetwork(nn.Module):
    """A network from clients' numbers [S] to their weights [S, P].

    One output layer for all tensors equals a layer for each tensor, because a layer's
    initialisation depends on its input's width only.
    """

    def __init__(self, clients: int, size: int, own: PFedHNSettings) -> None:
        super().__init__()
        embedding = own.embedding or int(1 + clients / 4)
        self.embeddings = nn.Embedding(clients, embedding)
        layers: list[nn.Module] = [nn.Linear(embedding, own.hidden)]
        for _ in range(own.hidden_layers):
            layers += [nn.ReLU(), nn.Linear(own.hidden, own.hidden)]
        self.trunk = nn.Sequential(*layers)
        self.output = nn.Linear(own.hidden, size)

    def features(self, clients: Tensor) -> Tensor:
        """The input of the output layer, [S, hidden]."""
        features: Tensor = self.trunk(self.embeddings(clients))
        return features

    def forward(self, clients: Tensor) -> Tensor:
        weights: Tensor = self.output(self.features(clients))
        return weights

    @torch.no_grad()
    def of_all(self) -> Tensor:
        """All clients' weights [n, P]."""
        weights: Tensor = self(torch.arange(self.embeddings.num_embeddings))
        return weights


@dataclass
class HypernetworkState:
    """The hypernetwork, its optimiser's velocity, and the weights made for each client [n, P]."""

    like: Weights
    network: Hypernetwork
    velocity: list[Tensor]
    made: Tensor


def sgd_coefficients(
    steps: int, learning_rate: float, momentum: float, weight_decay: float
) -> np.ndarray:
    """Write ``steps`` steps of SGD with given gradients as one linear map [2, 2 + steps].

    Row 0 gives the parameter, row 1 the velocity, each from (parameter, velocity, g_1 … g_S):
    v ← m·v + g + λ·p, then p ← p − η·v.
    """
    parameter, velocity = np.eye(2, 2 + steps)
    for k in range(steps):
        velocity = momentum * velocity + weight_decay * parameter
        velocity[2 + k] += 1
        parameter = parameter - learning_rate * velocity
    return np.stack([parameter, velocity])


class PFedHN(Method[HypernetworkState]):
    """A hypernetwork makes clients' weights, and learns from how clients change them."""

    title = "pFedHN"
    settings = PFedHNSettings
    tuned = ("learning-rate", "server-learning-rate")
    unused: ClassVar = {"start-from": "its hypernetwork makes the first weights, too"}

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        clip = config.of(PFedHNSettings).clip
        return [
            replace(recipe, clip=clip) for recipe in super().recipes(config, names, server_round)
        ]

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> HypernetworkState:
        made_for = {name: t for name, t in initial.items() if not is_statistic(name)}
        size = sum(Layout.of(made_for).sizes)
        with seeded(torch_generator(config.seed, "pfedhn").initial_seed()):
            network = Hypernetwork(config.num_clients, size, config.of(PFedHNSettings))
        velocity = [torch.zeros_like(p) for p in network.parameters()]
        return HypernetworkState(made_for, network, velocity, network.of_all())

    def expected_upload(self) -> Weights:
        return self.state.like

    def download(self, client: int) -> Weights:
        return Layout.of(self.state.like).unflatten(self.state.made[client])

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        state, own = self.state, self.config.of(PFedHNSettings)
        clients = torch.tensor(list(uploads))
        layout = Layout.of(state.like)
        back = torch.stack([layout.flatten(upload.weights) for upload in uploads.values()])
        change = state.made[clients] - back
        change *= self._clipped(clients, change)[:, None]
        coefficients = sgd_coefficients(
            len(clients), own.server_learning_rate, own.server_momentum, own.server_weight_decay
        )
        parameters = list(state.network.parameters())
        old = [p.detach().clone() for p in parameters]
        made = state.network(clients)
        sums = []
        for of_gradients in torch.from_numpy(coefficients[:, 2:]).to(change):
            objective = (of_gradients[:, None] * change * made).sum()
            sums.append(torch.autograd.grad(objective, parameters, retain_graph=True))
        with torch.no_grad():
            for p, v, before, to_p, to_v in zip(
                parameters, state.velocity, old, *sums, strict=True
            ):
                (pp, pv), (vp, vv) = coefficients[:, :2]
                p.copy_(pp * before + pv * v + to_p)
                v.copy_(vp * before + vv * v + to_v)
        state.made = state.network.of_all()

    def first_download(self, clients: Sequence[int]) -> dict[int, Weights]:
        """Weights from the mean embedding of the clients that took part from the start."""
        embeddings = self.state.network.embeddings.weight
        with torch.no_grad():
            embeddings[list(clients)] = embeddings[: self.config.initial_clients].mean(0)
        self.state.made = self.state.network.of_all()
        return super().first_download(clients)

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """Fit only the joining clients' embeddings, so that their uploads are made from these."""
        network, layout = self.state.network, Layout.of(self.state.like)
        clients = torch.tensor(list(uploads))
        back = torch.stack([layout.flatten(upload.weights) for upload in uploads.values()])
        embeddings = network.embeddings.weight[clients].detach().requires_grad_()
        optimiser = torch.optim.Adam([embeddings], lr=0.01)
        for _ in range(_EMBEDDING_STEPS):
            made = network.output(network.trunk(embeddings))
            optimiser.zero_grad()
            (made - back).square().sum().backward(inputs=[embeddings])
            optimiser.step()
        with torch.no_grad():
            network.embeddings.weight[clients] = embeddings
            self.state.made[clients] = network(clients)
        return {client: self.download(client) for client in uploads}

    def _clipped(self, clients: Tensor, change: Tensor) -> Tensor:
        """The factors ≤ 1 that clip each client's gradient of the hypernetwork, [S]."""
        network = self.state.network
        features = network.features(clients)
        # gradient of the output layer: Δθ ⊗ (features, 1); of the rest: from (its weights)ᵀ Δθ back
        square = change.square().sum(1) * (features.detach().square().sum(1) + 1)
        back = change @ network.output.weight.detach()
        rest = [*network.embeddings.parameters(), *network.trunk.parameters()]
        for k in range(len(clients)):
            gradients = torch.autograd.grad(features[k], rest, back[k], retain_graph=True)
            square[k] += torch.stack([g.square().sum() for g in gradients]).sum()
        return (self.config.of(PFedHNSettings).clip / square.sqrt().clamp_min(1e-12)).clamp_max(1)
