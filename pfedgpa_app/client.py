"""A client's side of each message: what it is asked, what it knows, what it answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from torch import nn

from pfedgpa_app import memory, training
from pfedgpa_app.attacks import malicious, spoiled
from pfedgpa_app.config import Config, resolve_cached
from pfedgpa_app.data import NODES
from pfedgpa_app.data.client import (
    ClientData,
    Schema,
    load_client,
    load_own,
    load_own_client,
    load_schema,
    schema_of,
)
from pfedgpa_app.methods import method_class
from pfedgpa_app.methods.base import ClientTask, Way
from pfedgpa_app.models import Weights, build, last_layers, load, network_name, weights_of
from pfedgpa_app.randomness import torch_generator

Metrics = dict[str, int | float | list[int] | list[float]]


def build_model(config: Config, schema: Schema) -> nn.Module:
    """The run's network, initialised from its seed, where the ``device`` setting says."""
    network = network_name(config.model, schema.shape)
    model = build(network, len(schema.classes), config.seed)
    return model.to(training.device_for(config.device)).to(memory_format=torch.channels_last)


class Visit:
    """One message to one client: what every handler needs of it."""

    def __init__(self, message: Message, context: Context) -> None:
        torch.set_num_threads(1)  # clients share the cores; more threads only contend
        self.message, self.context = message, context
        self.config: Config = resolve_cached(context.run_config).config
        asked: Any = message.content.config_records["config"]
        self._asked = asked
        self._source = str(context.node_config.get("dataset", ""))
        self.client, self.round = int(asked["client"]), int(asked["round"])
        self.ways = [Way(**way) for way in json.loads(asked.get("ways", "[]"))]
        self.method = method_class(str(asked["method"]))
        records = message.content.array_records
        self.weights: Weights = dict(records["arrays"].to_torch_state_dict())
        reference = records.get("reference")
        self.reference: Weights | None = (
            dict(reference.to_torch_state_dict()) if reference is not None else None
        )
        self._state_key = f"{asked['method']}.{self.client}"
        trains = message.metadata.message_type == MessageType.TRAIN
        before = self.round if trains else self.round + 1
        self.state = memory.recall(context, asked, self._state_key, before)

    def schema(self) -> Schema:
        """What its network must know of its images."""
        if self.config.dataset == NODES:
            return schema_of(load_own(self.config, self._source))
        return load_schema(self.config)

    def data(self) -> ClientData:
        """What this client holds."""
        if self.config.dataset == NODES:
            return load_own_client(self.config, self._source, self.client)
        return load_client(self.config, self.client)

    def model(self) -> nn.Module:
        """The network, as the run's seed initialises it."""
        return build_model(self.config, self.schema())

    def task(self) -> ClientTask:
        """What it needs to train."""
        model, draws = self.model(), partial(self.generator, "train")
        data = self.data()
        return ClientTask(self.config, self.weights, model, data, self.round, draws, self.state)

    def generator(self, purpose: str) -> torch.Generator:
        """Its random stream for ``purpose`` in this round."""
        return torch_generator(self.config.seed, purpose, self.round, self.client)

    def evaluated(self) -> Weights:
        """What it is evaluated with; weights not among them are as initialised."""
        return self.method.evaluated(self.weights, self.state)

    def keep_state(self) -> None:
        """What it keeps for its next visit."""
        again = max(1, self.config.checkpoint_every)
        memory.keep(self.context, self._asked, self._state_key, self.state, self.round, again)

    def reply(self, metrics: Metrics, weights: Weights | None = None) -> Message:
        """The answer."""
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if weights is not None:
            content["arrays"] = ArrayRecord(weights)
        return Message(content, reply_to=self.message)

    def trained(self, weights: Weights, loss: float) -> Message:
        """The answer to a round.

        A client whose training went to infinity keeps what it had before: it would never come back.
        """
        if all(t.isfinite().all() for t in (*weights.values(), *self.state.values())):
            self.keep_state()
        if self.client in malicious(self.config):
            weights = spoiled(self.config, weights, self.weights, self.generator("attack"))
        metrics: Metrics = {
            "num-examples": len(self.data().train),
            "loss": loss,
            "round": self.round,
        }
        agrees = self.context.node_config.get("share-label-counts", True)
        if self.config.share_label_counts and agrees:
            classes = len(self.schema().classes)
            counts = torch.bincount(self.data().train.labels, minlength=classes)
            metrics["label-counts"] = counts.tolist()
        return self.reply(metrics, weights)

    def scored(self, score: training.Score) -> Message:
        """The answer to an evaluation."""
        return self.reply({"correct": score.correct, "loss": score.loss, "images": score.images})

    def compared(
        self, test: list[training.Score], validation: list[training.Score], alike: int | None
    ) -> Message:
        """The answer to the final evaluation: before fine-tuning, then after each way of it.

        ``alike``: test images on which it predicts what the reference predicts.
        """
        metrics: Metrics = {
            "test": [score.correct for score in test],
            "test-images": test[0].images,
            "validation": [score.correct for score in validation],
            "validation-images": validation[0].images,
        }
        return self.reply(metrics | ({} if alike is None else {"alike": alike}))


