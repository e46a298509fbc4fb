"""What a method is: a server half over explicit state, and a client half without any.

Methods whose rounds are alike share one federation: the rounds run once, and each of them
then makes its clients' weights from the same server state.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from pfedgpa_app import training
from pfedgpa_app.config import Config
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.models import Weights, weights_of
from pfedgpa_app.training import Recipe

S = TypeVar("S")


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply of a round."""

    weights: Weights
    examples: int


@dataclass
class ClientTask:
    """Everything that a client half may use in one round."""

    weights: Weights  # as downloaded
    model: nn.Module  # the network, initialised from the run's seed
    data: ClientData
    recipe: Recipe
    generator: torch.Generator
    state: Weights = field(default_factory=dict)  # stays on the client between rounds


class Method(Generic[S]):
    """A personalised (or not) federated method.

    Attributes:
        title: how tables call it.
        rounds: the federation whose rounds it uses; methods that name the same share them.
        weights_from: the method whose clients' weights it evaluates, if not its own.
        fine_tuning: which fine-tuning its after-fine-tuning accuracy means: "gentle" (the
            run's setting), "training" (as in a round) or "tuned" (by validation).
        analysis_only: it uses what no server knows, and is no contender.
    """

    title = ""
    rounds = ""
    weights_from: str | None = None
    fine_tuning = "gentle"
    analysis_only = False

    def __init__(self, config: Config, state: S) -> None:
        self.config = config
        self.state = state

    # server half

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> Any:
        """The server's state before round 1."""
        raise NotImplementedError

    @classmethod
    def federation(cls, config: Config) -> str:
        """The name of the federation whose rounds this method needs."""
        return cls.rounds

    def expected_upload(self) -> Weights:
        """Tensors of the names, shapes and dtypes that a client must upload."""
        raise NotImplementedError

    def download(self, client: int) -> Weights:
        """What ``client`` is sent: to train from, and to be evaluated with."""
        raise NotImplementedError

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's accepted uploads, keyed by client in rising order."""
        raise NotImplementedError

    def personalise(self) -> dict[int, Weights]:
        """Every client's weights after the last round."""
        return {client: self.download(client) for client in range(self.config.num_clients)}

    # client half: where local SGD starts, what becomes of its end, what is evaluated; {} stands
    # for the network as the run's seed initialises it

    @staticmethod
    def start(weights: Weights, state: Weights) -> Weights:
        """What a client trains from, given its download and its own state."""
        return weights

    @staticmethod
    def upload(trained: Weights, state: Weights) -> Weights:
        """What a client sends back; what it keeps for the next round goes into ``state``."""
        return trained

    @staticmethod
    def evaluated(weights: Weights, state: Weights) -> Weights:
        """The weights that a client is evaluated with, from its download and its own state."""
        return weights

    @classmethod
    def train(cls, task: ClientTask) -> tuple[Weights, float]:
        """One round on a client: what it uploads, and its training loss.

        A method whose round is more than this replaces it, and is then never batched.
        """
        if start := cls.start(task.weights, task.state):
            task.model.load_state_dict(start)
        loss = training.train(task.model, task.data.train, task.recipe, task.generator)
        return cls.upload(weights_of(task.model), task.state), loss

    @classmethod
    def is_plain_sgd(cls) -> bool:
        """Whether a round is SGD on all weights, so that clients can train as one batched model."""
        return cls.train.__func__ is Method.train.__func__  # type: ignore[attr-defined]
