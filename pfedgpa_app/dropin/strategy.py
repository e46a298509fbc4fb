"""pFedGPA for other people's Flower apps, in the place of Flower's ``FedAvg``.

    from pfedgpa_app import PFedGPA
    strategy = PFedGPA(fraction_train=0.5)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=50)

The ClientApp stays as it is: it replies to ``train`` with one ArrayRecord and the number of its
examples. In any architecture, those tensors are generated that are floating-point, not empty and
finite at the start. Other tensors whose type can hold a mean (complex ones, masks of −inf) are
averaged; the rest (BatchNorm's counters) come from the round's largest client. A node is the same
client for the whole run.

Where Flower's FedAvg would end the run because of one reply, that reply is left out with a warning
that names its node, and the run goes on. It also goes on, as with FedAvg, after a round without a
single usable upload.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MessageType,
    Metadata,
    MetricRecord,
    RecordDict,
)
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.dropin.checks import (
    check_bases,
    check_going,
    check_share,
    checked,
    checked_norm,
    checked_settings,
    momentum_in_words,
    no_uploads,
    warn_of_losses,
    warn_of_rate,
)
from pfedgpa_app.dropin.network import Network, part, whole_networks
from pfedgpa_app.dropin.personal import Personal, new_folder
from pfedgpa_app.dropin.replies import mean_of, screened
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server

logger = logging.getLogger("flwr")


class PFedGPA(FedAvg):
    """Flower's FedAvg until the last rounds, which end with weights generated for each node.

    Nodes train on from what was generated for them; in these rounds the learning rate that they
    are sent is multiplied by ``settings.round_rate``. ``personal`` and ``personal_metrics`` are by
    partition-id for nodes that report one that no other node reports, else by node id.

    Attributes:
        personal: after ``start``, the generated weights of every node that ever uploaded.
        personal_metrics: {"before": …, "after": …}, a node's newest evaluations of the global
            weights and of the weights generated for it, as far as there are any, each with its
            round under "server-round".
        folder: where the run's weights were written, in ``save_dir``.
    """

    def __init__(
        self,
        *args: Any,
        settings: PFedGPASettings | None = None,
        rate_key: str = "lr",
        partition_key: str = "partition-id",
        loss_key: str = "train_loss",
        seed: int = 0,
        save_dir: str | Path | None = None,
        max_upload_norm: float = Config.max_upload_norm,
        **kwargs: Any,
    ) -> None:
        """Take all of FedAvg's arguments, and others.

        Args:
            settings: of the server; ``pfedgpa settings`` explains them.
            rate_key: the learning rate's name in ``train_config``. Clients that use a learning
                rate of their own train at its full size in the last rounds, which costs accuracy.
            partition_key: the metric by which clients may report their partition.
            loss_key: the metric by which clients may report their training loss, for momentum.
            seed: of the diffusion model's random draws.
            save_dir: a folder in which each run makes its own. After each round the run writes the
                global mean to it and, once generated, each node's weights, as
                ``mean.safetensors``, ``client-PARTITION.safetensors`` or ``node-ID.safetensors``.
            max_upload_norm: an upload more than this many times as large as the round's median
                (with one or two uploads: as the global mean before) is left out; 0 or inf: none is.

        Raises:
            ConfigError: an argument cannot be used, or a subclass also derives from a strategy
                that aggregates in another way.
        """
        check_bases(type(self), PFedGPA)
        super().__init__(*args, **kwargs)
        check_share(self.fraction_train)
        self.settings = checked_settings(PFedGPASettings() if settings is None else settings)
        self.seed = checked("seed", seed)
        self.max_upload_norm = checked_norm(max_upload_norm)
        self.rate_key, self.partition_key, self.loss_key = rate_key, partition_key, loss_key
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.folder: Path | None = None
        self._left, self._going = Personal(), False  # going: between the start and end of ``start``

    @property
    def personal(self) -> dict[int, ArrayRecord]:
        return self._left.nodes.by_name(self._left.weights)

    @property
    def personal_metrics(self) -> dict[int, dict[str, dict[str, Any]]]:
        return self._left.nodes.by_name(self._left.metrics)

    def summary(self) -> None:
        check_going(self._going)
        super().summary()
        config = self._server.config
        rounds = Server.first_generation(config), config.num_server_rounds
        momentum = momentum_in_words(self.settings.momentum, self.fraction_train, self.loss_key)
        logger.info("\t├──> Server momentum: %s", momentum)
        logger.info("\t└──> Weights are generated at the end of rounds %d to %d", *rounds)

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Any = None,
    ) -> Result:
        """Run as FedAvg does; the result's arrays are the global mean, nodes' own in ``personal``.

        Raises:
            ConfigError: ``settings`` do not fit that many rounds, there is nothing to generate, or
                the model cannot be written to ``save_dir``.
            NoUploadsError: no round brought a usable upload.
        """
        if num_rounds < 1:
            raise ConfigError(f"num_rounds = {num_rounds}: must be >= 1")
        network = Network(initial_arrays, self.weighted_by_key, self.loss_key)
        config = _config(self.settings, num_rounds, self.seed, self.fraction_train)
        Server.check(config)
        if self.save_dir is not None:
            self.folder = new_folder(self.save_dir, grid, network.expected)
        self._server = Server(config, Server.begin(config, network.generated))
        self._grid, self._network, self._left = grid, network, Personal()
        self._asked: list[Metadata] = []  # of messages, which have an id once they are sent
        self._evaluated: set[int] = set()  # the nodes that were sent weights of their own
        warn_of_rate(train_config, self.rate_key)
        given = (train_config, evaluate_config, evaluate_fn)
        self._going = True
        try:
            return super().start(grid, initial_arrays, num_rounds, timeout, *given)
        finally:
            self._going = False

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        check_going(self._going)
        messages = super().configure_train(server_round, arrays, config, grid)
        slower = self._server.rate(server_round)
        rate = config.get(self.rate_key)
        own = {self.rate_key: rate * slower} if isinstance(rate, (int, float)) else {}
        return self._to_nodes(messages, own)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        self._evaluated = set(self._left.weights)
        return self._to_nodes(messages, {})

    def _to_nodes(self, messages: Iterable[Message], config: dict[str, Any]) -> list[Message]:
        """Put nodes' own weights into their messages, if any were generated, and ``config``."""
        keys = self.arrayrecord_key, self.configrecord_key
        addressed = [self._left.put_into(message, *keys, config) for message in messages]
        self._asked = [message.metadata for message in addressed]
        return addressed

    def _received(
        self, server_round: int, what: str, replies: Iterable[Message]
    ) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """Usable replies by node, and what is wrong with the others; note who the nodes are."""
        asked = {sent.message_id: sent.dst_node_id for sent in self._asked if sent.message_id}
        contents, unusable = screened(list(replies), asked, self.weighted_by_key, what)
        left, state, self._asked = self._left, self._server.state, []
        for node, old in left.nodes.learn(contents, self.partition_key, self._grid).items():
            client = left.succeed(server_round, node, old, state)
            if what == MessageType.TRAIN and node in contents and client in state.generated:
                unusable[node] = "did not train from the weights of the node that it replaces"
                del contents[node]
        return contents, unusable

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's mean of the usable uploads; in the last rounds also ``personal``.

        Raises:
            NoUploadsError: this was the last round, and none brought a usable upload.
        """
        contents, unusable = self._received(server_round, MessageType.TRAIN, replies)
        server, nodes, limit = self._server, self._left.nodes, self.max_upload_norm
        uploads, wrong = self._network.uploads(contents, server.state.global_weights, limit)
        nodes.warn(f"round {server_round}, train", unusable | wrong)
        last = server_round == server.config.num_server_rounds
        if uploads:
            if not nodes.ever and self.settings.momentum is None:
                warn_of_losses(uploads, self.loss_key)
            self._learn(server_round, uploads)
        elif last and not nodes.ever:
            raise no_uploads(server_round, unusable | wrong)
        if last or (uploads and server.state.generated):
            generated = server.personalise() if last else server.state.generated
            made = whole_networks(generated, server, self._network, nodes.clients)
            logger.info("PFedGPA: round %d: generated for %d nodes", server_round, len(made))
            self._left.weights = made
        mean = self._network.record(server.state.global_weights)
        if self.folder is not None:
            self._left.keep(self.folder, server_round, mean, last)
        accepted = {node: contents[node] for node in uploads}
        metrics, odd = mean_of(accepted, self.train_metrics_aggr_fn, self.weighted_by_key)
        nodes.warn(f"round {server_round}, train", odd)
        return mean if uploads else None, metrics

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """FedAvg's mean of the usable evaluations."""
        contents, unusable = self._received(server_round, MessageType.EVALUATE, replies)
        self._left.evaluated(server_round, contents, self._evaluated)
        metrics, odd = mean_of(contents, self.evaluate_metrics_aggr_fn, self.weighted_by_key)
        self._left.nodes.warn(f"round {server_round}, evaluate", unusable | odd)
        return metrics

    def _learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's usable uploads, keyed by node."""
        self._network.learn_others(uploads)
        server, nodes = self._server, self._left.nodes
        mine = {
            nodes.client(node): part(upload, server.expected_upload())
            for node, upload in uploads.items()
        }
        server.config = dataclasses.replace(server.config, num_clients=nodes.ever)
        server.aggregate(server_round, dict(sorted(mine.items())))


def _config(settings: PFedGPASettings, rounds: int, seed: int, share: float) -> Config:
    """The server's config, where a ``share`` of the nodes takes part in each round."""
    sections = (settings,)
    return Config(num_server_rounds=rounds, seed=seed, fraction_train=share, sections=sections)
