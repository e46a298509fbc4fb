"""A client's side of each message: what it is asked, what it knows, what it answers."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
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
_LOST = "this node no longer has what it kept for"


def build_model(config: Config, schema: Schema) -> nn.Module:
    """Make the run's network, initialised from its seed, where the ``device`` setting says."""
    return laid_out(network_of(config, schema).to(device_for(config.device)))


def held_by(config: Config, client: int) -> ClientData:
    """Return what ``client`` of a simulation holds.

    A client that flips labels has them flipped in its training and validation images.
    """
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
    """One message to one client, and what every handler needs to answer it."""

    def __init__(self, message: Message, context: Context) -> None:
        self.message, self.context = message, context
        self.config: Config = resolve_cached(context.run_config).config
        asked: Any = message.content.config_records["config"]
        self._asked = asked
        self._source = str(context.node_config.get("dataset", ""))
        if (told := message.content.config_records.get("data")) is not None:
            _check_data(self.config, self._source, told)
        if self.config.dataset == NODES:
            check_unchanged(self.config, self._source, context, asked)
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
        self._state_key = f"{name}.{self.client}"
        trains = message.metadata.message_type == MessageType.TRAIN
        before = self.round if trains else self.round + 1
        self.state: Weights = memory.recall(context, asked, self._state_key, before)
        self._lost = bool(asked.get("keeps")) and not self.state
        if self._lost and not trains:
            raise DataError(
                f"{_LOST} {self.method.title}: it is evaluated when it has trained anew"
            )

    def _adjustment(self, sent: Collection[str]) -> Weights:
        """Return what the client adds to the classifier's bias, by the bias's name.

        It is {} without logit adjustment, or if the bias is not among what it was ``sent``.
        """
        if not (self.config.logit_adjustment and self.method.adjustable):
            return {}
        schema = self.schema()
        bias = classifier_bias(self.config, schema)
        if bias not in sent:
            return {}
        return {bias: log_frequencies(self.data().train.labels, len(schema.classes))}

    def _adjusted(self, sent: Weights) -> Weights:
        """Return what the client was ``sent``, with its adjustment added."""
        return adjusted(sent, self._adjustment(sent))

    def schema(self) -> Schema:
        """Return what the network must know about the client's data."""
        if self.config.dataset == NODES:
            return schema_of(load_own(self.config, self._source))
        return load_schema(self.config)

    def data(self) -> ClientData:
        """Return what this client holds."""
        if self.config.dataset == NODES:
            return load_own_client(self.config, self._source, self.client)
        return held_by(self.config, self.client)

    def model(self) -> nn.Module:
        """Make the network, as the run's seed initialises it."""
        return build_model(self.config, self.schema())

    def task(self) -> ClientTask:
        """Return all that the client's method needs to train."""
        model, draws = self.model(), partial(self.generator, "train")
        data, own = self.data(), (self.state, self.rate)
        return ClientTask(self.config, self.weights, model, data, self.round, draws, *own)

    def generator(self, purpose: str) -> torch.Generator:
        """Make the client's random stream for ``purpose`` in this round."""
        return torch_generator(self.config.seed, purpose, self.round, self.client)

    def seeded(self) -> AbstractContextManager[None]:
        """In the block, seed the network's own draws (dropout) for this client and round."""
        return seeded(self.generator("network").initial_seed())

    def evaluated(self) -> Weights:
        """Return the weights that the client is evaluated with; others are as initialised."""
        network = tensors_of(self.config, self.schema())
        evaluated = self.method.evaluated(self.weights, self.state, network)
        if self._asked.get("leave"):
            own, adjustment = self._own_parts(evaluated)
            memory.leave(self._asked, own)  # beside a simulation's results
            memory.leave(self._asked, adjustment, LEFT)
        return evaluated

    def _own_parts(self, evaluated: Weights) -> tuple[Weights, Weights]:
        """Return what only this client has of ``evaluated``, and its adjustment.

        The latter is {} unless it belongs to a bias that the client was sent.
        """
        own = {name: t for name, t in evaluated.items() if self.weights.get(name) is not t}
        return own, self._adjustment(evaluated.keys() - own.keys())

    def _before(self) -> Weights:
        """Return the weights trained from: as they were sent, else kept, else initialised."""
        own = tensors_of(self.config, self.schema())
        kept = {name: tensor for name, tensor in self.state.items() if name in own}
        sent = {n: t for n, t in self.weights.items() if not n.startswith(self.method.beside)}
        return {**own, **kept, **sent}

    def keep(self, state: Weights) -> None:
        """Keep ``state`` for the client's next round."""
        again = max(1, self.config.checkpoint_every)
        memory.keep(self.context, self._asked, self._state_key, state, self.round, again)

    def reply(self, metrics: Metrics, weights: Weights | None = None) -> Message:
        """Make the reply to the message."""
        content = RecordDict({"metrics": MetricRecord(metrics)})
        if weights is not None:
            content["arrays"] = record_of(weights)
        return Message(content, reply_to=self.message)

    def trained(self, trained: Trained) -> Message:
        """Make the answer to a round; ``trained`` is checked to be what the method must return.

        A client whose training went to infinity keeps its earlier state, or it could never recover.
        """
        trained = self.method.checked(trained, tensors_of(self.config, self.schema()))
        weights, kept = trained.upload, self.state
        sent_well, kept_well = (
            all(map(all_finite, part.values())) for part in (weights, trained.state)
        )
        if sent_well and kept_well:
            self.keep(trained.state)
            kept = trained.state
        if attacks_updates(self.config, self.client):
            generator = self.generator("attack")
            weights = malicious_upload(self.config, weights, self._before(), generator)
        added = self._adjustment(self.weights)  # the adjustment is this client's alone
        weights = adjusted(weights, {bias: -by for bias, by in added.items()})
        metrics: Metrics = {
            "num-examples": len(self.data().train),
            "loss": float(trained.loss),
            "round": self.round,
            "keeps": int(bool(kept)),
        }
        if sent_well and not kept_well:  # the upload alone does not tell
            metrics["diverged"] = 1
        if self._lost and trained.state:
            warn_once(f"{_LOST} {self.method.title}, which begins anew here")
            metrics["lost"] = 1
        agrees = self.context.node_config.get("share-label-counts", True)
        if self.config.share_label_counts and agrees:
            classes = len(self.schema().classes)
            counts = torch.bincount(self.data().train.labels, minlength=classes)
            metrics["label-counts"] = counts.tolist()
        if losses := self._validation_losses():
            metrics["validation-losses"] = losses
        return self.reply(metrics, weights)

    def _validation_losses(self) -> list[float]:
        """Return tempered validation losses of the weights sent, then of any reference.

        It is [] if the method does not ask for them, or there are no validation images.
        """
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
        """Make the answer to an evaluation."""
        return self.reply({"correct": score.correct, "loss": score.loss, "images": score.images})

    def compared(
        self,
        evaluated: Weights,
        test: list[Score],
        validation: list[Score],
        agreement: int | None,
    ) -> Message:
        """Make the answer to the final evaluation: before fine-tuning, then after each kind of it.

        Args:
            evaluated: the weights before fine-tuning.
            agreement: test images on which these and the reference predict the same; None without
                a reference.
        """
        metrics: Metrics = {
            "test": [score.correct for score in test],
            "test-images": test[0].images,
            "validation": [score.correct for score in validation],
            "validation-images": validation[0].images,
            "own-part": int(any(self._own_parts(evaluated))),
        }
        return self.reply(metrics | ({} if agreement is None else {"agreement": agreement}))


