"""A client's side of each message: what it is asked, what it knows, what it answers."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from flwr.app import (
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from torch import nn

from pfedgpa_app.client import memory
from pfedgpa_app.client.adjustment import LEFT, adjusted, log_frequencies
from pfedgpa_app.client.attacks import attacks_updates, flipped, flips_labels, malicious_upload
from pfedgpa_app.config.resolve import resolve_cached
from pfedgpa_app.core.randomness import seeded, torch_generator
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import NODES, Config
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.core.weights import Weights, all_finite
from pfedgpa_app.data.client import (
    ClientData,
    check_own,
    check_same,
    load_client,
    load_own,
    load_own_client,
    load_schema,
    own_fingerprint,
    schema_of,
)
from pfedgpa_app.messages import record_of
from pfedgpa_app.methods import rounds_class
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.methods.halves import ClientHalf
from pfedgpa_app.models.build import classifier_bias, network_of, tensors_of
from pfedgpa_app.models.layout import laid_out
from pfedgpa_app.models.networks import load
from pfedgpa_app.training.evaluation import FineTuning, Score, tempered_losses
from pfedgpa_app.training.sgd import device_for, no_step_on_one

Metrics = dict[str, int | float | list[int] | list[float]]


def build_model(config: Config, schema: Schema) -> nn.Module:
    """The run's network, initialised from its seed, where the ``device`` setting says."""
    return laid_out(network_of(config, schema).to(device_for(config.device)))


def held_by(config: Config, client: int) -> ClientData:
    """What ``client`` of a simulation holds; one that flips labels takes them so."""
    data = load_client(config, client)
    if not flips_labels(config, client):
        return data
    classes = len(load_schema(config).classes)
    return replace(
        data,
        train=flipped(data.train, classes),
        validation=flipped(data.validation, classes),
    )


