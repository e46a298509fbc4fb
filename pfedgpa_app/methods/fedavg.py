"""FedAvg (McMahan et al. 2017, Algorithm 1), alone and with local fine-tuning.

shared: all weights · kept: nothing · client: local-epochs of SGD from the global weights ·
server: the mean weighted by training images · evaluated: the global weights on each
client's test images; with fine-tuning: each client's fine-tuned copy, discarded afterwards.

FedAvg-FT has three definitions in the wild. Ours fine-tunes the whole network: "as in
training" takes a round's epochs and learning rate (FedPAC), "tuned" those that the clients'
pooled validation images choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from pfedgpa_app.config import Config
from pfedgpa_app.diffusion.buffer import Buffer
from pfedgpa_app.diffusion.fit import WeightDistribution
from pfedgpa_app.methods.base import Method, Upload
from pfedgpa_app.models import Weights


@dataclass
class FedAvgState:
    """What FedAvg's server knows: the mean, and the newest uploads for those who learn from them.

    ``generated`` and ``fitted`` are pFedGPA's; they stay empty under FedAvg's rounds.
    """

    global_weights: Weights
    buffer: Buffer
    generated: dict[int, Weights] = field(default_factory=dict)
    fitted: WeightDistribution | None = None


def weighted_mean(uploads: dict[int, Upload]) -> Weights:
    """Σ_i n_i w_i / Σ_i n_i, summed in float64 in the order of the clients."""
    total = sum(upload.examples for upload in uploads.values())
    first = next(iter(uploads.values())).weights
    mean = {}
    for name, like in first.items():
        summed = torch.zeros(like.shape, dtype=torch.float64)
        for upload in uploads.values():
            summed += upload.weights[name].double() * (upload.examples / total)
        mean[name] = summed.to(like.dtype)
    return mean


class FedAvg(Method[FedAvgState]):
    """One model for all clients."""

    title = "FedAvg"
    rounds = "fedavg"

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> FedAvgState:
        return FedAvgState(initial, Buffer(config.pfedgpa.buffer_rounds))

    def expected_upload(self) -> Weights:
        return self.state.global_weights

    def download(self, client: int) -> Weights:
        return self.state.global_weights

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        self.state.global_weights = weighted_mean(uploads)
        for client, upload in uploads.items():
            self.state.buffer.add(server_round, client, upload.weights)
        self.state.buffer.drop_old(server_round)


class FedAvgFT(FedAvg):
    """FedAvg, then each client fine-tunes as it trains in a round."""

    title = "FedAvg-FT (as in training)"
    weights_from = "fedavg"
    fine_tuning = "training"


class FedAvgFTTuned(FedAvg):
    """FedAvg, then each client fine-tunes as validation images chose for all."""

    title = "FedAvg-FT (tuned)"
    weights_from = "fedavg"
    fine_tuning = "tuned"
