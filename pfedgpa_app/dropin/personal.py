"""Keep a run's results for its nodes, in memory and as files."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from pfedgpa_app.core.files import write_tensors
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.dropin.network import merge
from pfedgpa_app.dropin.nodes import Nodes
from pfedgpa_app.methods.pfedgpa import PFedGPAState

logger = logging.getLogger("flwr")
MEAN = "mean.safetensors"
ROUND = "server-round"  # as Flower's FedAvg calls it in its messages


class Personal:
    """A run's results for its ``nodes``, all by node id.

    Attributes:
        weights: the weights generated for each node.
        metrics: {"before": …, "after": …}, each node's newest evaluations of the global weights
            and of the weights generated for it, with the round under "server-round".
    """

    def __init__(self) -> None:
        self.nodes = Nodes()
        self.weights: dict[int, ArrayRecord] = {}
        self.metrics: dict[int, dict[str, dict[str, Any]]] = {}
        self._files: set[str] = set()

    def put_into(
        self, message: Message, arrays_key: str, config_key: str, config: Mapping[str, Any]
    ) -> Message:
        """Put the node's own weights, if any were generated, and ``config`` into its message."""
        records, shared = dict(message.content), message.content.config_records[config_key]
        records[config_key] = ConfigRecord({**shared, **config})
        node = message.metadata.dst_node_id
        if node in self.weights:
            records[arrays_key] = self.weights[node]
        message.content = RecordDict(records)  # a new one: all messages may share the old
        return message

    def evaluated(
        self, server_round: int, contents: Mapping[int, RecordDict], own: set[int]
    ) -> None:
        """Note evaluations; nodes in ``own`` evaluated weights that were generated for them."""
        for node, content in contents.items():
            [metrics] = content.metric_records.values()
            kind = "after" if node in own else "before"
            self.metrics.setdefault(node, {})[kind] = {**metrics, ROUND: server_round}

    def succeed(self, server_round: int, node: int, old: int, state: PFedGPAState) -> int | None:
        """Let ``node`` go on as the client that the node ``old`` was.

        Returns:
            that client; None if ``old`` never uploaded.
        """
        client, until_now = self.nodes.replace(old, node)
        if client is not None and until_now is not None:
            merge(state, until_now, client)
        if old in self.weights:
            self.weights[node] = self.weights.pop(old)
        if old in self.metrics:
            self.metrics[node] = self.metrics.pop(old) | self.metrics.get(node, {})
        who = self.nodes.named(node)
        logger.info("PFedGPA: round %d: %s replaces node %d, which is gone", server_round, who, old)
        return client

    def keep(self, folder: Path, rounds: int, mean: ArrayRecord, last: bool) -> None:
        """``save``, but an unwritable folder raises only in the ``last`` round."""
        try:
            self.save(folder, rounds, mean)
        except OSError as error:
            if last:
                raise
            logger.warning("PFedGPA: %s: cannot be written to: %s", folder, error.strerror)
        if last:
            logger.info("PFedGPA: weights of %d nodes are in %s", len(self.weights), folder)

    def save(self, folder: Path, rounds: int, mean: ArrayRecord) -> None:
        """Write the ``mean`` and every node's weights; each file says its node and round."""
        names = self.nodes.by_name({node: node for node in self.weights})
        files = {
            f"{'node' if name == node else 'client'}-{name}.safetensors": name
            for name, node in names.items()
        }
        for file in self._files - files.keys():  # of a node that has since reported its partition
            (folder / file).unlink(missing_ok=True)
        self._files = {*files}
        write(mean.to_torch_state_dict(), folder / MEAN, {"rounds": rounds})
        for file, name in files.items():
            node = names[name]
            about = {"node-id": node, "rounds": rounds}
            about |= {"partition-id": name} if name != node else {}
            write(self.weights[node].to_torch_state_dict(), folder / file, about)


def new_folder(save_dir: Path, grid: Grid, model: Weights) -> Path:
    """Make a run's folder in ``save_dir``, named after the run.

    Raises:
        ConfigError: the folder cannot be made, or a file with ``model`` cannot be written to it.
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
    except OSError as error:
        raise ConfigError(f"save_dir = '{save_dir}': cannot be written to: {error}") from error
    raise AssertionError("there is always another number")


def write(weights: Weights, path: Path, about: Mapping[str, Any]) -> None:
    """Write ``weights`` as a safetensors file, with ``about`` in its metadata."""
    metadata = {"format": "pt"} | {name: str(value) for name, value in about.items()}
    write_tensors(path, weights, metadata)
