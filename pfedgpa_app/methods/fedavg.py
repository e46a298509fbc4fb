"""FedAvg (McMahan et al. 2017, Algorithm 1), alone and with local fine-tuning.

shared: all weights · kept: nothing · client: local-epochs of SGD from the global weights ·
server: the mean weighted by training images · evaluated: the global weights on each
client's test images; with fine-tuning: each client's fine-tuned copy, discarded afterwards.

FedAvg-FT has three definitions in the wild. The default fine-tunes the whole network as a
round trains it (FedPAC's code); FedRep's code is fine-tune-part=head, fine-tune-epochs=10,
FedBABU's fine-tune-epochs=5, fine-tune-learning-rate=0.001. "Tuned" takes the epochs and the
learning rate that the clients' pooled validation images choose.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from pfedgpa_app.config import Config, keys
from pfedgpa_app.diffusion.buffer import Buffer
from pfedgpa_app.diffusion.fit import WeightDistribution
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.methods.base import Upload, Way
from pfedgpa_app.models import Weights
from pfedgpa_app.settings import setting


@dataclass
class FedAvgState(Shared):
    """What FedAvg's server knows: the mean, and the newest uploads for those who learn from them.

    ``velocity`` is the server's momentum. ``rank``, ``generated``, ``admitted`` and ``fitted`` are
    pFedGPA's: the latent rank chosen before the first generation, what clients train from, what
    those that join were sent last, and what the last generation learned. ``labels``: class counts
    of clients that share them.
    """

    buffer: Buffer
    velocity: Weights = field(default_factory=dict)
    rank: int | None = None
    generated: dict[int, Weights] = field(default_factory=dict)
    admitted: dict[int, Weights] = field(default_factory=dict)
    labels: dict[int, list[int]] = field(default_factory=dict)
    fitted: WeightDistribution | None = None


class FedAvg(Averaging[FedAvgState]):
    """One model for all clients."""

    title = "FedAvg"
    rounds = "fedavg"

    @classmethod
    def reads(cls) -> set[str]:
        return super().reads() | {"pfedgpa"}  # how many uploads are kept

    @classmethod
    def overlooks(cls) -> set[str]:
        return {name for name in keys() if name.startswith("pfedgpa.")} - {"pfedgpa.buffer-rounds"}

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> FedAvgState:
        return FedAvgState(initial, Buffer(config.pfedgpa.buffer_rounds))

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        joining = server_round > config.num_server_rounds
        return super().learning_rate(config, server_round) * (config.join_rate if joining else 1)

    def admit(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What they uploaded: they fine-tune the global weights."""
        return {client: upload.weights for client, upload in uploads.items()}

    @classmethod
    def momentum(cls, config: Config, server_round: int) -> float:
        """β of the server at the end of a round."""
        return 0.0

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        before, beta = self.state.global_weights, self.momentum(self.config, server_round)
        super().aggregate(server_round, uploads)
        if beta:
            self.state.velocity = {
                name: mean - before[name] + beta * self.state.velocity.get(name, 0)
                for name, mean in self.state.global_weights.items()
            }
            self.state.global_weights = {
                name: before[name] + step for name, step in self.state.velocity.items()
            }
        for client, upload in uploads.items():
            if upload.labels:
                self.state.labels[client] = upload.labels
            self.state.buffer.add(server_round, client, upload.weights)
        self.state.buffer.drop_old(server_round)


@dataclass(frozen=True)
class FedAvgFTSettings:
    """How FedAvg-FT fine-tunes."""

    fine_tune_epochs: int | None = setting(None, "epochs of fine-tuning; auto: local-epochs", low=0)
    fine_tune_learning_rate: float | None = setting(
        None, "its learning rate; auto: the run's", above=0
    )
    fine_tune_part: str = setting(
        "all", "what is fine-tuned: the network, or its last layer", choices=("all", "head")
    )


class FedAvgFT(FedAvg):
    """FedAvg, then each client fine-tunes as it trains in a round."""

    title = "FedAvg-FT (as in training)"
    settings = FedAvgFTSettings
    weights_from = "fedavg"
    fine_tuning = "own"

    @classmethod
    def own_fine_tuning(cls, config: Config) -> Way:
        own = config.of(FedAvgFTSettings)
        epochs = config.local_epochs if own.fine_tune_epochs is None else own.fine_tune_epochs
        rate = own.fine_tune_learning_rate or config.learning_rate
        return Way(epochs, rate, own.fine_tune_part)


class FedAvgFTTuned(FedAvg):
    """FedAvg, then each client fine-tunes as validation images chose for all."""

    title = "FedAvg-FT (tuned)"
    weights_from = "fedavg"
    fine_tuning = "tuned"
