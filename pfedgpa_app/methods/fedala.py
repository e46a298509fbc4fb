"""FedALA (Zhang et al. 2023, Algorithm 1): each client mixes the global model into its own.

"FedALA: Adaptive Local Aggregation for Personalized Federated Learning", arXiv 2212.01197.

shared: all weights · kept: the client's own last layers, and the share W of each of their
weights that it takes from the global model · client: learns W on a part of its training images
(adaptive local aggregation: Θ̂ = Θ_old + (Θ − Θ_old)⊙W, W ← clip(W − η∇_Θ̂ L ⊙ (Θ − Θ_old), 0, 1)),
then trains from Θ̂ · server: the mean weighted by training images · evaluated: Θ̂, the newest
global model mixed by the client's newest W.

The lower layers are the global ones. W starts at 1; in a client's first mixing it is learned until
the loss is steady, later for one pass (as in the authors' code). With η = 0 the method is FedAvg.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.weights import Weights, last_layers
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.training.sgd import cross_entropy, least_batch, to_train, training_batches

SHARE = "share/"  # prefix of the name of the weight that W is for
STEADY, LOSSES, MOST_PASSES = 0.1, 10, 100  # the authors' deviation and window; our bound


@dataclass(frozen=True)
class FedALASettings(MethodSettings):
    """What is mixed, and how that is learned."""

    layers: int = setting(1, "p, the number of last layers that are mixed", low=1, grid=(1, 2))
    eta: float = setting(1.0, "η, step size of W; 0 is FedAvg", low=0)
    data_share: float = setting(
        0.8, "share of a client's training images that W is learned on", above=0, high=1
    )


def mixed(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
    """Θ̂: both models mixed by W; the global weights where the client has none of its own."""
    shares = {n.removeprefix(SHARE): w for n, w in state.items() if n.startswith(SHARE)}
    return weights | {n: state[n].lerp(weights[n], w) for n, w in shares.items()}


class FedALA(Averaging[Shared]):
    """FedAvg whose clients take from the global model only what helps them."""

    title = "FedALA"
    settings = FedALASettings
    tuned = ("layers",)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        top = last_layers(task.weights, task.config.of(FedALASettings).layers)
        state = dict(task.state)
        if state:
            state |= cls.learned_shares(task, top)
        task.load(mixed(task.weights, state))
        loss = task.sgd(cls.recipes(task.config, list(task.weights), task.round))
        trained = weights_of(task.model)
        return Trained(trained, state | {name: trained[name] for name in top}, loss)

    @classmethod
    def learned_shares(cls, task: ClientTask, top: list[str]) -> Weights:
        """Adaptive local aggregation: learn W, starting from the W that the client has kept."""
        own = task.config.of(FedALASettings)
        parameters = to_train(task.model)
        top = [name for name in top if name in parameters]  # running statistics are not mixed
        first = SHARE + top[0] not in task.state
        device = next(iter(parameters.values())).device
        change = {n: (task.weights[n] - task.state[n]).to(device) for n in top}
        share = {
            n: task.state.get(SHARE + n, torch.ones_like(task.weights[n])).to(device) for n in top
        }
        task.load(mixed(task.weights, task.state))
        [recipe, *_] = cls.recipes(task.config, list(task.weights), task.round)
        once, generator = replace(recipe, epochs=1, augment=False), task.generator()
        images = task.data.train
        held = max(least_batch(task.model), round(own.data_share * len(images)))
        sample = images[torch.randperm(len(images), generator=generator)[:held]]
        losses: list[float] = []
        loss = torch.zeros(())  # if no step is taken: BatchNorm on one example
        while len(losses) < (MOST_PASSES if first else 1):
            for x, y in training_batches(task.model, sample, once, generator):
                with recipe.computing(device):
                    loss = cross_entropy(task.model, x, y)
                gradients: tuple[Tensor, ...] = torch.autograd.grad(
                    loss, [parameters[n] for n in top]
                )
                with torch.no_grad():
                    for n, gradient in zip(top, gradients, strict=True):
                        share[n] = (share[n] - own.eta * gradient * change[n]).clamp_(0, 1)
                        parameters[n].copy_(task.state[n].to(device) + change[n] * share[n])
            losses.append(float(loss.detach()))
            if len(losses) > LOSSES and np.std(losses[-LOSSES:]) < STEADY:
                break
        return {SHARE + n: w.cpu() for n, w in share.items()}

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
        return mixed(weights, state)
