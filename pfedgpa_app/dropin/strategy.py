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
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from pfedgpa_app.config.parse import check_section
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.dropin.network import Network, part, whole_networks
from pfedgpa_app.dropin.personal import Personal, new_folder
from pfedgpa_app.dropin.replies import with_other_metrics
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server
from pfedgpa_app.server.screening import NoUploadsError

logger = logging.getLogger("flwr")
Aggregate = Callable[[list[RecordDict], str], MetricRecord]


class PFedGPA(FedAvg):
    """Flower's FedAvg until the last rounds, which end with weights generated for each node.

    Nodes train on from what was generated for them; in these rounds the learning rate that they
    are sent is multiplied by ``settings.round_rate``. ``personal`` and ``personal_metrics`` are by
    partition-id for nodes that report one that no other node reports, else by node id.

    Attributes:
        personal: after ``start``, the generated weights of every node that ever uploaded.
        personal_metrics: {"before": …, "after": …}, a node's newest evaluations of the global
            weights and of the weights generated for it, as far as there are any.
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
                (with one or two uploads: as the global mean before) is left out; 0: none is.

        Raises:
            ValueError: a setting is out of range, or ``descriptor`` wants unshared class counts.
        """
        super().__init__(*args, **kwargs)
        self.settings, self.seed = settings or PFedGPASettings(), seed
        self.rate_key, self.partition_key, self.loss_key = rate_key, partition_key, loss_key
        self.save_dir = Path(save_dir) if save_dir is not None else None
        self.max_upload_norm = max_upload_norm
        check_section("pfedgpa", self.settings)
        if not max_upload_norm >= 0:
            raise ValueError(f"max_upload_norm = {max_upload_norm}: must be >= 0")
        if self.settings.descriptor == "labels":
            raise ValueError("descriptor = 'labels': these clients do not share class counts")
        self.folder: Path | None = None
        self._left, self._going = Personal(), False  # going: between the start and end of ``start``

    @property
    def personal(self) -> dict[int, ArrayRecord]:
        return self._left.by_name(self._left.weights)

    @property
    def personal_metrics(self) -> dict[int, dict[str, dict[str, Any]]]:
        return self._left.by_name(self._left.metrics)

    def summary(self) -> None:
        check_going(self._going)
        super().summary()
        config = self._server.config
        rounds = Server.first_generation(config), config.num_server_rounds
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
        self._left = Personal()
        if num_rounds < 1:
            raise ConfigError(f"num_rounds = {num_rounds}: must be >= 1")
        self._network = Network(initial_arrays, self.weighted_by_key, self.loss_key)
        config = _config(self.settings, num_rounds, self.seed, self.fraction_train)
        Server.check(config)
        if self.save_dir is not None:
            self.folder = new_folder(self.save_dir, grid, self._network.expected)
        self._server = Server(config, Server.begin(config, self._network.generated))
        self._nodes: dict[int, int] = {}  # node id → client, in order of appearance
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
        return [self._to_node(message, own) for message in messages]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        self._evaluated = set(self._left.weights)  # are sent weights of their own
        return [self._to_node(message, {}) for message in messages]

    def _to_node(self, message: Message, config: dict[str, Any]) -> Message:
        """The message with the node's own weights, if any were generated, and ``config``."""
        node, content = message.metadata.dst_node_id, message.content
        shared: Any = content[self.configrecord_key]
        own = RecordDict(
            {
                self.arrayrecord_key: self._left.weights.get(node, content[self.arrayrecord_key]),
                self.configrecord_key: ConfigRecord({**shared, **config}),
            }
        )
        return Message(own, dst_node_id=node, message_type=message.metadata.message_type)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's mean of the usable uploads; in the last rounds also ``personal``.

        Raises:
            NoUploadsError: this was the last round, and none brought a usable upload.
        """
        contents, unusable = self._left.screened(replies, self.weighted_by_key, self.partition_key)
        server, limit = self._server, self.max_upload_norm
        uploads, wrong = self._network.uploads(contents, server.state.global_weights, limit)
        self._left.warn(server_round, unusable | wrong)
        last = server_round == server.config.num_server_rounds
        if uploads:
            if not self._nodes and self.settings.momentum is None:
                warn_of_losses(uploads, self.loss_key)
            self._learn(server_round, uploads)
        elif last and not self._nodes:
            raise no_uploads(server_round, unusable | wrong)
        if last or (uploads and server.state.generated):
            generated = server.personalise() if last else server.state.generated
            self._left.weights = whole_networks(generated, server, self._network, self._nodes)
            made = len(self._left.weights)
            logger.info("PFedGPA: round %d: generated for %d nodes", server_round, made)
        mean = self._network.record(server.state.global_weights)
        if self.folder is not None:
            self._left.keep(self.folder, server_round, mean, last)
        if not uploads:
            return None, None
        accepted = {node: contents[node] for node in uploads}
        return mean, self._mean(self.train_metrics_aggr_fn, server_round, accepted)

    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """FedAvg's mean of the usable evaluations."""
        contents, unusable = self._left.screened(replies, self.weighted_by_key, self.partition_key)
        self._left.warn(server_round, unusable)
        self._left.evaluated(contents, self._evaluated)
        return self._mean(self.evaluate_metrics_aggr_fn, server_round, contents)

    def _mean(
        self, function: Aggregate, server_round: int, contents: Mapping[int, RecordDict]
    ) -> MetricRecord | None:
        """Apply ``function`` to metrics of the most common form, the only one it may accept."""
        if not contents:
            return None
        others = with_other_metrics(contents)
        self._left.warn(
            server_round, dict.fromkeys(others, "sent metrics unlike those of most nodes: left out")
        )
        alike = [content for node, content in contents.items() if node not in others]
        return function(alike, self.weighted_by_key)

    def _learn(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Take in a round's usable uploads, keyed by node."""
        self._network.learn_others(uploads)
        server = self._server
        mine = {
            self._nodes.setdefault(node, len(self._nodes)): part(upload, server.expected_upload())
            for node, upload in uploads.items()
        }
        server.config = dataclasses.replace(server.config, num_clients=len(self._nodes))
        server.aggregate(server_round, dict(sorted(mine.items())))


def check_going(going: bool) -> None:
    """Refuse to run inside another strategy, which does not call this strategy's ``start``.

    Raises:
        ConfigError: ``going`` says that PFedGPA was not started.
    """
    if not going:
        raise ConfigError(
            "PFedGPA does not work inside another strategy: noise that it adds to the mean, for "
            "central differential privacy, would not reach the weights that PFedGPA generates for "
            "each node. Start PFedGPA itself; for privacy give clients Flower's LocalDpMod"
        )


def warn_of_rate(train_config: ConfigRecord | None, key: str) -> None:
    """Warn if clients cannot be sent the last rounds' learning rate."""
    if not isinstance(dict(train_config or {}).get(key), (int, float)):
        logger.warning(
            "PFedGPA: train_config has no number named %r: clients train at their own learning "
            "rate in the last rounds too",
            key,
        )


def _config(settings: PFedGPASettings, rounds: int, seed: int, share: float) -> Config:
    """The server's config, where a ``share`` of the nodes takes part in each round."""
    sections = (settings,)
    return Config(num_server_rounds=rounds, seed=seed, fraction_train=share, sections=sections)


def warn_of_losses(uploads: Mapping[int, Upload], key: str) -> None:
    """Warn if no client reports the training loss on which the server's momentum depends."""
    if not any(math.isfinite(upload.loss) for upload in uploads.values()):
        logger.warning(
            "PFedGPA: no reply's metrics have a number named %r, the training loss: the server's "
            "momentum cannot depend on it",
            key,
        )


def no_uploads(rounds: int, unusable: Mapping[int, str]) -> NoUploadsError:
    """The error for a run none of whose ``rounds`` brought a usable upload."""
    why = "; ".join(f"node {node} {wrong}" for node, wrong in list(unusable.items())[:3])
    return NoUploadsError(
        f"PFedGPA: none of {rounds} rounds brought a usable upload; in round {rounds}: "
        + (why or "no node answered")
    )
