"""FedAvgM (Hsu, Qi and Brown 2019): FedAvg whose server has momentum.

"Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification",
arXiv 1909.06335.

shared: all weights · kept: nothing · client: as FedAvg · server: m ← β m + (mean − w), w ← w + m,
with the mean weighted by training images · evaluated: the global weights on each client's test
images.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods.averaging import Shared, with_momentum
from pfedgpa_app.methods.fedavg import FedAvg


@dataclass(frozen=True)
class FedAvgMSettings(MethodSettings):
    """The server's momentum."""

    momentum: float = setting(
        0.9, "β, the server's momentum", low=0, high=0.999, grid=(0.3, 0.5, 0.7, 0.9)
    )


@dataclass
class FedAvgMState(Shared):
    """The global weights, and the server's velocity m."""

    velocity: Weights = field(default_factory=dict)


class FedAvgM(FedAvg):
    """One model for all clients, which momentum keeps moving in its past direction."""

    title = "FedAvgM"
    settings = FedAvgMSettings
    tuned = ("learning-rate", "momentum")
    state: FedAvgMState

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> FedAvgMState:
        return FedAvgMState(initial)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        before, state = self.state.global_weights, self.state
        super().aggregate(server_round, uploads)
        beta = self.config.of(FedAvgMSettings).momentum
        if beta:
            state.global_weights, state.velocity = with_momentum(
                before, state.global_weights, state.velocity, beta
            )
