"""What most servers do: keep one set of shared weights, the mean of a round's uploads."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from pfedgpa_app.config import Config
from pfedgpa_app.methods.base import Method, Upload
from pfedgpa_app.models import Weights


@dataclass
class Shared:
    """What the server knows: the weights that clients share."""

    global_weights: Weights


S = TypeVar("S", bound=Shared)


def shares_of(counts: Sequence[float]) -> list[float]:
    """n_i / Σ_i n_i, scaled by a power of two first, lest the sum overflow; it changes no bit."""
    exponent = math.frexp(max(counts))[1]
    scaled = [math.ldexp(count, -exponent) for count in counts]
    return [count / sum(scaled) for count in scaled]


def weighted_mean(uploads: Mapping[int, Upload], uniform: bool = False) -> Weights:
    """Σ_i n_i w_i / Σ_i n_i, or with n_i = 1; summed in float64 in the order of the clients."""
    shares = shares_of([1 if uniform else upload.examples for upload in uploads.values()])
    first = next(iter(uploads.values())).weights
    mean = {}
    for name, like in first.items():
        summed = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float64))
        for upload, share in zip(uploads.values(), shares, strict=True):
            if share:  # else 0 · ∞
                summed += upload.weights[name].to(summed.dtype) * share
        mean[name] = summed.to(like.dtype)
    return mean


class Averaging(Method[S]):
    """The server of FedAvg over the weights that ``shared`` names.

    Attributes:
        uniform: clients count alike, whatever number of images they hold.
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