def describe(context: Context) -> RecordDict:
    """Who a node is: its partition, and what its own data are, where a run goes by those.

    Raises:
        DataError: they are absent or unusable.
    """
    partition = int(context.node_config.get("partition-id", -1))
    content = RecordDict({"node": MetricRecord({"partition-id": partition})})
    config = resolve_cached(context.run_config).config
    if config.dataset == NODES:
        source = str(context.node_config.get("dataset", ""))
        load_own_client(config, source, partition)
        schema = schema_of(load_own(config, source))
        content["data"] = ConfigRecord(
            {"classes": list(schema.classes), "shape": list(schema.shape)}
        )
    return content


class Cohort(Protocol):
    """Clients that learn at the same time: one network each, and the images that each holds.

    Attributes:
        initial: the network's weights as the run's seed initialises them.
    """

    initial: Weights

    def load(self, weights: Sequence[Weights]) -> None:
        """Set every client's weights; those not given are as the run's seed initialises them."""

    def train(
        self, recipe: training.Recipe, generators: Sequence[torch.Generator]
    ) -> Sequence[float]:
        """Local SGD on the training images; every client's mean loss."""

    def evaluate(self, part: str) -> Sequence[training.Score]:
        """Every client's score on its own images of ``part``, a field of ``ClientData``."""

    def predict(self, part: str) -> Sequence[torch.Tensor]:
        """The class that every client's network sees in each of its images of ``part``."""


class Single:
    """A cohort of one."""

    def __init__(self, visit: Visit) -> None:
        self._data, self.model = visit.data(), visit.model()
        self.initial = weights_of(self.model)

    def load(self, weights: Sequence[Weights]) -> None:
        load(self.model, self.initial | weights[0])

    def train(
        self, recipe: training.Recipe, generators: Sequence[torch.Generator]
    ) -> Sequence[float]:
        return [training.train(self.model, self._data.train, recipe, generators[0])]

    def evaluate(self, part: str) -> Sequence[training.Score]:
        return [training.evaluate(self.model, getattr(self._data, part))]

    def predict(self, part: str) -> Sequence[torch.Tensor]:
        return [training.predict(self.model, getattr(self._data, part))]


def compare_ways(cohort: Cohort, visits: Sequence[Visit]) -> list[Message]:
    """Evaluate before fine-tuning and after each way of it; the fine-tuned copies are dropped.

    Ways that differ in their epochs only share them: two epochs go on from one.
    """
    config, ways = visits[0].config, visits[0].ways
    names = list(cohort.initial)
    before = Way(0, 0.0)
    test: dict[Way, Sequence[training.Score]] = {}
    validation: dict[Way, Sequence[training.Score]] = {}

    def score(way: Way) -> None:
        test[way], validation[way] = cohort.evaluate("test"), cohort.evaluate("validation")

    weights = [visit.evaluated() for visit in visits]
    alike = _agreement(cohort, weights, [visit.reference for visit in visits])
    cohort.load(weights)
    score(before)
    for kind in dict.fromkeys(replace(way, epochs=1) for way in ways):
        only = last_layers(names, 1) if kind.part == "head" else ()
        epoch = training.recipe(config, 1, kind.learning_rate, only)
        if kind.full_batch:
            epoch = replace(epoch, batch_size=max(len(visit.data().train) for visit in visits))
        cohort.load(weights)
        generators = [visit.generator("fine-tune") for visit in visits]
        wanted = {way.epochs for way in ways if replace(way, epochs=1) == kind}
        for done in range(max(wanted) + 1):
            if done:
                cohort.train(epoch, generators)
            if done in wanted:
                score(replace(kind, epochs=done))
    order = [before, *ways]
    return [
        visit.compared(
            [test[way][i] for way in order], [validation[way][i] for way in order], alike[i]
        )
        for i, visit in enumerate(visits)
    ]


def _agreement(
    cohort: Cohort, weights: Sequence[Weights], references: Sequence[Weights | None]
) -> list[int | None]:
    """On how many of its test images each client's weights predict what its reference does."""
    predicted = []
    if any(reference is not None for reference in references):
        pairs = zip(references, weights, strict=True)
        for each in ([mine if ref is None else ref for ref, mine in pairs], weights):
            cohort.load(each)
            predicted.append(cohort.predict("test"))
    return [
        None if reference is None else int((predicted[0][i] == predicted[1][i]).sum())
        for i, reference in enumerate(references)
    ]
