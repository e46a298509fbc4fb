"""FedAvg-FT: each client fine-tunes FedAvg's model, and its fine-tuned copy is discarded.

shared: all weights · kept: nothing · client and server: as FedAvg · evaluated: each client's
fine-tuned copy of the global weights.

It has three definitions in the wild. The default fine-tunes the whole network as a round trains
it, but with momentum that begins anew in each epoch (FedPAC's code); FedRep's code is
fine-tune-part=head, fine-tune-epochs=10, FedBABU's fine-tune-epochs=5,
fine-tune-learning-rate=0.001. "Tuned" uses the epochs and the learning rate that do best on the
clients' pooled validation images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from pfedgpa_app.core.sections import Config, TrainingSettings
from pfedgpa_app.core.settings import setting
from pfedgpa_app.methods.averaging import Shared
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.training.evaluation import FineTuning


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


class FedAvgFT(Personaliser[Shared]):
    """FedAvg, then each client fine-tunes as it trains in a round."""

    of = FedAvg
    title = "FedAvg-FT (as in training)"
    settings = FedAvgFTSettings
    weights_from = FedAvg
    fine_tuning = "own"

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning:
        own = config.of(FedAvgFTSettings)
        epochs = config.local_epochs if own.fine_tune_epochs is None else own.fine_tune_epochs
        rate = own.fine_tune_learning_rate or config.learning_rate
        return FineTuning(epochs, rate, own.fine_tune_part)


class FedAvgFTTuned(Personaliser[Shared]):
    """FedAvg, then each client fine-tunes by the recipe that validation images choose for all."""

    of = FedAvg
    title = "FedAvg-FT (tuned)"
    weights_from = FedAvg
    fine_tuning = "tuned"


def default(config: TrainingSettings) -> FineTuning:
    """Fine-tuning by the run's own settings."""
    return FineTuning(config.fine_tune_epochs, config.fine_tune_learning_rate)


def as_in_training(config: TrainingSettings) -> FineTuning:
    """Fine-tuning as a client trains in a round."""
    return FineTuning(config.local_epochs, config.learning_rate)


def tuning_grid(config: TrainingSettings) -> list[FineTuning]:
    """The fine-tunings that validation images choose from, apart from none at all."""
    return [
        FineTuning(epochs + 1, rate)
        for rate in config.fine_tune_grid_learning_rates
        for epochs in range(config.fine_tune_grid_epochs)
    ]


def fine_tunings(config: Config, methods: Iterable[type[Personaliser[Any]]]) -> list[FineTuning]:
    """The fine-tunings that every client of a run of ``methods`` tries after the last round.

    They are the run's setting, a round's own training, what the methods' papers do, and the
    grid that validation chooses from; 0 epochs are possible.
    """
    own = [way for method in methods if (way := method.own_fine_tuning(config))]
    every = [default(config), as_in_training(config), *own, *tuning_grid(config)]
    return list(dict.fromkeys(every))
