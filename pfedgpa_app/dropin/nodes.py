"""Who a run's nodes are: the client that each is, and the partition that it told."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TypeVar

from flwr.app import RecordDict
from flwr.serverapp import Grid

logger = logging.getLogger("flwr")
T = TypeVar("T")


class Nodes:
    """A run's nodes, by node id.

    A node that restarts has a new id. If it tells the partition of a node that is gone, it goes on
    as the client which that node was.

    Attributes:
        clients: {node: client} of the nodes that ever uploaded.
        ever: the number of clients that there have been; they are numbered in order of appearance.
    """

    def __init__(self) -> None:
        self.clients: dict[int, int] = {}
        self.ever = 0
        self._partitions: dict[int, int] = {}
        self._heard: dict[int, tuple[int, int]] = {}  # the turns of a node's first and last reply
        self._turn = 0
        self._shared: set[int] = set()  # partitions of several nodes that were warned of

    def client(self, node: int) -> int:
        """The client that the node is; a new one if it has not been any."""
        if node not in self.clients:
            self.clients[node] = self.ever
            self.ever += 1
        return self.clients[node]

    def learn(self, contents: Mapping[int, RecordDict], key: str, grid: Grid) -> dict[int, int]:
        """Note the partitions that nodes told under ``key``, and take them out of the metrics.

        Returns:
            {node: the node that it replaces}, the oldest first.
        """
        self._turn += 1
        for node, content in contents.items():
            first, _ = self._heard.get(node, (self._turn, self._turn))
            self._heard[node] = first, self._turn
            [metrics] = content.metric_records.values()
            told = metrics.pop(key, None)
            if isinstance(told, int):
                self._partitions[node] = told
        return self._successors(grid)

    def _successors(self, grid: Grid) -> dict[int, int]:
        """{node: the node that it replaces}, and a warning for partitions of several nodes."""
        of_partition: dict[int, list[int]] = {}
        for node, partition in self._partitions.items():
            of_partition.setdefault(partition, []).append(node)
        several = {p: nodes for p, nodes in of_partition.items() if len(nodes) > 1}
        if not several:
            return {}
        connected = {*grid.get_node_ids()}
        found: dict[int, int] = {}
        for partition, nodes in several.items():
            by_turn = sorted(nodes, key=self._heard.__getitem__)
            pairs = list(itertools.pairwise(by_turn))  # more than one: it restarted several times
            if connected.isdisjoint(by_turn[:-1]) and all(
                self._heard[old][1] < self._heard[new][0] for old, new in pairs
            ):
                found |= {new: old for old, new in pairs}
            elif partition not in self._shared:
                self._shared.add(partition)
                logger.warning(
                    "PFedGPA: nodes %s all tell partition-id %d: each counts as a client of its "
                    "own, by its node id",
                    ", ".join(map(str, sorted(nodes))),
                    partition,
                )
        return found

    def replace(self, old: int, node: int) -> tuple[int | None, int | None]:
        """Let ``node`` be the client that ``old`` was.

        Returns:
            that client, and the client that ``node`` has been until now; None if it was none.
        """
        client, until_now = self.clients.pop(old, None), self.clients.get(node)
        if client is not None:
            self.clients[node] = client
        del self._partitions[old]
        self._heard[node] = self._heard.pop(old)[0], self._heard[node][1]
        return client, until_now

    def warn(self, when: str, unusable: Mapping[int, str]) -> None:
        """Log what is wrong with each node's unusable reply."""
        for node, wrong in sorted(unusable.items()):
            logger.warning("PFedGPA: %s: %s %s", when, self.named(node), wrong)

    def named(self, node: int) -> str:
        """A node in words, with the partition that it told, if any."""
        told = self._partitions.get(node)
        return f"node {node}" if told is None else f"partition-id {told} (node {node})"

    def by_name(self, of_nodes: Mapping[int, T]) -> dict[int, T]:
        """Rekey by partition-id, if a node told one that no other did, else by node id."""
        told = Counter(self._partitions.values())
        names = {n: p for n, p in self._partitions.items() if told[p] == 1}
        return {names.get(node, node): value for node, value in of_nodes.items()}
