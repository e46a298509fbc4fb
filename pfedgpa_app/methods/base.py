"""What a method is: a federation's rounds, and clients' own weights made from their final state.

``Rounds`` are a federation: the server half works on explicit state, the client half on what the
client itself keeps. A ``Personaliser`` makes every client's weights from the final state of some
rounds; several personalisers may share these rounds. A ``Method`` is both.
"""

from __future__ import annotations

import math
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

# what a method's `fine_tuning` may be
FINE_TUNINGS = ("default", "training", "tuned", "own")
S = TypeVar("S")
TRAINED, NOTHING, OTHER = "trained", "nothing", "other"  # what clients upload: see ``Rounds.sends``


@dataclass(frozen=True)
class Trained:
    """What a client returns after training in a round."""

    upload: Weights  # what the client sends to the server
    state: Weights  # what the client keeps for its next round
    loss: float  # mean over the client's training images; NaN if it took no step


@dataclass(frozen=True)
class ClientTask:
    """Everything that a client half may use in one round."""

    config: Config
    weights: Weights  # as downloaded
    model: nn.Module  # the network, initialised from the run's seed
    data: ClientData
    round: int
    generator: Callable[[], torch.Generator]  # this round's draws; each call restarts them
    state: Mapping[str, torch.Tensor] = field(default_factory=dict)  # what the client has kept
    rate: float = 1.0  # factor on the learning rates of the recipes

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Load ``weights`` into the network; its other weights stay as they are."""
        load(self.model, dict(weights))

    def sgd(self, recipes: Sequence[Recipe], **how: Any) -> float:
        """Train by each recipe in turn; ``how`` is passed on to ``sgd.train``.

        Recipes that train nothing are skipped.

        Returns:
            the mean loss under the last recipe; NaN if all are skipped.
        """
        generator, loss = self.generator(), math.nan
        for recipe in sgd.phases(self.model, recipes, self.rate):
            loss = sgd.train(self.model, self.data.train, recipe, generator, **how)
        return loss


class Rounds(Generic[S]):
    """The rounds of a federation.

    Attributes:
        title: the name in tables.
        settings: the class of the method's own settings, if it has any.
        sends: what clients upload: the downloaded weights after training (``TRAINED``), nothing
            (``NOTHING``), or something else (``OTHER``), to which no noise for differential
            privacy can be added.
        beside: prefixes of the names of uploaded tensors that are not the trained versions of
            downloaded ones. Attacks on updates leave these tensors as they are, and screening
            does not measure them.
        adjustable: whether logit-adjustment applies to the classifier that clients are sent, if
            they are sent one.
        unused: {a setting of the run that these rounds ignore: why}.
        step_sizes: its own settings, beside learning rates, by which training diverges if they are
            too large.
    """

    title = ""
    settings: ClassVar[type[Any]] = MethodSettings
    sends: ClassVar[str] = TRAINED
    beside: ClassVar[tuple[str, ...]] = ()
    adjustable: ClassVar[bool] = True
    unused: ClassVar[Mapping[str, str]] = {}
    step_sizes: ClassVar[tuple[str, ...]] = ()

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
        """Other weights that ``client`` tries on its validation images, if it is asked to."""
        return None

    def rate(self, server_round: int) -> float:
        """The factor on clients' own learning rates in a round."""
        return 1.0

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's accepted uploads, keyed by client in rising order."""
        raise NotImplementedError

    def evaluation_download(self, client: int) -> Weights:
        """What ``client`` is sent to be evaluated with."""
        return self.download(client)

    def first_download(self, clients: Sequence[int]) -> dict[int, Weights]:
        """What each joining client is sent first."""
        return {client: self.download(client) for client in clients}

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What joining clients are sent after they have trained and uploaded once more.

        Only the state of these clients may change: those that took part from the start are done.
        """
        return {client: self.download(client) for client in uploads}

    def evaluation_of(self, client: int, given: Weights) -> Weights:
        """What a joining client, which trains from ``given``, is sent to be evaluated with."""
        return given

    # client half: downloaded weights are shared, the network's other weights are the client's own,
    # and weights that the client has from neither source are as the run's seed initialises them

    @staticmethod
    def start(weights: Weights, state: Mapping[str, torch.Tensor]) -> Weights:
        """The weights that a client trains from, given its download and its own state."""
        return {**weights, **state}

    @staticmethod
    def upload(
        trained: Weights, weights: Weights, state: Mapping[str, torch.Tensor]
    ) -> tuple[Weights, Weights]:
        """What a client uploads after training, and what it keeps for its next round."""
        own = {name: t for name, t in trained.items() if name not in weights}
        return {name: trained[name] for name in weights}, {**state, **own}

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, torch.Tensor]) -> Weights:
        """The weights that a client is evaluated with, from its download and its own state."""
        return {**weights, **state}

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        """The learning rate of a round: the method's own if it is set, else the run's.

        In rounds after the run's last, clients join.
        """
        own: float | None = getattr(config.of(cls.settings), "learning_rate", None)
        return own or config.learning_rate

    @classmethod
    def rate_settings(cls, name: str, config: Config) -> list[str]:
        """The settings that hold the rounds' learning rates; ``name`` is the method's name."""
        own = {key.replace("_", "-"): value for key, value in vars(config.of(cls.settings)).items()}
        rates = [f"{name}.{key}" for key, v in own.items() if v and key.endswith("learning-rate")]
        return rates if own.get("learning-rate") else ["learning-rate", *rates]

    @classmethod
    def suspects(cls, name: str, config: Config) -> list[str]:
        """The settings to lower where training diverges: rates, and steps that are not default."""
        own, usual = config.of(cls.settings), cls.settings()
        steps = [
            s
            for s in cls.step_sizes
            if getattr(own, (key := s.replace("-", "_"))) != getattr(usual, key)
        ]
        return [*cls.rate_settings(name, config), *(f"{name}.{step}" for step in steps)]

    @classmethod
    def recipes(cls, config: Config, names: Sequence[str], server_round: int) -> list[Recipe]:
        """The recipes by which a client trains in a round, one after the other.

        Args:
            names: the names of the network's weights, in order.
        """
        rate = cls.learning_rate(config, server_round)
        return [sgd.recipe(config, config.local_epochs, rate)]

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        """Train in one round on a client.

        A method whose round is more than SGD by its ``recipes`` overrides this; its clients are
        then never trained together as one batched model.
        """
        task.load(cls.start(task.weights, task.state))
        loss = task.sgd(cls.recipes(task.config, weight_names(task.model), task.round))
        return Trained(*cls.upload(weights_of(task.model), task.weights, task.state), loss)

    @classmethod
    def asks_validation(cls, config: Config, server_round: int) -> bool:
        """Whether clients report the losses of what they are sent on their validation images."""
        return False

    @classmethod
    def is_plain_sgd(cls) -> bool:
        """Whether a round is SGD by recipes, so that clients can train as one batched model."""
        replaced = getattr(cls.train, "__func__", cls.train)  # which may be a static method
        return bool(replaced is Rounds.train.__func__)  # type: ignore[attr-defined]


class Personaliser(Generic[S]):
    """Makes every client's weights from the final state of a federation's rounds.

    Attributes:
        of: the rounds from whose final state it makes weights.
        title: the name in tables.
        settings: the class of its own settings, if it has any.
        parts: the parts of these settings (see ``setting``) that it uses.
        weights_from: the method whose clients' weights it evaluates, if not its own.
        fine_tuning: the fine-tuning that its accuracy after fine-tuning refers to, one of
            ``FINE_TUNINGS``: the run's setting, as in a round, chosen by validation, or as
            ``own_fine_tuning`` says.
        analysis_only: whether it uses what no server knows, so that it cannot count as the best.
        is_defence: whether it is for federations with malicious clients; `pfedgpa compare` leaves
            it out.
        tuned: its main settings, which `pfedgpa tune` searches in this order.
        progress: is called with the share of ``personalise`` that is done, where that takes long.
    """

    of: ClassVar[type[Rounds[Any]]]
    title = ""
    settings: ClassVar[type[Any]] = MethodSettings
    parts: ClassVar[tuple[str, ...]] = (RESULTS,)
    weights_from: ClassVar[type[Personaliser[Any]] | None] = None
    fine_tuning = "default"
    analysis_only = False
    is_defence = False
    tuned: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config, state: S) -> None:
        """``state``: the final state of its rounds."""
        self.config, self.state = config, state
        self.rounds: Rounds[Any] = self.of(config, state)
        self.progress: Progress = silent

    @classmethod
    def rounds_class(cls) -> type[Rounds[Any]]:
        """The rounds from whose final state it makes weights."""
        return cls.of

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse settings with which it cannot run, beyond what their ranges exclude.

        Raises:
            ConfigError: the message says which, and why.
        """

    @classmethod
    def check_network(cls, config: Config, network: nn.Module) -> None:
        """Refuse a network that the method cannot train.

        Raises:
            ConfigError: the message says why, and what to do.
        """

    def personalise(self) -> dict[int, Weights]:
        """What every client is sent to be evaluated with after the last round."""
        clients = range(self.config.num_clients)
        return {client: self.rounds.evaluation_download(client) for client in clients}

    @classmethod
    def making_seconds(cls, config: Config) -> float:
        """Roughly how many seconds ``personalise`` takes on the server; 0 where it is quick."""
        return 0.0

    def first_download(self, clients: Sequence[int]) -> dict[int, Weights]:
        """What each joining client is sent first."""
        return self.rounds.first_download(clients)

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """What joining clients are sent after they have trained and uploaded once more."""
        return self.rounds.join(uploads)

    def reference(self, client: int) -> Weights | None:
        """The weights of ``client``, if any, that its personalised ones must not merely copy."""
        return None

    def learned(self) -> WeightDistribution | None:
        """The distribution of clients' weights, if the method has learned one."""
        return None

    def report(self) -> dict[str, Any]:
        """Further entries of the run's summary, ready for JSON."""
        return {}

    @classmethod
    def own_fine_tuning(cls, config: Config) -> FineTuning | None:
        """How the method's paper fine-tunes, if it says so."""
        return None


class Method(Rounds[S], Personaliser[S]):
    """A method with rounds of its own, which sends every client the weights that they end with."""

    tuned: ClassVar[tuple[str, ...]] = ("learning-rate",)

    def __init__(self, config: Config, state: S) -> None:
        """``state``: the state of its rounds."""
        Rounds.__init__(self, config, state)
        self.rounds = self
        self.progress = silent

    @classmethod
    def rounds_class(cls) -> type[Rounds[Any]]:
        """The method's own class."""
        return cls
