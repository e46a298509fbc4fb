"""SCAFFOLD (Karimireddy et al. 2020, Algorithm 1, option II).

"SCAFFOLD: Stochastic Controlled Averaging for Federated Learning", arXiv 1910.06378.

shared: all weights and the server's control variate c · kept: the client's control variate c_i ·
client: SGD on gradients g − c_i + c; then c_i⁺ = c_i − c + (x − y)/(Kη) · server: the plain mean
of the clients' weights, scaled by the global step size; c ← c + Σ_S (c_i⁺ − c_i)/N with N all
clients, not those of the round · evaluated: the global weights.

An upload that does not count (late, lost or refused) changes neither c nor c_i: a client is sent
the round of its last upload that counted, and takes its newest c_i back if it has sent another
upload since.

(x − y)/(Kη) estimates the mean gradient of the round's K steps. Under momentum m the gradient of
step k moves the weights by (1 − m^{K−k+1})/(1 − m) times η over the remaining steps, so that the
sum of these factors replaces K; without momentum they are all 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods.averaging import toward
from pfedgpa_app.methods.base import OTHER, ClientTask, Method, Trained
from pfedgpa_app.models.networks import weights_of

CONTROL = "control/"  # prefix of the name of the weight that a control variate is for
_BEFORE = "before/"  # the same for its value before the client's last round
_COUNTED = "counted"  # round of a client's last upload that counted
_SENT = "sent"  # round of the client's last upload


@dataclass(frozen=True)
class ScaffoldSettings(MethodSettings):
    """The server's own step."""

    global_step: float = setting(1.0, "η_g, the server's step size", above=0)


@dataclass
class ScaffoldState:
    """The server's weights x, control variate c, and when each client's upload last counted."""

    global_weights: Weights
    control: Weights
    counted: dict[int, int] = field(default_factory=dict)


def effective_steps(steps: int, momentum: float) -> float:
    """How far a constant gradient of 1 moves the weights in ``steps`` steps, in units of η."""
    return sum((1 - momentum ** (steps - k)) / (1 - momentum) for k in range(steps))


class Scaffold(Method[ScaffoldState]):
    """FedAvg whose clients correct for the pull of their own data."""

    title = "SCAFFOLD"
    settings = ScaffoldSettings
    step_sizes = ("global-step",)
    sends = OTHER  # also changes of control variates
    beside = (CONTROL,)

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> ScaffoldState:
        return ScaffoldState(initial, {n: torch.zeros_like(t) for n, t in initial.items()})

    def expected_upload(self) -> Weights:
        control = {CONTROL + name: c for name, c in self.state.control.items()}
        return self.state.global_weights | control

    def download(self, client: int) -> Weights:
        counted = torch.tensor(self.state.counted.get(client, 0))
        return self.expected_upload() | {_COUNTED: counted}

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
        self.state.counted |= dict.fromkeys(uploads, server_round)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        c = {n.removeprefix(CONTROL): t for n, t in task.weights.items() if n.startswith(CONTROL)}
        x = {n: task.weights[n] for n in c}
        is_known = int(task.state.get(_SENT, 0)) == int(task.weights[_COUNTED])
        mine = CONTROL if is_known else _BEFORE
        c_i = {n: task.state.get(mine + n, torch.zeros_like(t)) for n, t in x.items()}
        device = next(task.model.parameters()).device
        shift = {n: (c[n] - c_i[n]).to(device) for n in x}
        taken = 0  # steps: BatchNorm takes none on a last batch of one image

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
        else:  # nothing new is known about its gradients
            change = {n: torch.zeros_like(t) for n, t in x.items()}
        kept = {CONTROL + n: c_i[n] + change[n] for n in x}
        kept |= {_BEFORE + n: c_i[n] for n in x} | {_SENT: torch.tensor(task.round)}
        return Trained(y | {CONTROL + n: change[n] for n in x}, kept, loss)

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
        return weights
