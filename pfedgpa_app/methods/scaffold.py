"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1, option II).

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378.

shared: all weights and the server's control variate c · kept: the client's control variate c_i ·
client: SGD on gradients g − c_i + c; then c_i⁺ = c_i − c + (x − y)/(Kη) · server: the plain mean
of the clients' weights, scaled by the global step size; c ← c + Σ_S (c_i⁺ − c_i)/N with N all
clients, not those of the round · evaluated: the global weights.

(x − y)/(Kη) estimates the mean gradient of the round's K steps. Under momentum m step k's
gradient moves the weights by (1 − m^{K−k+1})/(1 − m) times η over the steps left, so that the
sum of these factors takes K's place; without momentum they are all 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods.averaging import toward
from pfedgpa_app.methods.base import OTHER, ClientTask, Method, Trained
from pfedgpa_app.models.networks import weights_of

CONTROL = "control/"  # before the name of the weight that a control variate is for


@dataclass(frozen=True)
class ScaffoldSettings(MethodSettings):
    """The server's own step."""

    global_step: float = setting(1.0, "η_g, the server's step size", above=0)


@dataclass
class ScaffoldState:
    """The server's weights x and control variate c."""

    global_weights: Weights
    control: Weights


def effective_steps(steps: int, momentum: float) -> float:
    """By how many times η a constant gradient moves the weights in ``steps`` steps."""
    return sum((1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps))


class Scaffold(Method[ScaffoldState]):
    """FedAvg whose clients correct for how their own data pull."""

    title = "SCAFFOLD"
    settings = ScaffoldSettings
    sends = OTHER  # changes of control variates, too
    beside = (CONTROL,)

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> ScaffoldState:
        return ScaffoldState(initial, {n: torch.zeros_like(t) for n, t in initial.items()})

    def expected_upload(self) -> Weights:
        return self.download(0)

    def download(self, client: int) -> Weights:
        control = {CONTROL + name: c for name, c in self.state.control.items()}
        return self.state.global_weights | control

    def evaluation_download(self, client: int) -> Weights:
        return self.state.global_weights

    def evaluation_of(self, client: int, given: Weights) -> Weights:
        return self.evaluation_download(client)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        mean = weighted_mean(uploads, uniform=True)
        share = len(uploads) / self.config.initial_clients
        step = self.config.of(ScaffoldSettings).global_step
        x, c = self.state.global_weights, self.state.control
        self.state.global_weights = toward(x, mean, step)
        self.state.control = {n: c[n] + share * mean[CONTROL + n] for n in c}

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        x = {n: t for n, t in task.weights.items() if not n.startswith(CONTROL)}
        c = {n: task.weights[CONTROL + n] for n in x}
        c_i = {n: task.state.get(CONTROL + n, torch.zeros_like(t)) for n, t in x.items()}
        device = next(task.model.parameters()).device
        shift = {n: (c[n] - c_i[n]).to(device) for n in x}
        taken = 0  # steps: under BatchNorm a last batch of one is none

        def corrected(_: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> Sequence[Tensor]:
            nonlocal taken
            taken += 1
            return [g + shift[n] for n, g in gradients.items()]

        task.load(x)
        [recipe] = cls.recipes(task.config, list(x), task.round)
        loss = task.sgd([recipe], gradient_hook=corrected)
        y = weights_of(task.model)
        if taken:
            steps = effective_steps(taken, recipe.momentum)
            change = {n: -c[n] + (x[n] - y[n]) / (steps * recipe.learning_rate) for n in x}
        else:  # its gradients are as unknown as before
            change = {n: torch.zeros_like(t) for n, t in x.items()}
        kept = {CONTROL + n: c_i[n] + change[n] for n in x}
        return Trained(y | {CONTROL + n: change[n] for n in x}, kept, loss)

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
        return weights
