"""FedRep (Collins et al. 2021, Algorithm 1): first the head learns, then the shared body.

"Exploiting Shared Representations for Personalized Federated Learning", arXiv 2102.07078.

shared: the body · kept: the last layer, on the client · client: head-epochs on the head while the
body is fixed, then body-epochs on the body while the head is fixed · server: the plain mean of
the bodies · evaluated: the global body under the client's own head; after fine-tuning: with the
head trained for another ``fine-tune-epochs``, as the authors' code does after the last round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.weights import body, last_layers
from pfedgpa_app.methods.averaging import Averaging, Shared
from pfedgpa_app.training.evaluation import FineTuning
from pfedgpa_app.training.sgd import Recipe, recipe


@dataclass(frozen=True)
class FedRepSettings(MethodSettings):
    """How a round is divided between head and body."""

    head_epochs: int = setting(
        10,
        "τ, epochs in which the head trains and the body does not, in place of local-epochs",
        low=0,
    )
    body_epochs: int = setting(
        1, "epochs after that, in which the body trains and the head does not", low=1
    )
    fine_tune_epochs: int = setting(
        10, "epochs in which the head is fine-tuned after the last round", low=0
    )


class FedRep(Averaging[Shared]):
    """Clients share a representation and fit their own head to it."""

    title = "FedRep"
    settings = FedRepSettings
    fine_tuning = "own"
    uniform = True
    unused: ClassVar = {"local-epochs": "they use fedrep.head-epochs and fedrep.body-epochs"}

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        return body(names)

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        own, rate = config.of(FedRepSettings), cls.learning_rate(config, server_round)
        return [
            recipe(config, own.head_epochs, rate, last_layers(names, 1)),
            recipe(config, own.body_epochs, rate, body(names)),
        ]

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning:
        epochs = config.of(FedRepSettings).fine_tune_epochs
        return FineTuning(epochs, cls.learning_rate(config), "head")
