"""pFedGPA for other people's Flower apps, in the place of Flower's ``FedAvg``.

    from pfedgpa_app import PFedGPA
    strategy = PFedGPA(fraction_train=0.5)
    result = strategy.start(grid=grid, initial_arrays=arrays, num_rounds=50)

The ClientApp stays as it is: it replies to ``train`` with one ArrayRecord and the number of its
examples. Floating-point tensors are generated, of any architecture; others (BatchNorm's counters)
are those of the round's largest client. What a node is, it is for the whole run.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result
from safetensors.torch import save_file

from pfedgpa_app.config import Config
from pfedgpa_app.methods.base import Upload
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server
from pfedgpa_app.methods.pfedgpa import PFedGPASettings
from pfedgpa_app.models import Weights
from pfedgpa_app.settings import ConfigError
from pfedgpa_app.strategy import checked, failure

logger = logging.getLogger("flwr")


class PFedGPA(FedAvg):
    """Flower's FedAvg until the last rounds, which end with weights generated for each node.

    Nodes train on from what was generated for them; in these rounds the learning rate that they
    are sent is ``settings.round_rate`` times as large. After ``start``:

    Attributes:
        personal: {node id: its generated weights}, of every node that ever uploaded.
    """

    def __init__(
        self,
        *args: Any,
        settings: PFedGPASettings | None = None,
        rate_key: str = "lr",
        seed: int = 0,
        save_dir: str | Path | None = None,
        **kwargs: Any,
    ) -> None:
        """All of FedAvg's arguments, and:

        Args:
            settings: what the server goes by; see ``pfedgpa settings`` for the meanings.
            rate_key: the learning rate's name in ``train_config``. Clients that go by a rate of
                their own train on at full strength in the last rounds, which costs accuracy.
            seed: of what the diffusion model draws.
            save_dir: where each node's weights are written after the last round, as
                ``node-ID.safetensors``.

        Raises:
            ValueError: class counts as descriptors, which no foreign client shares.
        """
        super().__init__(*args, **kwargs)
        self.settings, self.rate_key, self.seed = settings or PFedGPASettings(), rate_key, seed
        self.save_dir = Path(save_dir) if save_dir is not None else None
        if self.settings.descriptor == "labels":
            raise ValueError("descriptor = 'labels': these clients do not share class counts")
        self.personal: dict[int, ArrayRecord] = {}

    def summary(self) -> None:
        super().summary()
        config = self._server.config
        first, last = Server.first_generation(config), config.num_server_rounds
        logger.info("\t└──> Weights are generated in rounds %d to %d", first, last)

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
            ConfigError: ``settings`` that cannot run for so many rounds, or nothing to generate.
        """
        self._expected: Weights = dict(initial_arrays.to_torch_state_dict())
        self._others = {n: t for n, t in self._expected.items() if not t.is_floating_point()}
        floats = {n: t for n, t in self._expected.items() if n not in self._others}
        if not floats:
            raise ConfigError("initial_arrays: has no floating-point tensor to generate")
        config = Config(num_server_rounds=num_rounds, seed=self.seed, sections=(self.settings,))
        Server.check(config)
        self._server = Server(config, Server.begin(config, floats))
        self._nodes: dict[int, int] = {}  # node id → client, in order of appearance
        if self.rate_key not in (train_config or {}):
            logger.warning(
                "PFedGPA: train_config has no %r: clients train at their own learning rate in the "
                "last rounds, too",
                self.rate_key,
            )
        result = super().start(
            grid, initial_arrays, num_rounds, timeout, train_config, evaluate_config, evaluate_fn
        )
        if self.save_dir is not None:
            self.save_dir.mkdir(parents=True, exist_ok=True)
            for node, record in self.personal.items():
                tensors = {n: t.contiguous() for n, t in record.to_torch_state_dict().items()}
                save_file(tensors, self.save_dir / f"node-{node}.safetensors")
        return result

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        messages = super().configure_train(server_round, arrays, config, grid)
        asked = self._server.config
        slower = self._server.learning_rate(asked, server_round) / asked.learning_rate
        rate = config.get(self.rate_key)
        own = {self.rate_key: rate * slower} if isinstance(rate, (int, float)) else {}
        return [self._to_node(message, own) for message in messages]

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        messages = super().configure_evaluate(server_round, arrays, config, grid)
        return [self._to_node(message, {}) for message in messages]

    def _to_node(self, message: Message, config: dict[str, Any]) -> Message:
        """The message with the node's own weights, if some were generated, and settings."""
        node, content = message.metadata.dst_node_id, message.content
        shared: Any = content[self.configrecord_key]
        own = RecordDict(
            {
                self.arrayrecord_key: self.personal.get(node, content[self.arrayrecord_key]),
                self.configrecord_key: ConfigRecord({**shared, **config}),
            }
        )
        return Message(own, dst_node_id=node, message_type=message.metadata.message_type)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """FedAvg's mean of the usable uploads; in the last rounds also ``personal``."""
        uploads: dict[int, Upload] = {}
        contents = []
        # nodes' ids are random: an order that does not hang on when replies came
        for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
            upload, wrong = self._upload(reply)
            node = reply.metadata.src_node_id
            if upload is None:
                logger.warning("PFedGPA: round %d: node %d %s", server_round, node, wrong)
                continue
            uploads[self._nodes.setdefault(node, len(self._nodes))] = upload
            contents.append(reply.content)
        if not uploads:
            return None, None
        largest = max(uploads.values(), key=lambda upload: upload.examples)
        self._others = {name: largest.weights[name] for name in self._others}
        floats = {
            client: Upload(
                {n: t for n, t in upload.weights.items() if n not in self._others}, upload.examples
            )
            for client, upload in sorted(uploads.items())
        }
        server = self._server
        server.config = dataclasses.replace(server.config, num_clients=len(self._nodes))
        last = server_round == server.config.num_server_rounds
        server.aggregate(server_round, floats)
        if last or server.state.generated:
            made = server.personalise() if last else server.state.generated
            newest = server.state.buffer.newest()
            made = like_uploads(made, [newest[client].weights() for client in sorted(newest)])
            self.personal = {
                node: self._record(made[client])
                for node, client in self._nodes.items()
                if client in made
            }
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key)
        return self._record(server.state.global_weights), metrics

    def _upload(self, reply: Message) -> tuple[Upload | None, str]:
        """The reply's upload, or None and what is wrong with it."""
        if reply.has_error():
            return None, failure(reply)
        arrays = list(reply.content.array_records.values())
        metrics = list(reply.content.metric_records.values())
        if len(arrays) != 1 or len(metrics) != 1:
            return None, f"sent {len(arrays)} array and {len(metrics)} metric records, not 1 and 1"
        examples: Any = metrics[0].get(self.weighted_by_key)
        if not isinstance(examples, (int, float)) or not 0 < examples < float("inf"):
            return None, f"sent {self.weighted_by_key} {examples!r} instead of a number above 0"
        weights, wrong = checked(arrays[0], self._expected)
        return (None, wrong) if weights is None else (Upload(weights, examples), "")

    def _record(self, floats: Weights) -> ArrayRecord:
        """``floats`` and the tensors that are not generated, in the model's order."""
        every = floats | self._others
        return ArrayRecord({name: every[name] for name in self._expected})


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
