"""Ditto (Li et al. 2021, Algorithm 1): a global model, and a personal one that is held near it.

"Ditto: Fair and Robust Federated Learning Through Personalization", arXiv 2012.04221.

shared: all weights · kept: the personal weights v, on the client · client: local-epochs of SGD
on the global weights w, and as many on F_i(v) + (λ/2)‖v − w‖², w being its download · server:
FedAvg's mean (the paper leaves the aggregator open) · evaluated: v; a client that was never
sampled has none yet and is evaluated with w.

With λ = 0, v is what local-only trains; with λ·η = 1 and plain SGD, v stays one step from w.
"""

from __future__ import annotations

from dataclasses import dataclass

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.methods.averaging import Averaging, Shared, refuse_overshooting
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training.sgd import pull_to


@dataclass(frozen=True)
class DittoSettings(MethodSettings):
    """How near personal weights stay."""

    lam: float = setting(
        1.0, "λ, weight of the distance to the global weights", low=0, grid=(0.01, 0.1, 1.0)
    )


class Ditto(Averaging[Shared]):
    """FedAvg, and beside it a personal model for each client."""

    title = "Ditto"
    settings = DittoSettings
    step_sizes = ("lam",)
    tuned = ("lam",)

    @classmethod
    def check(cls, config: Config) -> None:
        rate = cls.learning_rate(config)
        refuse_overshooting("ditto.lam", config.of(DittoSettings).lam, rate, config.momentum)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        recipes = cls.recipes(task.config, list(task.weights), task.round)
        personal = dict(task.state) or weights_of(task.model)  # at first: from the run's seed
        task.load(personal)
        held = pull_to(task.weights, task.config.of(DittoSettings).lam)
        task.sgd(recipes, gradient_hook=held)
        personal = weights_of(task.model)
        task.load(task.weights)
        loss = task.sgd(recipes)
        return Trained(weights_of(task.model), personal, loss)
