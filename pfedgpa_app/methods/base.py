"""What a method is: rounds, and clients' own weights made from what they came to.

``Rounds`` are a federation: a server half over explicit state, and a client half over what the
client itself keeps. A ``Personaliser`` makes every client's weights from the final state of some
rounds, which several of them may share. A plain ``Method`` is both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import RESULTS, MethodSettings
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.diffusion.network import Progress, silent
from pfedgpa_app.models.networks import load, weight_names, weights_of
from pfedgpa_app.training import sgd
from pfedgpa_app.training.evaluation import FineTuning
from pfedgpa_app.training.sgd import Recipe

S = TypeVar("S")
TRAINED, NOTHING, OTHER = "trained", "nothing", "other"  # what clients may send


@dataclass(frozen=True)
class Trained:
    """What a round on a client comes to."""

    upload: Weights  # what it sends
    state: Weights  # what it keeps for its next round
    loss: float  # mean over its training images


@dataclass(frozen=True)
class ClientTask:
    """Everything that a client half may use in one round."""

    config: Config
    weights: Weights  # as downloaded
    model: nn.Module  # the network, initialised from the run's seed
    data: ClientData
    round: int
    generator: Callable[[], torch.Generator]  # this round's draws; each call starts them afresh
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the client has kept
    rate: float = 1.0  # of learning, in units of its recipes'

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Set the network's ``weights``; those not among them stay as they are."""
        load(self.model, dict(weights))

    def sgd(self, recipes: Sequence[Recipe], **how: Any) -> float:
        """Train by one recipe after the other; ``how`` goes to ``sgd.train``.

        Returns:
            the mean loss of the last one; those that train nothing are left out.
        """
        generator, loss = self.generator(), 0.0
        for recipe in recipes:
            if not sgd.trained_of(self.model, recipe.trainable):
                continue
            slower = recipe.at(self.rate)
            loss = sgd.train(self.model, self.data.train, slower, generator, **how)
        return loss


class Rounds(Generic[S]):
    """A federation's rounds.

    Attributes:
        title: how tables call it.
        settings: the class of the method's own settings, if it has some.
        sends: what clients upload: what they downloaded, trained on; nothing; or something other,
            on which no noise for differential privacy can be.
        beside: beginnings of the names of uploaded tensors that are no trained ones of those
            downloaded under these names. An attack on updates leaves them as they are.
        adjustable: whether logit-adjustment is made to the classifier that clients are sent, if
            they are sent one.
        unused: {a setting of the run that its rounds do not go by: why not}.
    """

    title = ""
    settings: ClassVar[type[Any]] = MethodSettings
    sends: ClassVar[str] = TRAINED
    beside: ClassVar[tuple[str, ...]] = ()
    adjustable: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: Config, state: S) -> None:
        self.config, self.state = config, state

    # server half

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> Any:
        """The server's state before round 1."""
        raise NotImplementedError

    def expected_upload(self) -> Weights:
        """Tensors of the names, shapes and dtypes that a client must upload."""
        raise NotImplementedError

    def download(self, client: int) -> Weights:
        """What ``client`` is sent to train from."""
        raise NotImplementedError

    def rival(self, client: int) -> Weights | None:
        """What else ``client`` tries on its validation images, where it is asked for that."""
        return None

    def rate(self, server_round: int) -> float:
        """The learning rate that clients are asked to train at, in units of their own."""
        return 1.0

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's accepted uploads, keyed by client in rising order."""
        raise NotImplementedError

    def evaluation_download(self, client: int) -> Weights:
        """What ``client`` is sent to be evaluated."""
        return self.download(client)

    def first_download(self, clients: Sequence[int]) -> dict[int, Weights]:
        """What clients that join are sent first."""
        return {client: self.download(client) for client in clients}

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What clients that join are sent after having trained and uploaded once more.

        Nothing but their own part changes: those who were there from the start are done.
        """
        return {client: self.download(client) for client in uploads}

    def evaluation_of(self, client: int, given: Weights) -> Weights:
        """What a client that joined is sent to be evaluated; it trains from ``given``."""
        return given

    # client half. What is downloaded is shared and what else the network has is the client's
    # own; weights that are in neither place are as the run's seed initialises them.

    @staticmethod
    def start(weights: Weights, state: Mapping[str, torch.Tensor]) -> Weights:
        """What a client trains from, given its download and its own state."""
        return {**weights, **state}

    @staticmethod
    def upload(
        trained: Weights, weights: Weights, state: Mapping[str, torch.Tensor]
    ) -> tuple[Weights, Weights]:
        """What a client sends back, and what it keeps for the next round."""
        own = {name: t for name, t in trained.items() if name not in weights}
        return {name: trained[name] for name in weights}, {**state, **own}

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, torch.Tensor]) -> Weights:
        """The weights that a client is evaluated with, from its download and its own state."""
        return {**weights, **state}

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        """Of a round: its own, or the run's. Rounds after the last are those of joining."""
        own: float | None = getattr(config.of(cls.settings), "learning_rate", None)
        return own or config.learning_rate

    @classmethod
    def rate_settings(cls, name: str, config: Config) -> list[str]:
        """Which settings' learning rates its rounds go by, ``name`` being the method's."""
        own = {key.replace("_", "-"): value for key, value in vars(config.of(cls.settings)).items()}
        rates = [f"{name}.{key}" for key, v in own.items() if v and key.endswith("learning-rate")]
        return rates if own.get("learning-rate") else ["learning-rate", *rates]

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        """How a round's SGD goes, one recipe after the other.

        Args:
            names: of the network's weights, in order.
        """
        rate = cls.learning_rate(config, server_round)
        return [sgd.recipe(config, config.local_epochs, rate)]

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        """One round on a client.

        A method whose round is more than SGD by its ``recipes`` replaces this, and is then
        never batched.
        """
        task.load(cls.start(task.weights, task.state))
        loss = task.sgd(cls.recipes(task.config, weight_names(task.model), task.round))
        return Trained(*cls.upload(weights_of(task.model), task.weights, task.state), loss)

    @classmethod
    def asks_validation(cls, config: Config, server_round: int) -> bool:
        """Whether clients tell how what they were sent does on their validation images."""
        return False

    @classmethod
    def is_plain_sgd(cls) -> bool:
        """Whether a round is SGD by recipes, so that clients can train as one batched model."""
        replaced = getattr(cls.train, "__func__", cls.train)  # which may be a static method
        return bool(replaced is Rounds.train.__func__)  # type: ignore[attr-defined]


