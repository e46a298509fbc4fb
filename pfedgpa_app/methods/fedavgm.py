"""FedAvgM (Hsu, Qi and Brown 2019): FedAvg whose server has momentum.

shared: all weights · kept: nothing · client: as FedAvg · server: m ← β m + (mean − w), w ← w + m,
with the mean weighted by training images · evaluated: the global weights on each client's test
images.
"""

from __future__ import annotations

from dataclasses import dataclass

from pfedgpa_app.config import Config
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.settings import MethodSettings, setting


@dataclass(frozen=True)
class FedAvgMSettings(MethodSettings):
    """The server's momentum."""

    momentum: float = setting(
        0.9, "β, the server's momentum", low=0, high=0.999, grid=(0.3, 0.5, 0.7, 0.9)
    )


class FedAvgM(FedAvg):
    """One model for all clients, which keeps going where it went."""

    title = "FedAvgM"
    settings = FedAvgMSettings
    rounds = "fedavgm"
    tuned = ("learning-rate", "momentum")

    @classmethod
    def momentum(cls, config: Config, server_round: int) -> float:
        return config.of(FedAvgMSettings).momentum
