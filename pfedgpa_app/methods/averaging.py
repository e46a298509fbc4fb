"""The server of most methods: one set of shared weights, the mean of a round's uploads."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights, is_statistic
from pfedgpa_app.methods.base import Method


@dataclass
class Shared:
    """What the server knows: the weights that clients share."""

    global_weights: Weights


S = TypeVar("S", bound=Shared)


def with_momentum(
    before: Weights, mean: Weights, velocity: Weights, beta: float
) -> tuple[Weights, Weights]:
    """The new weights w and velocity m: m ← β m + (mean − w) and w ← w + m.

    Running statistics get no momentum: they record what was seen, and a variance must not fall
    below zero. As layers may name their statistics otherwise, no tensor that is nowhere negative
    becomes negative.

    Args:
        before: w.
        velocity: m; {} before the first step.
    """
    velocity = {
        name: after - before[name] + beta * velocity.get(name, 0)
        for name, after in mean.items()
        if not is_statistic(name)
    }
    moved = {name: _moved(before[name], step, mean[name]) for name, step in velocity.items()}
    return mean | moved, velocity


def heading(before: Weights, mean: Weights, velocity: Weights) -> float:
    """Cosine of the angle between the step (mean − w) and the velocity m; 0 while m is empty."""
    dot = step_squared = velocity_squared = 0.0
    for name, earlier in velocity.items():
        step = (mean[name] - before[name]).double()
        dot += float((step * earlier).sum())
        step_squared += float(step.square().sum())
        velocity_squared += float(earlier.double().square().sum())
    length = math.sqrt(step_squared * velocity_squared)
    return dot / length if length else 0.0


def _moved(before: Tensor, step: Tensor, mean: Tensor) -> Tensor:
    """A tensor after a ``step``, but with the ``mean`` where only the step made it negative."""
    after = before + step
    if after.numel() and after.min() < 0 <= before.min() and mean.min() >= 0:
        return torch.where(after < 0, mean, after)
    return after


def toward(before: Weights, mean: Weights, step: float) -> Weights:
    """Move ``before`` by the share ``step`` of the way to the ``mean``; above 1, beyond it.

    If the step goes beyond the mean, running statistics are the mean's, as with momentum.
    """
    return {
        name: mean[name]
        if step == 1 or (step > 1 and is_statistic(name))
        else weight.lerp(mean[name], step)
        for name, weight in before.items()
    }


def refuse_overshooting(name: str, strength: float, rate: float, momentum: float) -> None:
    """Refuse a pull to other weights whose steps go past them by ever more.

    SGD with momentum β on (λ/2)‖θ − w‖² converges only if λη < 2(1 + β).

    Args:
        name: the setting that holds λ, which is ``strength``.
        rate: η.

    Raises:
        ConfigError: what is trained would go to infinity.
    """
    if strength * rate >= (most := 2 * (1 + momentum)):
        raise ConfigError(
            f"{name} = {strength:g}: times the learning rate, {rate:g}, it must be less than "
            f"{most:g} (2 + 2 momentum), or weights overstep those that hold them by ever more"
        )


class Averaging(Method[S]):
    """The server of FedAvg over the weights that ``shared`` names.

    Attributes:
        uniform: whether clients count alike, however many images they hold.
    """

    uniform = False

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        """Which of the network's weights clients share."""
        return names

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> Shared:
        return Shared({name: initial[name] for name in cls.shared(config, list(initial))})

    def expected_upload(self) -> Weights:
        return self.state.global_weights

    def download(self, client: int) -> Weights:
        return self.state.global_weights

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        self.state.global_weights = weighted_mean(uploads, self.uniform)


class Defence(Averaging[Shared]):
    """A server like FedAvg's over all weights, whose result few uploads cannot move far."""

    is_defence = True

    @classmethod
    def doubts(cls, config: Config) -> Iterator[str]:
        """Why, in a federation of this size, it guards against less than its settings promise."""
        yield from ()
