"""FedBABU (Oh et al. 2022, Algorithm 1): the body is trained under a head that never moves.

"FedBABU: Towards Enhanced Representation for Federated Image Classification", arXiv 2106.06042.

shared: the body · kept: nothing; the head is the same for all, as the run's seed initialises it ·
client: local-epochs of SGD on the body only · server: the body's mean, weighted by training
images · evaluated: after fine-tuning the whole network; before it, the accuracy is a diagnostic.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, MethodSettings, setting
from pfedgpa_app.core.weights import Weights, body
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.models.networks import weight_names
from pfedgpa_app.training.evaluation import FineTuning
from pfedgpa_app.training.sgd import Recipe, recipe, trained_of


@dataclass(frozen=True)
class FedBABUSettings(MethodSettings):
    """How the whole network is fine-tuned after the last round."""

    fine_tune_epochs: int = setting(5, "epochs of fine-tuning", low=0)
    fine_tune_learning_rate: float = setting(0.001, "its learning rate", above=0)


class FedBABU(Averaging[Shared]):
    """Clients share a body that is trained under a random, fixed classifier."""

    title = "FedBABU"
    settings = FedBABUSettings
    fine_tuning = "own"

    @classmethod
    def check_network(cls, config: Config, network: nn.Module) -> None:
        if not trained_of(network, body(weight_names(network))):
            raise ConfigError(
                "fedbabu: trains the layers below the network's last one, but none of them is "
                "trainable; leave fedbabu out"
            )

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        return body(names)

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        rate = cls.learning_rate(config, server_round)
        return [recipe(config, config.local_epochs, rate, body(names))]

    @staticmethod
    def upload(
        trained: Weights, weights: Weights, state: Mapping[str, Tensor]
    ) -> tuple[Weights, Weights]:
        return {name: trained[name] for name in weights}, {}

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning:
        own = config.of(FedBABUSettings)
        return FineTuning(own.fine_tune_epochs, own.fine_tune_learning_rate)
