"""pFedGPA for other people's Flower apps, in the place of Flower's ``FedAvg``.

    from pfedgpa_app import PFedGPA
    strategy = PFedGPA(fraction_train=0.5)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=50)

The ClientApp stays as it is: it replies to ``train`` with one ArrayRecord and the number of its
examples. Of any architecture, generated is what is floating-point, not empty and finite at the
start. Other numbers that have a mean (complex ones, masks of −inf) are averaged; those that have
none in their type (BatchNorm's counters) are the round's largest client's. What a node is, it is
for the whole run.

Where Flower's FedAvg ends the run because of one reply, that reply is left out by name, and the
run goes on; also, as FedAvg's, after a round without one usable upload.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from safetensors import SafetensorError
from torch import Tensor

from pfedgpa_app.config.parse import check_section
from pfedgpa_app.core.files import replacing, write_tensors
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights, finite
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server
from pfedgpa_app.server.screening import MOST_EXAMPLES, NoUploadsError, checked, failure, too_large

logger = logging.getLogger("flwr")
T = TypeVar("T")
MEAN = "mean.safetensors"
Aggregate = Callable[[list[RecordDict], str], MetricRecord]


class PFedGPA(FedAvg):
    """Flower's FedAvg until the last rounds, which end with weights generated for each node.

    Nodes train on from what was generated for them; in these rounds the learning rate that they
    are sent is ``settings.round_rate`` times as large. After ``start``, every node that ever
    uploaded has an entry in these, by its partition-id if it told one, else by its node id:

    Attributes:
        personal: its generated weights.
        personal_metrics: {"before": …, "after": …}, its newest evaluation of the global weights
            and of weights generated for it, as far as there was one.
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
        """All of FedAvg's arguments, and others.

        Args:
            settings: what the server goes by; see ``pfedgpa settings`` for the meanings.
            rate_key: the learning rate's name in ``train_config``. Clients that go by a rate of
                their own train on at full strength in the last rounds, which costs accuracy.
            partition_key: the metric by which clients may tell their partition in their replies.
            loss_key: the metric by which clients may tell their training loss; momentum goes by it.
            seed: of what the diffusion model draws.
            save_dir: where each run makes a folder and after each round writes to it the global
                mean and, once generated, each node's weights, as ``mean.safetensors``,
                ``client-PARTITION.safetensors`` or ``node-ID.safetensors``.
            max_upload_norm: an upload so many times as large as the round's median, or of one or
                two as the global mean before, is left out; 0: none is.

        Raises:
            ValueError: a setting out of range, or class counts as descriptors: nobody tells them.
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
        self._left, self._going = Personal(), False  # going: started, and not yet at its end

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
        """As FedAvg's; the result's arrays are the global mean, nodes' own are in ``personal``.

        Raises:
            ConfigError: ``settings`` that cannot run for so many rounds, nothing to generate, or
                a ``save_dir`` that cannot take the model.
            NoUploadsError: no round brought a usable upload.
        """
        self._left = Personal()
        if num_rounds < 1:
            raise ConfigError(f"num_rounds = {num_rounds}: must be >= 1")
        self._network = Network(initial_arrays, self.weighted_by_key, self.loss_key)
        config = Config(num_server_rounds=num_rounds, seed=self.seed, sections=(self.settings,))
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
        self._evaluated = set(self._left.weights)  # with weights of their own
        return [self._to_node(message, {}) for message in messages]

    def _to_node(self, message: Message, config: dict[str, Any]) -> Message:
        """The message with the node's own weights, if some were generated, and settings."""
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
        """``function`` of the metrics of the commonest form: it may take no others."""
        if not contents:
            return None
        others = with_other_metrics(contents)
        self._left.warn(
            server_round, dict.fromkeys(others, "sent other metrics than most: left out")
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
    """Refuse to work inside another strategy, which starts itself and not the one it is around.

    Raises:
        ConfigError: ``going`` says that PFedGPA was not started.
    """
    if not going:
        raise ConfigError(
            "PFedGPA does not work inside another strategy: noise that one adds to the mean, for "
            "central differential privacy, would not be on the weights that PFedGPA generates for "
            "each node. Start PFedGPA itself; for privacy give clients Flower's LocalDpMod"
        )


def warn_of_rate(train_config: ConfigRecord | None, key: str) -> None:
    """Say so where clients cannot be told the last rounds' learning rate."""
    if not isinstance(dict(train_config or {}).get(key), (int, float)):
        logger.warning(
            "PFedGPA: train_config has no number %r: clients train at their own learning rate "
            "in the last rounds, too",
            key,
        )


def warn_of_losses(uploads: Mapping[int, Upload], key: str) -> None:
    """Say so where nobody tells the training loss by which the server's momentum goes."""
    if not any(math.isfinite(upload.loss) for upload in uploads.values()):
        logger.warning(
            "PFedGPA: no reply's metrics have a number %r, the training loss: the server has no "
            "momentum",
            key,
        )


class Personal:
    """What a run leaves for its nodes, all by node id.

    Attributes:
        weights: generated for each.
        metrics: {"before": …, "after": …}, its newest evaluations.
    """

    def __init__(self) -> None:
        self.weights: dict[int, ArrayRecord] = {}
        self.metrics: dict[int, dict[str, dict[str, Any]]] = {}
        self._partitions: dict[int, int] = {}
        self._files: set[str] = set()

    def screened(
        self, replies: Iterable[Message], counted_by: str, partition_key: str
    ) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """The usable replies and what is wrong with others; partitions are noted and taken out."""
        contents, unusable = screened(replies, counted_by)
        for node, content in contents.items():
            [metrics] = content.metric_records.values()
            told = metrics.pop(partition_key, None)
            if isinstance(told, int):
                self._partitions[node] = told
        return contents, unusable

    def evaluated(self, contents: Mapping[int, RecordDict], own: set[int]) -> None:
        """Note evaluations; those of the nodes in ``own`` are of weights generated for them."""
        for node, content in contents.items():
            [metrics] = content.metric_records.values()
            kind = "after" if node in own else "before"
            self.metrics.setdefault(node, {})[kind] = dict(metrics)

    def warn(self, server_round: int, unusable: Mapping[int, str]) -> None:
        """Name each node of which something cannot be used, and say what."""
        for node, wrong in sorted(unusable.items()):
            logger.warning("PFedGPA: round %d: %s %s", server_round, self.named(node), wrong)

    def named(self, node: int) -> str:
        """A node, in words, with the partition that it told."""
        told = self._partitions.get(node)
        return f"node {node}" if told is None else f"partition-id {told} (node {node})"

    def by_name(self, of_nodes: Mapping[int, T]) -> dict[int, T]:
        """{partition-id, or node id where it told none or another tells the same: …}."""
        told = Counter(self._partitions.values())
        names = {n: p for n, p in self._partitions.items() if told[p] == 1}
        return {names.get(node, node): value for node, value in of_nodes.items()}

    def keep(self, folder: Path, rounds: int, mean: ArrayRecord, last: bool) -> None:
        """``save``; before the ``last`` round a folder that cannot be written to ends nothing."""
        try:
            self.save(folder, rounds, mean)
        except OSError as error:
            if last:
                raise
            logger.warning("PFedGPA: %s: cannot be written to: %s", folder, error.strerror)
        if last:
            logger.info("PFedGPA: weights of %d nodes are in %s", len(self.weights), folder)

    def save(self, folder: Path, rounds: int, mean: ArrayRecord) -> None:
        """Write the ``mean`` and every node's weights, in each file whose and of which round."""
        names = self.by_name({node: node for node in self.weights})
        files = {
            f"{'node' if name == node else 'client'}-{name}.safetensors": name
            for name, node in names.items()
        }
        for file in self._files - files.keys():  # a node's that has told its partition since
            (folder / file).unlink(missing_ok=True)
        self._files = {*files}
        with replacing(folder / MEAN) as new:
            write(mean.to_torch_state_dict(), new, {"rounds": rounds})
        for file, name in files.items():
            node = names[name]
            about = {"node-id": node, "rounds": rounds}
            about |= {"partition-id": name} if name != node else {}
            with replacing(folder / file) as new:
                write(self.weights[node].to_torch_state_dict(), new, about)


class Network:
    """What nodes send of theirs: tensors that are generated, and others.

    Attributes:
        expected: {name: tensor} of the network at the start.
        generated: those of it that are generated.
        others: the newest of those that are not.
    """

    def __init__(self, initial: ArrayRecord, counted_by: str, loss_key: str) -> None:
        """As ``initial`` arrays have it.

        Args:
            counted_by: the metric that says how many images a node has; ``loss_key``: its loss.

        Raises:
            ConfigError: no tensors of torch's, or none that can be generated.
        """
        self._counted_by, self._loss_key = counted_by, loss_key
        try:
            self.expected = dict(initial.to_torch_state_dict())
        except (TypeError, ValueError) as error:  # types that NumPy has and torch has not
            raise ConfigError(f"initial_arrays: are no tensors of torch's: {error}") from error
        self.generated = {name: t for name, t in self.expected.items() if is_generated(t)}
        self.others = {name: t for name, t in self.expected.items() if name not in self.generated}
        if not self.generated:
            raise ConfigError(
                "initial_arrays: no floating-point tensor that is finite, to generate"
            )

    def record(self, generated: Weights) -> ArrayRecord:
        """``generated`` and the others, in the network's order."""
        every = generated | self.others
        return ArrayRecord({name: every[name] for name in self.expected})

    def with_mean(self, generated: Weights) -> Weights:
        """``generated`` and those of the others that have a mean."""
        return generated | {name: t for name, t in self.others.items() if has_mean(t)}

    def upload(self, content: RecordDict) -> tuple[Upload | None, str]:
        """The upload that a reply holds, or None and what is wrong with it."""
        arrays = list(content.array_records.values())
        if len(arrays) != 1:
            return None, f"sent {len(arrays)} array records, not 1"
        weights, wrong = checked(arrays[0], self.expected)
        if weights is None:
            return None, wrong
        [metrics] = content.metric_records.values()
        examples: Any = metrics[self._counted_by]
        loss: Any = metrics.get(self._loss_key)
        told = float(loss) if isinstance(loss, (int, float)) else math.nan
        return Upload(weights, examples, loss=told), ""

    def uploads(
        self, contents: Mapping[int, RecordDict], mean: Weights, limit: float
    ) -> tuple[dict[int, Upload], dict[int, str]]:
        """{node: its upload} of the usable ones, and what is wrong with the others.

        Args:
            mean: the global one before.
            limit: ``max_upload_norm``.
        """
        uploads: dict[int, Upload] = {}
        unusable: dict[int, str] = {}
        for node, content in contents.items():
            upload, wrong = self.upload(content)
            if upload is None:
                unusable[node] = wrong
            else:
                uploads[node] = upload
        usual = self.with_mean(mean)
        measured = {node: part(upload, usual) for node, upload in uploads.items()}
        for node, wrong in too_large(measured, usual, limit).items():
            unusable[node] = f"{wrong}, and max_upload_norm is {limit:g}"
            del uploads[node]
        return uploads, unusable

    def learn_others(self, uploads: dict[int, Upload]) -> None:
        """Their means over a round's ``uploads``; without a mean, the largest upload's."""
        largest = max(uploads.values(), key=lambda upload: upload.examples)
        averaged = [name for name, tensor in self.others.items() if has_mean(tensor)]
        means = weighted_mean({node: part(upload, averaged) for node, upload in uploads.items()})
        self.others = {name: means.get(name, largest.weights[name]) for name in self.others}


def screened(
    replies: Iterable[Message], counted_by: str
) -> tuple[dict[int, RecordDict], dict[int, str]]:
    """{node: its reply} where the metrics can be used, and what is wrong with the others.

    Args:
        counted_by: the metric that tells a node's examples.
    """
    usable: dict[int, RecordDict] = {}
    unusable: dict[int, str] = {}
    # nodes' ids are random: an order that does not hang on when replies came
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        node = reply.metadata.src_node_id
        wrong = failure(reply) if reply.has_error() else unusable_metrics(reply, counted_by)
        if wrong:
            unusable[node] = wrong
        else:
            usable[node] = reply.content
    return usable, unusable


def unusable_metrics(reply: Message, counted_by: str) -> str:
    """What is wrong with a reply's metrics; "" for nothing."""
    metrics = list(reply.content.metric_records.values())
    if len(metrics) != 1:
        return f"sent {len(metrics)} metric records, not 1"
    examples: Any = metrics[0].get(counted_by)
    number = isinstance(examples, (int, float)) and not isinstance(examples, bool)
    if not number or not 0 < examples <= MOST_EXAMPLES:
        return f"sent {counted_by} {examples!r} instead of a number above 0, at most 2^53"[:300]
    return ""


def is_generated(tensor: Tensor) -> bool:
    """Whether it is floating-point, not empty and finite."""
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(finite(tensor).all())


def has_mean(tensor: Tensor) -> bool:
    """Whether its type holds the mean of two of its numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def part(upload: Upload, names: Iterable[str]) -> Upload:
    """Only some of an upload's tensors."""
    return dataclasses.replace(upload, weights={name: upload.weights[name] for name in names})


def with_other_metrics(contents: Mapping[int, RecordDict]) -> list[int]:
    """The nodes whose metrics are not of the commonest form."""
    forms = {node: metrics_form(content) for node, content in contents.items()}
    [(commonest, _)] = Counter(forms.values()).most_common(1)
    return [node for node, form in forms.items() if form != commonest]


def metrics_form(content: RecordDict) -> tuple[str, frozenset[tuple[str, int | None]]]:
    """The name of a reply's one metric record, its keys and the lengths of its lists."""
    [(name, metrics)] = content.metric_records.items()
    lengths = {k: len(v) if isinstance(v, list) else None for k, v in metrics.items()}
    return name, frozenset(lengths.items())


def no_uploads(rounds: int, unusable: Mapping[int, str]) -> NoUploadsError:
    """What a run ends with whose ``rounds`` brought nothing."""
    why = "; ".join(f"node {node} {wrong}" for node, wrong in list(unusable.items())[:3])
    return NoUploadsError(
        f"PFedGPA: none of {rounds} rounds brought a usable upload; in round {rounds}: "
        + (why or "no node answered")
    )


def write(weights: Weights, path: Path, about: Mapping[str, Any]) -> None:
    """As safetensors, with ``about`` in the file's metadata."""
    metadata = {"format": "pt"} | {name: str(value) for name, value in about.items()}
    write_tensors(path, weights, metadata)


def new_folder(save_dir: Path, grid: Grid, model: Weights) -> Path:
    """Make a run's folder in ``save_dir``, named after the run.

    Raises:
        ConfigError: it cannot be made, or cannot take a ``model``.
    """
    name = f"run-{grid.run.run_id}"
    try:
        save_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=save_dir) as trial:
            write(model, Path(trial) / "trial.safetensors", {})
        for again in itertools.count(1):
            folder = save_dir / (name if again == 1 else f"{name}-{again}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except KeyError as error:  # a type that safetensors does not know
        raise ConfigError(f"save_dir: safetensors cannot hold {error.args[0]}") from error
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"save_dir = '{save_dir}': cannot be written to: {error}") from error
    raise AssertionError("there is always another number")


