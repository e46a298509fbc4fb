"""FedProx (Li et al. 2020, Algorithm 2).

"Federated Optimization in Heterogeneous Networks", arXiv 1812.06127.

shared: all weights · kept: nothing · client: SGD on F_i(θ) + (μ/2)‖θ − w‖², w being its
download · server: FedAvg's mean (with clients sampled uniformly, weighting by training images
corresponds to the paper's sampling by size) · evaluated: the global weights.
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
class FedProxSettings(MethodSettings):
    """How strongly clients are held near the global weights."""

    mu: float = setting(
        0.01, "μ, weight of the proximal term; 0 is FedAvg", low=0, grid=(0.001, 0.01, 0.1, 1.0)
    )


class FedProx(Averaging[Shared]):
    """FedAvg whose clients are held near the global weights."""

    title = "FedProx"
    settings = FedProxSettings
    step_sizes = ("mu",)
    tuned = ("mu",)

    @classmethod
    def check(cls, config: Config) -> None:
        rate = cls.learning_rate(config)
        refuse_overshooting("fedprox.mu", config.of(FedProxSettings).mu, rate, config.momentum)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        task.load(task.weights)
        held = pull_to(task.weights, task.config.of(FedProxSettings).mu)
        loss = task.sgd(
            cls.recipes(task.config, list(task.weights), task.round), gradient_hook=held
        )
        return Trained(weights_of(task.model), {}, loss)