class Personaliser(Generic[S]):
    """Makes every client's weights from the final state of a federation's rounds.

    Attributes:
        of: whose rounds.
        title: how tables call it.
        settings: the class of its own settings, if it has some.
        parts: which parts of these it goes by (``setting``).
        weights_from: the method whose clients' weights it evaluates, if not its own.
        fine_tuning: which fine-tuning its after-fine-tuning accuracy means: "gentle" (the
            run's setting), "training" (as in a round), "tuned" (by validation) or "own".
        analysis_only: it uses what no server knows, and is no contender.
        is_defence: it is for federations with malicious clients; `pfedgpa compare` leaves it out.
        tuned: the main ones of its own settings, which `pfedgpa tune` searches in this order.
        progress: is told which share of ``personalise`` is done, where that takes long.
    """

    of: ClassVar[type[Rounds[Any]]]
    title = ""
    settings: ClassVar[type[Any]] = MethodSettings
    parts: ClassVar[tuple[str, ...]] = (RESULTS,)
    weights_from: ClassVar[type[Personaliser[Any]] | None] = None
    fine_tuning = "gentle"
    analysis_only = False
    is_defence = False
    tuned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config, state: S) -> None:
        """``state``: the final one of its rounds."""
        self.config, self.state = config, state
        self.rounds: Rounds[Any] = self.of(config, state)
        self.progress: Progress = silent

    @classmethod
    def rounds_class(cls) -> type[Rounds[Any]]:
        """Whose final state it makes weights from."""
        return cls.of

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what its settings' ranges alone cannot show.

        Raises:
            ConfigError: it cannot run so.
        """

    @classmethod
    def check_network(cls, config: Config, network: nn.Module) -> None:
        """Refuse a network that it cannot serve.

        Raises:
            ConfigError: why not, and what to do.
        """

    def personalise(self) -> dict[int, Weights]:
        """What every client is sent to be evaluated after the last round."""
        clients = range(self.config.num_clients)
        return {client: self.rounds.evaluation_download(client) for client in clients}

    @classmethod
    def making_seconds(cls, config: Config) -> float:
        """About how long the server takes to ``personalise``, where that takes long."""
        return 0.0

    def first_download(self, clients: Sequence[int]) -> dict[int, Weights]:
        """What clients that join are sent first."""
        return self.rounds.first_download(clients)

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What clients that join are sent after having trained and uploaded once more."""
        return self.rounds.join(uploads)

    def reference(self, client: int) -> Weights | None:
        """``client``'s own weights that its personalised ones must not merely copy, if any."""
        return None

    def learned(self) -> WeightDistribution | None:
        """The distribution of clients' weights, if it has learned one."""
        return None

    def report(self) -> dict[str, Any]:
        """What else the summary tells of it, JSON-ready."""
        return {}

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning | None:
        """How its paper fine-tunes, if it says so."""
        return None


class Method(Rounds[S], Personaliser[S]):
    """A method that has rounds of its own, and sends every client what they came to."""

    tuned: ClassVar[tuple[str, ...]] = ("learning-rate",)

    def __init__(self, config: Config, state: S) -> None:
        """``state``: of its rounds."""
        Rounds.__init__(self, config, state)
        self.rounds = self
        self.progress = silent

    @classmethod
    def rounds_class(cls) -> type[Rounds[Any]]:
        """Its own."""
        return cls
