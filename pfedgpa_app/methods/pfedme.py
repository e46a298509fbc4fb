"""pFedMe (Dinh et al. 2020, Algorithm 1): personal weights from a Moreau envelope.

"Personalized Federated Learning with Moreau Envelopes", arXiv 2006.08848.

shared: all weights · kept: the personal weights θ_i, on the client · client: at each batch K
gradient steps towards θ̃ = argmin f(θ) + (λ/2)‖θ − w_i‖², then w_i ← w_i − ηλ(w_i − θ̃); it sends
w_i, not θ · server: w ← (1 − β)w + β·(plain mean of the w_i) · evaluated: θ_i; a client that was
never sampled has none yet and is evaluated with w.

As in the authors' code, θ carries on from batch to batch and starts each round from w.
η is ``learning-rate``, the step of the inner problem ``personal-learning-rate``; momentum, which
the paper does not have, is not used. With K = 1 and ηλ = 1 the method is FedAvg without momentum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.methods.averaging import Averaging, Shared, toward
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training.sgd import cross_entropy, pull_to, sgd_step, to_train, training_batches


@dataclass(frozen=True)
class PFedMeSettings(MethodSettings):
    """The step sizes of the outer and the inner problem, and what ties these together."""

    learning_rate: float = setting(0.005, "η, step size of w_i", above=0, grid=(0.005, 0.02, 0.06))
    personal_learning_rate: float = setting(
        0.09, "learning rate of the inner problem", above=0, grid=(0.02, 0.05, 0.09)
    )
    lam: float = setting(15.0, "λ, weight of the distance to w_i", low=0)
    steps: int = setting(5, "K, inner steps on each batch", low=1)
    beta: float = setting(
        1.0, "β, how far the server's weights move to the mean of the uploads; 0: not at all", low=0
    )


class PFedMe(Averaging[Shared]):
    """Each client has personal weights, which are best for it near the global ones."""

    title = "pFedMe"
    settings = PFedMeSettings
    step_sizes = ("lam", "beta")
    tuned = ("learning-rate", "personal-learning-rate")
    unused: ClassVar = {"momentum": "its paper's inner steps use none"}

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.of(PFedMeSettings)
        if own.lam * own.learning_rate > 1:
            raise ConfigError(
                f"pfedme.lam = {own.lam:g} and pfedme.learning-rate = {own.learning_rate:g}: their "
                "product must be at most 1, or w_i oversteps θ"
            )
        if own.lam * own.personal_learning_rate >= 2:
            raise ConfigError(
                f"pfedme.lam = {own.lam:g} and pfedme.personal-learning-rate = "
                f"{own.personal_learning_rate:g}: their product must be less than 2, or inner "
                "steps overstep w_i by ever more"
            )

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        beta, mean = self.config.of(PFedMeSettings).beta, weighted_mean(uploads, uniform=True)
        self.state.global_weights = toward(self.state.global_weights, mean, beta)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        own = task.config.of(PFedMeSettings)
        task.load(task.weights)
        [recipe] = cls.recipes(task.config, list(task.weights), task.round)
        inner = replace(recipe, learning_rate=own.personal_learning_rate, momentum=0.0)
        theta = to_train(task.model)
        parameters: list[Tensor] = list(theta.values())
        w = {name: t.detach().clone() for name, t in theta.items()}
        prox = pull_to(w, own.lam)
        total, images = 0.0, 0
        for x, y in training_batches(task.model, task.data.train, recipe, task.generator()):
            for _ in range(own.steps):
                with recipe.computing(x.device):
                    loss = cross_entropy(task.model, x, y)
                gradients: Sequence[Tensor] = torch.autograd.grad(loss, parameters)
                gradients = prox(theta, dict(zip(theta, gradients, strict=True)))
                sgd_step(parameters, gradients, [None] * len(parameters), inner)
            for name, t in theta.items():
                w[name].lerp_(t.detach(), own.learning_rate * own.lam)
            total, images = total + float(loss.detach()) * len(y), images + len(y)
        kept = weights_of(task.model)
        sent = kept | {name: t.cpu() for name, t in w.items()}
        return Trained(sent, kept, total / images if images else math.nan)
