"""What a method is: a server half over explicit state, and a client half over the client's own.

Methods whose rounds are alike share one federation: the rounds run once, and each of them
then makes its clients' weights from the same server state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from pfedgpa_app import training
from pfedgpa_app.config import Config, sections
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.diffusion.fit import Progress, silent
from pfedgpa_app.models import Weights, load, weights_of
from pfedgpa_app.settings import MethodSettings
from pfedgpa_app.training import Recipe

S = TypeVar("S")


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply of a round."""

    weights: Weights
    examples: float  # how many training images; other people's clients may weigh otherwise
    labels: list[int] = field(default_factory=list)  # images of each class, if it shares that


@dataclass(frozen=True)
class Way:
    """A way to fine-tune after the last round."""

    epochs: int
    learning_rate: float
    part: str = "all"  # what is trained: "all", or "head", the last layer
    full_batch: bool = False  # one step an epoch, on all training images


@dataclass
class ClientTask:
    """Everything that a client half may use in one round."""

    config: Config
    weights: Weights  # as downloaded
    model: nn.Module  # the network, initialised from the run's seed
    data: ClientData
    round: int
    generator: Callable[[], torch.Generator]  # this round's draws; each call starts them afresh
    state: Weights = field(default_factory=dict)  # stays on the client between rounds

    def load(self, weights: Weights) -> None:
        """Set the network's ``weights``; those not among them stay as they are."""
        load(self.model, weights)

    def sgd(self, recipes: Sequence[Recipe], **how: Any) -> float:
        """Train by one recipe after the other; ``how`` goes to ``training.train``.

        Returns:
            the mean loss of the last one.
        """
        generator, loss = self.generator(), 0.0
        for recipe in recipes:
            loss = training.train(self.model, self.data.train, recipe, generator, **how)
        return loss


class Method(Generic[S]):
    """A personalised (or not) federated method.

    Attributes:
        title: how tables call it.
        settings: the class of its own settings, if it has some.
        rounds: the federation whose rounds it uses, itself if empty; methods that name the
            same share them.
        weights_from: the method whose clients' weights it evaluates, if not its own.
        fine_tuning: which fine-tuning its after-fine-tuning accuracy means: "gentle" (the
            run's setting), "training" (as in a round), "tuned" (by validation) or "own".
        analysis_only: it uses what no server knows, and is no contender.
        is_defence: it is for federations with malicious clients; `pfedgpa compare` leaves it out.
        tuned: the main ones of its own settings, which `pfedgpa tune` searches in this order.
        progress: is told which share of ``personalise`` is done, where that takes long.
    """

    title = ""
    settings: ClassVar[type[Any]] = MethodSettings
    rounds = ""
    weights_from: str | None = None
    fine_tuning = "gentle"
    analysis_only = False
    is_defence = False
    tuned: tuple[str, ...] = ("learning-rate",)

    def __init__(self, config: Config, state: S) -> None:
        self.config = config
        self.state = state
        self.progress: Progress = silent

    # settings

    @classmethod
    def reads(cls) -> set[str]:
        """The methods whose own settings it goes by."""
        return {name for name, kind in sections().items() if kind is cls.settings}

    @classmethod
    def overlooks(cls) -> set[str]:
        """Settings among those that have no part in its results."""
        return set()

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse what its settings' ranges alone cannot show.

        Raises:
            ConfigError: it cannot run so.
        """

    # server half

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> Any:
        """The server's state before round 1."""
        raise NotImplementedError

    @classmethod
    def federation(cls, config: Config) -> str:
        """The name of the federation whose rounds this method needs; "" for its own."""
        return cls.rounds

    def expected_upload(self) -> Weights:
        """Tensors of the names, shapes and dtypes that a client must upload."""
        raise NotImplementedError

    def download(self, client: int) -> Weights:
        """What ``client`` is sent to train from."""
        raise NotImplementedError

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's accepted uploads, keyed by client in rising order."""
        raise NotImplementedError

    def evaluation_download(self, client: int) -> Weights:
        """What ``client`` is sent to be evaluated."""
        return self.download(client)

    def personalise(self) -> dict[int, Weights]:
        """What every client is sent to be evaluated after the last round."""
        return {c: self.evaluation_download(c) for c in range(self.config.num_clients)}

    @classmethod
    def making_seconds(cls, config: Config) -> float:
        """About how long the server takes to ``personalise``, where that takes long."""
        return 0.0

    def welcome(self, clients: Sequence[int]) -> dict[int, Weights]:
        """What clients that join are sent first."""
        return {client: self.download(client) for client in clients}

    def admit(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What clients that join are sent after having trained and uploaded once more.

        Nothing but their own part changes: those who were there from the start are done.
        """
        return {client: self.download(client) for client in uploads}

    def reference(self, client: int) -> Weights | None:
        """``client``'s own weights that its personalised ones must not merely copy, if any."""
        return None

    def report(self) -> dict[str, Any]:
        """What else the summary tells of it, JSON-ready."""
        return {}

    # client half. What is downloaded is shared and what else the network has is the client's
    # own; weights that are in neither place are as the run's seed initialises them.

    @staticmethod
    def start(weights: Weights, state: Weights) -> Weights:
        """What a client trains from, given its download and its own state."""
        return weights | state

    @staticmethod
    def upload(trained: Weights, weights: Weights, state: Weights) -> Weights:
        """What a client sends back; what it keeps for the next round goes into ``state``."""
        state.update({name: t for name, t in trained.items() if name not in weights})
        return {name: trained[name] for name in weights}

    @staticmethod
    def evaluated(weights: Weights, state: Weights) -> Weights:
        """The weights that a client is evaluated with, from its download and its own state."""
        return weights | state

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        """Of a round: its own, or the run's. Rounds after the last are those of joining."""
        own: float | None = getattr(config.of(cls.settings), "learning_rate", None)
        return own or config.learning_rate

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        """How a round's SGD goes, one recipe after the other.

        Args:
            names: of the network's weights, in order.
        """
        rate = cls.learning_rate(config, server_round)
        return [training.recipe(config, config.local_epochs, rate)]

    @classmethod
    def train(cls, task: ClientTask) -> tuple[Weights, float]:
        """One round on a client: what it uploads, and its training loss.

        A method whose round is more than SGD by its ``recipes`` replaces this, and is then
        never batched.
        """
        task.load(cls.start(task.weights, task.state))
        loss = task.sgd(cls.recipes(task.config, list(task.model.state_dict()), task.round))
        return cls.upload(weights_of(task.model), task.weights, task.state), loss

    @classmethod
    def is_plain_sgd(cls) -> bool:
        """Whether a round is SGD by recipes, so that clients can train as one batched model."""
        return cls.train.__func__ is Method.train.__func__  # type: ignore[attr-defined]

    @classmethod
    def own_fine_tuning(cls, config: Config) -> Way | None:
        """How its paper fine-tunes, if it says so."""
        return None