class ClientRequest:
    """One message to one client: what every handler needs of it."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.config: Config = resolve_cached(context.run_config).config
        asked: Any = message.content.config_records["config"]
        self._asked = asked
        self._source = str(context.node_config.get("dataset", ""))
        if (told := message.content.config_records.get("data")) is not None:
            check_same(self.config, told)
        if self.config.dataset == NODES:
            check_unchanged(self.config, self._source, context)
        self.client, self.round = int(asked["client"]), int(asked["round"])
        self.rate = float(asked.get("rate", 1.0))
        self.fine_tunings = [
            FineTuning(**each) for each in json.loads(asked.get("fine-tunings", "[]"))
        ]
        name = str(asked["method"])
        self.method = ClientHalf(name, rounds_class(name), self.round)
        records = message.content.array_records
        self.weights: Weights = self._adjusted(dict(records["arrays"].to_torch_state_dict()))
        reference = records.get("reference")
        self.reference: Weights | None = (
            self._adjusted(dict(reference.to_torch_state_dict())) if reference is not None else None
        )
        self._state_key = f"{asked['method']}.{self.client}"
        trains = message.metadata.message_type == MessageType.TRAIN
        before = self.round if trains else self.round + 1
        self.state: Weights = memory.recall(context, asked, self._state_key, before)

    def _adjustment(self, sent: Collection[str]) -> Weights:
        """To the classifier's bias, by name; {} if that is not among what it was ``sent``."""
        if not (self.config.logit_adjustment and self.method.adjustable):
            return {}
        schema = self.schema()
        bias = classifier_bias(self.config, schema)
        if bias not in sent:
            return {}
        return {bias: log_frequencies(self.data().train.labels, len(schema.classes))}

    def _adjusted(self, sent: Weights) -> Weights:
        """What it was ``sent`` as this client goes by it."""
        return adjusted(sent, self._adjustment(sent))

    def schema(self) -> Schema:
        """What its network must know of its images."""
        if self.config.dataset == NODES:
            return schema_of(load_own(self.config, self._source))
        return load_schema(self.config)

    def data(self) -> ClientData:
        """What this client holds."""
        if self.config.dataset == NODES:
            return load_own_client(self.config, self._source, self.client)
        return held_by(self.config, self.client)

    def model(self) -> nn.Module:
        """The network, as the run's seed initialises it."""
        return build_model(self.config, self.schema())

    def task(self) -> ClientTask:
        """What it needs to train."""
        model, draws = self.model(), partial(self.generator, "train")
        data, own = self.data(), (self.state, self.rate)
        return ClientTask(self.config, self.weights, model, data, self.round, draws, *own)

    def generator(self, purpose: str) -> torch.Generator:
        """Its random stream for ``purpose`` in this round."""
        return torch_generator(self.config.seed, purpose, self.round, self.client)

    def seeded(self) -> AbstractContextManager[None]:
        """Within it, what its network draws by itself (dropout) is this client's of this round."""
        return seeded(self.generator("network").initial_seed())

    def evaluated(self) -> Weights:
        """What it is evaluated with; weights not among them are as initialised."""
        network = tensors_of(self.config, self.schema())
        evaluated = self.method.evaluated(self.weights, self.state, network)
        if self._asked.get("leave"):
            self._leave(evaluated)
        return evaluated

    def _leave(self, evaluated: Weights) -> None:
        """Leave what it is ``evaluated`` with to whom the results are for, in a simulation."""
        sent = {name for name, tensor in evaluated.items() if self.weights.get(name) is tensor}
        memory.leave(self._asked, {n: t for n, t in evaluated.items() if n not in sent})
        memory.leave(self._asked, self._adjustment(sent), LEFT)

    def _before(self) -> Weights:
        """What it trained from: what it was sent, else what it kept, else as the seed made it."""
        own = tensors_of(self.config, self.schema())
        kept = {name: tensor for name, tensor in self.state.items() if name in own}
        sent = {n: t for n, t in self.weights.items() if not n.startswith(self.method.beside)}
        return {**own, **kept, **sent}

    def keep(self, state: Weights) -> None:
        """Keep ``state`` for its next round."""
        again = max(1, self.config.checkpoint_every)
        memory.keep(self.context, self._asked, self._state_key, state, self.round, again)

    def reply(self, metrics: Metrics, weights: Weights | None = None) -> Message:
        """The answer."""
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if weights is not None:
            content["arrays"] = record_of(weights)
        return Message(content, reply_to=self.message)

    def trained(self, trained: Trained) -> Message:
        """The answer to a round, if ``trained`` is what its method must make.

        A client whose training went to infinity keeps what it had before: it would never come back.
        """
        trained = self.method.checked(trained, tensors_of(self.config, self.schema()))
        weights = trained.upload
        if all(all_finite(t) for t in (*weights.values(), *trained.state.values())):
            self.keep(trained.state)
        if attacks_updates(self.config, self.client):
            generator = self.generator("attack")
            weights = malicious_upload(self.config, weights, self._before(), generator)
        added = self._adjustment(self.weights)  # nobody else goes by it
        weights = adjusted(weights, {bias: -by for bias, by in added.items()})
        metrics: Metrics = {
            "num-examples": len(self.data().train),
            "loss": float(trained.loss),
            "round": self.round,
        }
        agrees = self.context.node_config.get("share-label-counts", True)
        if self.config.share_label_counts and agrees:
            classes = len(self.schema().classes)
            counts = torch.bincount(self.data().train.labels, minlength=classes)
            metrics["label-counts"] = counts.tolist()
        if losses := self._validation_losses():
            metrics["validation-losses"] = losses
        return self.reply(metrics, weights)

    def _validation_losses(self) -> list[float]:
        """Tempered ones of what it was sent, then of what else it is to try; [] if nobody asks."""
        images = self.data().validation
        if not len(images) or not self.method.asks_validation(self.config):
            return []
        model, losses = self.model(), list[float]()
        for weights in (self.weights, self.reference):
            if weights is not None:
                load(model, self.method.start(weights, self.state))
                losses += tempered_losses(model, images)
        return losses

    def scored(self, score: Score) -> Message:
        """The answer to an evaluation."""
        return self.reply({"correct": score.correct, "loss": score.loss, "images": score.images})

    def compared(
        self, test: list[Score], validation: list[Score], agreement: int | None
    ) -> Message:
        """The answer to the final evaluation: before fine-tuning, then after each kind of it.

        ``agreement``: test images on which it predicts what the reference predicts.
        """
        metrics: Metrics = {
            "test": [score.correct for score in test],
            "test-images": test[0].images,
            "validation": [score.correct for score in validation],
            "validation-images": validation[0].images,
        }
        return self.reply(metrics | ({} if agreement is None else {"agreement": agreement}))


def check_unchanged(config: Config, source: str, context: Context) -> None:
    """Refuse data of this node's own that are not what it has gone by before in this run.

    Every message may come to a process of its own, which reads them anew.

    Raises:
        DataError: they are others.
    """
    before = context.state.config_records.get("data")
    if before is None:
        context.state["data"] = ConfigRecord(dict(own_fingerprint(config, source)))
    else:
        check_own(config, source, before)


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
        try:
            data = load_own_client(config, source, partition)
            check_unchanged(config, source, context)
            schema = schema_of(load_own(config, source))
            network = network_of(config, schema)  # which may be the user's own, and not be here
            if len(data.train) == 1 and (why := no_step_on_one(network)):
                warn_once(
                    f"partition-id={partition} has one training example, and the network's {why}: "
                    "nothing is learned here; give it more"
                )
            content["data"] = ConfigRecord(schema.as_dict())
        except (ConfigError, DataError) as error:  # Flower tells nobody whose node it was
            raise type(error)(f"partition-id={partition}: {error}") from error
    return content
