"""Per-FedAvg (Fallah et al. 2020, Algorithm 1), first order: weights that one step adapts.

"Personalized Federated Learning: A Meta-Learning Approach", arXiv 2002.07948.

shared: all weights · kept: nothing · client: pairs of batches; θ' = θ − α∇f(θ; first), then
θ ← θ − β∇f(θ'; second), the Hessian left out (FO-MAML) · server: the plain mean · evaluated:
after one gradient step of size α on the client's training images; before it, the accuracy is a
diagnostic. The step never uses test images, as it does in the pFedMe repository's version.

β is ``learning-rate``. A round goes through the batches of local-epochs, two per step; with
α = 0 and the first of each pair left out it is FedAvg. Steps of size β have the run's momentum and
weight decay, which the paper does not have.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training.evaluation import FineTuning
from pfedgpa_app.training.sgd import cross_entropy, sgd_step, to_train, training_batches


@dataclass(frozen=True)
class PerFedAvgSettings(MethodSettings):
    """The step that clients adapt with."""

    alpha: float | None = setting(
        None,
        "α, step size of the adaptation; auto: the learning rate",
        low=0,
        grid=(0.001, 0.003, 0.01),
    )


def alpha_of(config: Config) -> float:
    """α, the step of the adaptation: as set, or else the learning rate."""
    own = config.of(PerFedAvgSettings).alpha
    return PerFedAvg.learning_rate(config) if own is None else own


class PerFedAvg(Averaging[Shared]):
    """Shared weights from which one step of its own helps each client most."""

    title = "Per-FedAvg"
    settings = PerFedAvgSettings
    step_sizes = ("alpha",)
    tuned = ("alpha", "learning-rate")
    fine_tuning = "own"
    uniform = True

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        task.load(task.weights)
        [recipe] = cls.recipes(task.config, list(task.weights), task.round)
        parameters: list[Tensor] = list(to_train(task.model).values())
        velocity: list[Tensor | None] = [None for _ in parameters]
        alpha, total, images = alpha_of(task.config), 0.0, 0
        batches = training_batches(task.model, task.data.train, recipe, task.generator())
        for x, y in batches:
            x2, y2 = next(batches, (x, y))  # an odd last batch serves as both
            theta = [p.detach().clone() for p in parameters]
            with recipe.computing(x.device):
                loss = cross_entropy(task.model, x, y)
            inner = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_sub_(parameters, inner, alpha=alpha)
            with recipe.computing(x.device):
                loss = cross_entropy(task.model, x2, y2)
            outer = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                torch._foreach_copy_(parameters, theta)
            sgd_step(parameters, outer, velocity, recipe)
            total, images = total + float(loss.detach()) * len(y2), images + len(y2)
        return Trained(weights_of(task.model), {}, total / images if images else math.nan)

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning:
        return FineTuning(1, alpha_of(config), full_batch=True)
