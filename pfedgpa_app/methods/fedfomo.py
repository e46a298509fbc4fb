"""FedFomo (Zhang et al. 2021, Algorithm 1): each client mixes in the models that help it.

"Personalized Federated Learning with First Order Model Optimization", arXiv 2012.08565.

shared: clients' models, M of them to each client · kept: the client's own weights · client: on its
validation images w_n = (L_i(θ_i) − L_i(θ_n)) / ‖θ_n − θ_i‖ for each model it is sent; with
w⁺ = max(w, 0)/Σ max(w, 0) it moves to θ_i + Σ w⁺_n (θ_n − θ_i) and trains on from there · server:
keeps every client's newest model and adds up w in an affinity matrix; a client is sent the M
models of its highest affinities, each replaced by a random one with probability ε, which falls
by ``decay`` a round · evaluated: the client's own weights after training.

Clients see each other's models, which clients of FedAvg never do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pfedgpa_app.core.randomness import numpy_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, MethodSettings, setting
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods.base import OTHER, ClientTask, Method, Trained
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training import evaluation

AFFINITY = "affinity"


@dataclass(frozen=True)
class FedFomoSettings(MethodSettings):
    """Which models a client gets to see."""

    models: int = setting(
        5, "M, the number of other clients' models that each client is sent", low=1
    )
    explore: float = setting(0.3, "ε, the chance that a sent model is a random one", low=0, high=1)
    decay: float = setting(0.05, "by how much ε falls per round", low=0)


@dataclass
class FomoState:
    """Clients' newest models, their affinities [n, n], and whose models each is sent next."""

    initial: Weights
    affinity: Tensor
    models: dict[int, Weights] = field(default_factory=dict)
    sent: dict[int, list[int]] = field(default_factory=dict)


class FedFomo(Method[FomoState]):
    """First-order optimal mixing of clients' models."""

    title = "FedFomo"
    settings = FedFomoSettings
    sends = OTHER  # also the affinities to the models that it was sent
    beside = (AFFINITY,)
    adjustable = False  # the models are other clients', fitted to their own classes
    unused: ClassVar = {"start-from": "its clients are sent each other's networks"}

    @classmethod
    def check(cls, config: Config) -> None:
        if why := config.why_no_validation:
            raise ConfigError(f"fedfomo weighs models by validation: {why}")

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> FomoState:
        return FomoState(initial, torch.zeros(config.num_clients, config.num_clients))

    def expected_upload(self) -> Weights:
        slots = torch.zeros(self.config.of(FedFomoSettings).models)
        return self.state.initial | {AFFINITY: slots}

    def download(self, client: int) -> Weights:
        return {
            f"{slot}/{name}": tensor
            for slot, other in enumerate(self.state.sent.get(client, []))
            for name, tensor in self.state.models[other].items()
        }

    def evaluation_download(self, client: int) -> Weights:
        return {}

    def evaluation_of(self, client: int, given: Weights) -> Weights:
        return self.evaluation_download(client)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        state, own = self.state, self.config.of(FedFomoSettings)
        for client, upload in uploads.items():
            others = state.sent.get(client, [])
            state.affinity[client, others] += upload.weights[AFFINITY][: len(others)]
            state.models[client] = {n: upload.weights[n] for n in state.initial}
        explore = max(0.0, own.explore - own.decay * (server_round - 1))
        rng = numpy_generator(self.config.seed, "fedfomo", server_round)
        state.sent = {}
        for client in range(self.config.num_clients):
            others = [i for i in state.models if i != client]
            others = [others[i] for i in rng.permutation(len(others))]  # ties: by chance
            best = sorted(others, key=lambda i: -float(state.affinity[client, i]))
            chosen = best[: own.models]
            left = [i for i in others if i not in chosen]
            for slot in range(len(chosen)):
                if left and rng.random() < explore:
                    chosen[slot] = left.pop()
            state.sent[client] = chosen

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        theta = dict(task.state) or weights_of(task.model)
        slots = task.config.of(FedFomoSettings).models
        theta, affinity = cls.mix(task, theta, slots)
        task.load(theta)
        loss = task.sgd(cls.recipes(task.config, list(theta), task.round))
        trained = weights_of(task.model)
        return Trained(trained | {AFFINITY: affinity}, trained, loss)

    @staticmethod
    def mix(task: ClientTask, theta: Weights, slots: int) -> tuple[Weights, Tensor]:
        """Mix the models that help into θ_i; returns the mixture and each model's w [M]."""

        def loss_of(weights: Weights) -> float:
            task.load(weights)
            return evaluation.evaluate(task.model, task.data.validation).loss / held

        held, worth = max(1, len(task.data.validation)), torch.zeros(slots)
        own, others = loss_of(theta), []
        for slot in range(slots):
            other = {n: task.weights[k] for n in theta if (k := f"{slot}/{n}") in task.weights}
            if other:
                others.append(other)
                apart = sum(float((other[n] - theta[n]).square().sum()) for n in theta) ** 0.5
                worth[slot] = (own - loss_of(other)) / max(apart, 1e-12)
        helpful = worth.clamp_min(0)
        if helpful.any():
            shares = (helpful / helpful.sum()).tolist()
            pairs = list(zip(shares, others, strict=False))
            theta = {n: t + sum(s * (o[n] - t) for s, o in pairs) for n, t in theta.items()}
        return theta, worth
