"""Keep a run's results for its nodes, in memory and as files."""

from __future__ import annotations

import contextlib
import itertools
import logging
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from flwr.app import ArrayRecord, Message, RecordDict
from flwr.serverapp import Grid

from pfedgpa_app.core.files import write_tensors
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.dropin.replies import screened

logger = logging.getLogger("flwr")
T = TypeVar("T")
MEAN = "mean.safetensors"


class Personal:
    """A run's results for its nodes, all by node id.

    Attributes:
        weights: the weights generated for each node.
        metrics: {"before": …, "after": …}, each node's newest evaluations of the global weights
            and of the weights generated for it.
    """

    def __init__(self) -> None:
        self.weights: dict[int, ArrayRecord] = {}
        self.metrics: dict[int, dict[str, dict[str, Any]]] = {}
        self._partitions: dict[int, int] = {}
        self._files: set[str] = set()

    def screened(
        self, replies: Iterable[Message], counted_by: str, partition_key: str
    ) -> tuple[dict[int, RecordDict], dict[int, str]]:
        """Screen replies by ``screened``; note the partitions and take them out of the metrics."""
        contents, unusable = screened(replies, counted_by)
        for node, content in contents.items():
            [metrics] = content.metric_records.values()
            told = metrics.pop(partition_key, None)
            if isinstance(told, int):
                self._partitions[node] = told
        return contents, unusable

    def evaluated(self, contents: Mapping[int, RecordDict], own: set[int]) -> None:
        """Note evaluations; nodes in ``own`` evaluated weights that were generated for them."""
        for node, content in contents.items():
            [metrics] = content.metric_records.values()
            kind = "after" if node in own else "before"
            self.metrics.setdefault(node, {})[kind] = dict(metrics)

    def warn(self, server_round: int, unusable: Mapping[int, str]) -> None:
        """Log what is wrong with each node's unusable reply."""
        for node, wrong in sorted(unusable.items()):
            logger.warning("PFedGPA: round %d: %s %s", server_round, self.named(node), wrong)

    def named(self, node: int) -> str:
        """A node in words, with the partition that it reported, if any."""
        told = self._partitions.get(node)
        return f"node {node}" if told is None else f"partition-id {told} (node {node})"

    def by_name(self, of_nodes: Mapping[int, T]) -> dict[int, T]:
        """Rekey by partition-id, if a node reported one that no other did, else by node id."""
        told = Counter(self._partitions.values())
        names = {n: p for n, p in self._partitions.items() if told[p] == 1}
        return {names.get(node, node): value for node, value in of_nodes.items()}

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
        names = self.by_name({node: node for node in self.weights})
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
