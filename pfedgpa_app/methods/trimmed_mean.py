"""The trimmed mean (Yin et al. 2018), by Flower's function.

"Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates", arXiv 1803.01498.

shared: all weights · kept: nothing · client: as FedAvg · server: for each weight, the plain mean
of the uploads without a share β of the smallest and of the largest · evaluated: the global weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from flwr.serverapp.strategy.fedtrimmedavg import trim_mean

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.averaging import Defence


@dataclass(frozen=True)
class TrimmedMeanSettings(MethodSettings):
    """How much is cut off."""

    beta: float = setting(
        0.2, "β, the share of values that is cut off at either end", low=0, high=0.49
    )


class TrimmedMean(Defence):
    """A mean that few uploads cannot move far."""

    title = "trimmed mean"
    settings = TrimmedMeanSettings

    @classmethod
    def doubts(cls, config: Config) -> Iterator[str]:
        beta, uploads = config.of(TrimmedMeanSettings).beta, config.round_uploads
        if beta and int(beta * uploads) < 1:
            way = f"from {math.ceil(100 / uploads) / 100:g} on it cuts some off"
            yield (
                f"trimmed-mean.beta = {beta:g}: cuts off none of the {uploads} uploads of a round, "
                f"which leaves the plain mean; {way if uploads > 2 else 'it needs 3 or more'}"
            )

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        beta = self.config.of(TrimmedMeanSettings).beta
        every = [upload.weights for upload in uploads.values()]
        self.state.global_weights = {
            name: torch.as_tensor(
                trim_mean(torch.stack([w[name] for w in every]).numpy(), beta)
            ).to(like.dtype)
            for name, like in every[0].items()
        }
