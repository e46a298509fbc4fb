"""What most servers do: keep one set of shared weights, the mean of a round's uploads."""

from __future__ import annotations

from collections.abc import Mapping
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


def weighted_mean(uploads: Mapping[int, Upload], uniform: bool = False) -> Weights:
    """Σ_i n_i w_i / Σ_i n_i, or with n_i = 1; summed in float64 in the order of the clients."""
    total = len(uploads) if uniform else sum(upload.examples for upload in uploads.values())
    first = next(iter(uploads.values())).weights
    mean = {}
    for name, like in first.items():
        summed = torch.zeros(like.shape, dtype=torch.float64)
        for upload in uploads.values():
            share = (1 if uniform else upload.examples) / total
            summed += upload.weights[name].double() * share
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