def whole_networks(
    generated: dict[int, Weights], server: Server, network: Network, nodes: Mapping[int, int]
) -> dict[int, ArrayRecord]:
    """Clients' ``generated`` weights as whole networks of their ``nodes``, {node id: client}."""
    newest = server.state.buffer.newest()
    made = like_uploads(generated, [newest[client].weights() for client in sorted(newest)])
    return {node: network.record(made[c]) for node, c in nodes.items() if c in made}


def like_uploads(made: dict[int, Weights], uploads: Sequence[Weights]) -> dict[int, Weights]:
    """Generated weights with what all uploads show of the network.

    Tensors that are equal in every upload (tied weights) stay equal, and one that is nowhere
    negative in any (a variance) does not go below the least of them.
    """
    least: Weights = {}
    first_of: dict[str, str] = {}
    for name in uploads[0]:
        lowest = torch.stack([weights[name] for weights in uploads]).amin(0)
        if bool((lowest >= 0).all()):
            least[name] = lowest
        for first in uploads[0]:
            if first == name:
                break
            if all(torch.equal(weights[first], weights[name]) for weights in uploads):
                first_of[name] = first
                break
    like = {}
    for client, weights in made.items():
        bounded = weights | {n: weights[n].maximum(lowest) for n, lowest in least.items()}
        like[client] = bounded | {name: bounded[first] for name, first in first_of.items()}
    return like