def _check_data(config: Config, source: str, told: Mapping[str, Any]) -> None:
    """Refuse other data than those of which the run was ``told``.

    Raises:
        DataError: they are others, or of other classes.
    """
    if config.dataset != NODES:
        check_same(config, told)
    elif told["schema"] != schema_of(load_own(config, source)).checksum():
        raise DataError(
            "this node's data have other classes, or examples of another shape, than the run began "
            "with: start its SuperNode with the data of before"
        )


def check_unchanged(
    config: Config, source: str, context: Context, asked: Mapping[str, Any]
) -> None:
    """Refuse data of this node's own that have changed since an earlier message of this run.

    A process of its own may serve each message, and reads the data anew. If the run is resumed, or
    the SuperNode started again, only a node with a ``state-dir`` knows what it had before.

    Args:
        asked: the server's settings for this message.

    Raises:
        DataError: the data have changed.
    """
    before = memory.recall_fingerprint(context, asked)
    if before is None:
        memory.keep_fingerprint(context, asked, own_fingerprint(config, source))
    else:
        check_own(config, source, before)


def describe(message: Message, context: Context) -> RecordDict:
    """Say who a node is: its partition and, if the run uses nodes' own data, their schema.

    Raises:
        DataError: its data are absent or unusable.
        ConfigError: the run's network cannot be made here.
    """
    partition = int(context.node_config.get("partition-id", -1))
    content = RecordDict({"node": MetricRecord({"partition-id": partition})})
    config = resolve_cached(context.run_config).config
    if config.dataset == NODES:
        source = str(context.node_config.get("dataset", ""))
        try:
            data = load_own_client(config, source, partition)
            asked: Any = message.content.config_records.get("config", {})
            check_unchanged(config, source, context, asked)
            schema = schema_of(load_own(config, source))
            network = network_of(config, schema)  # the user's own may be missing here
            if len(data.train) == 1 and (why := no_step_on_one(network)):
                warn_once(
                    f"partition-id={partition} has only one training example, and the network's "
                    f"{why}: it learns nothing; give it more"
                )
            content["data"] = ConfigRecord(schema.as_dict())
        except (ConfigError, DataError) as error:  # Flower does not say which node it was
            raise type(error)(f"partition-id={partition}: {error}") from error
    return content
