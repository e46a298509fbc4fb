"""Which client lives on which Flower node.

Flower's node ids are random, so a client is known by its partition. Usually there is a node for
each client. In a simulation with fewer nodes (Flower's default is two) each node hosts several
clients and is sent one message at a time, so that two never write its state at once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.messages import record_of
from pfedgpa_app.server.nodes import (
    Answer,
    NodesError,
    Settings,
    ask,
    in_words,
    mismatch,
    node_at,
    schema_of,
    wrong_number,
)
from pfedgpa_app.server.sending import OneAtATime, check_room, match

logger = logging.getLogger("pfedgpa")

NOBODY = 0  # an id that no node has
ARRIVAL = 3.0  # after so many seconds without a new node, the server stops waiting for more
MOST_PATIENCE = 120.0  # seconds that the server waits for nodes at most
ANSWER = 30.0  # seconds in which a node that works answers who it is


def _logged(kind: str, text: str) -> None:
    (logger.warning if kind == "warning" else logger.info)(text)


class Hosts:
    """Which node serves each client: of those with its partition, the first that is connected."""

    def __init__(
        self,
        partitions: Sequence[int],
        node_at: dict[int, int],
        schema: Schema | None,
        tell: Callable[[str, str], object],
    ) -> None:
        """Seat the nodes that are here when the run begins, given by partition."""
        self._partitions, self._schema, self._tell = partitions, schema, tell
        self._client_of = {partition: i for i, partition in enumerate(partitions)}
        self._nodes: dict[int, list[int]] = {i: [] for i in range(len(partitions))}
        for partition, node in node_at.items():
            self._nodes[self._client_of[partition]].append(node)

    def of(self, client: int, present: Container[int]) -> int:
        """The node that serves ``client``; ``NOBODY`` if none is connected."""
        nodes = self._nodes[client % len(self._partitions)]
        return next((node for node in nodes if node in present), NOBODY)

    def admit(
        self, node: int, answer: Answer, present: Container[int], answers: Callable[[int], bool]
    ) -> None:
        """Let a new node serve its client, have it wait, or leave it out; the latter are told.

        Args:
            answers: whether a node that is connected answers; Flower takes a minute to notice one
                that was killed.
        """
        client, which = self._client_of.get(answer.partition), f"partition-id={answer.partition}"
        if client is None:
            self._tell("warning", f"node {node} belongs to no client of this run")
        elif self._schema and (why := mismatch((self._partitions[0], self._schema), answer)):
            self._tell("warning", f"node {node} with {which} takes no part: {why}")
        elif (other := self.of(client, present)) != NOBODY and answers(other):
            self._nodes[client].append(node)
            self._tell(
                "warning",
                f"node {node} has {which} like node {other}, which is still connected: it takes no "
                "part until that one has left; give each its own in --node-config",
            )
        else:
            self._nodes[client].insert(0, node)


class Roster:
    """The clients 0..n−1, and how to send to them and collect from them.

    Attributes:
        partitions: the nodes' partitions, in the order of the clients; where there are fewer than
            clients, clients take them in turn.
        schema: that of the nodes' own data; None if clients share a data set.
        present: the ids of the nodes that were connected at the last look.
        data: for clients to compare with what they have, a shared data set's fingerprint, or the
            checksum of the schema.
        keeping: federations' clients (name, client) that keep something for their next round.
    """

    def __init__(
        self,
        grid: Grid,
        num_clients: int,
        timeout: float,
        own_data: bool = False,
        before: Iterable[int] = (),
        run: str = "",
        tell: Callable[[str, str], object] = _logged,
    ) -> None:
        """Wait for the nodes and ask each who it is.

        Args:
            timeout: seconds to wait for nodes (at most two minutes), and for replies to messages.
            own_data: whether the clients' data are their nodes' own, so that each needs its node.
            before: for a resumed run on nodes' own data, the partitions of all its clients; it can
                go on without some of them.
            run: by which clients know the run.
            tell: is called with the kind ("warning" or "status") and the text of what happens.

        Raises:
            NodesError: no node connects in time, none answers, or two claim the same partition;
                or, with nodes' own data, there are too few, others than before, or their data
                differ in classes or shape.
        """
        self._own_data, self._before, self._tell = own_data, sorted(before), tell
        self.common: Settings = {"run": run}  # settings that every message carries
        self.keeping: set[tuple[Any, int]] = set()
        self.grid, self.timeout = OneAtATime(grid), timeout
        answers = self._discover(num_clients)
        seats = node_at(answers)
        self.partitions = self._before or list(seats)
        self._check_before(seats)
        self.schema = schema_of([answers[node] for node in seats.values()])
        self._hosts = Hosts(self.partitions, seats, self.schema, tell)
        self._known, self.present = set(answers), set(answers)
        self.data: Settings = {"schema": self.schema.checksum()} if self.schema else {}
        if own_data and self.partitions != list(range(len(self.partitions))):
            tell(
                "warning",
                f"nodes have the partition-ids {in_words(self.partitions)}: in this order they are "
                f"clients 0 to {len(self.partitions) - 1}",
            )
        if len(self.partitions) < num_clients:
            tell(
                "warning",
                f"{len(self.partitions)} nodes host {num_clients} clients in turn; for one node "
                "per client use `pfedgpa run`, or flwr run . --federation-config "
                f"'num-supernodes={num_clients} client-resources-num-cpus=1'",
            )

    def node_of(self, client: int) -> int:
        """The node that serves ``client``; ``NOBODY`` if none is connected."""
        return self._hosts.of(client, self.present)

    def is_here(self, client: int) -> bool:
        """Whether the client's node was connected at the last look."""
        return self.node_of(client) != NOBODY

    def poll(self) -> None:
        """See which nodes are connected.

        A node that comes back under a new id is recognised by its partition.
        """
        self.present = set(self.grid.get_node_ids())
        if new := sorted(self.present - self._known):
            self._known |= set(new)
            for node, answer in self._asked(new)[0].items():
                self._hosts.admit(node, answer, self.present, self._answers)

    def _answers(self, node: int) -> bool:
        return bool(self._asked([node], min(self.timeout, ANSWER))[0])

    def await_nodes(self, clients: Iterable[int], count: int) -> None:
        """Wait until ``count`` of the clients' nodes are here, for ``timeout`` seconds at most."""
        clients = list(clients)
        deadline = time.monotonic() + self.timeout
        while True:
            self.poll()
            here = sum(map(self.is_here, clients))
            if here >= min(count, len(clients)) or time.monotonic() > deadline:
                return
            time.sleep(1)

    def _asked(
        self, nodes: Iterable[int], timeout: float | None = None
    ) -> tuple[dict[int, Answer], str]:
        """Ask nodes who they are, as ``nodes.ask`` does."""
        return ask(self.grid, nodes, self.common, timeout or self.timeout, self._tell)

    def _check_before(self, there: Iterable[int]) -> None:
        """Refuse partitions that a resumed run did not have, and name those that are missing."""
        if others := sorted(set(there) - set(self.partitions)):
            raise NodesError(
                f"resume: the run has the partition-ids {in_words(self.partitions)}, but nodes "
                f"report {in_words(others)}: start the same nodes as before"
            )
        if missing := sorted(set(self.partitions) - set(there)):
            self._tell(
                "warning",
                f"the run goes on without partition-id {in_words(missing)}, until its node is here",
            )

    def _discover(self, num_clients: int) -> dict[int, Answer]:
        """Wait until all nodes are here or no more arrive, and ask them: {node id: its answer}.

        Nodes with their own data are all waited for, since each client needs its node.

        Raises:
            NodesError: no node connects or answers, or nodes with their own data are missing.
        """
        now = arrived = started = time.monotonic()
        nodes: set[int] = set()
        patience = min(self.timeout, MOST_PATIENCE)
        while now - started < patience:
            now, seen, nodes = time.monotonic(), nodes, set(self.grid.get_node_ids())
            arrived = now if nodes != seen else arrived
            enough = nodes and now - arrived > ARRIVAL and not self._own_data
            if len(nodes) >= num_clients or enough:
                break
            if nodes != seen and self._own_data:
                self._tell(
                    "status",
                    f"{len(nodes)} of {num_clients} nodes are here; waiting {patience:g} s for "
                    "the others",
                )
            time.sleep(0.1)
        if not nodes:
            raise NodesError(
                f"no node has connected within {now - started:.3g} s: start the SuperNodes first"
                + (", or raise timeout" if self.timeout < MOST_PATIENCE else "")
            )
        answers, failed = self._asked(sorted(nodes))
        within = f"within timeout = {self.timeout:g} s: raise timeout"
        if not answers and not failed:
            raise NodesError(f"none of {len(nodes)} nodes answered {within}")
        if self._own_data and len(answers) != num_clients and not (self._before and answers):
            raise wrong_number(num_clients, len(nodes), answers, failed, within)
        if not answers:
            raise NodesError(f"the ClientApp fails on every node that answers: {failed}")
        return answers

    def message(self, client: int, kind: str, weights: Weights, settings: Settings) -> Message:
        """Make a message for ``client``, which shares no record with other clients' messages."""
        kept = {"keeps": (settings.get("method"), client) in self.keeping}
        content = RecordDict(
            {
                "arrays": record_of(weights),
                "config": ConfigRecord({**self.common, **settings, "client": client, **kept}),
            }
        )
        if self.data:
            content["data"] = ConfigRecord(self.data)
        return Message(
            content, dst_node_id=self.node_of(client), message_type=kind, ttl=self.timeout
        )

    def exchange(self, messages: dict[int, Message]) -> dict[int, Message]:
        """Send each client its message and return the replies by client.

        Silent clients, and those whose nodes are not connected, are missing from the result.

        Raises:
            OSError: as ``replies``.
        """
        self.poll()
        to = []
        for client, message in messages.items():
            if self.is_here(client):  # maybe under another id than before
                message.metadata.dst_node_id = self.node_of(client)
                to.append(message)
        return self.replies(messages, self.grid.send_and_receive(to, timeout=self.timeout))

    def replies(self, sent: dict[int, Message], received: Iterable[Message]) -> dict[int, Message]:
        """Return by client what was ``received`` in reply to the messages ``sent``.

        Raises:
            OSError: the disk is full on which clients of a simulation keep their state.
        """
        found = match(sent, received)
        if "state-dir" in self.common:  # clients keep it on this machine's disk
            check_room(found.values(), str(self.common["state-dir"]))
        return found
