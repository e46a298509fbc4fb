"""Which client lives on which Flower node, and how messages reach it.

Flower's node ids are random, so a client is known by its partition. Usually there is a node for
each client. In a simulation with fewer nodes (Flower's default is two) each node hosts several
clients and is sent one message at a time, so that two never write its state at once.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import listed
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.messages import bytes_of, record_of
from pfedgpa_app.server.screening import cause

logger = logging.getLogger("pfedgpa")

NOBODY = 0  # an id that no node has
ARRIVAL = 3.0  # after so many seconds without a new node, the server stops waiting for more
ANSWER = 30.0  # seconds in which a node that works answers who it is
POLL = 0.25  # seconds between polls for replies over HTTP
_LOST_ACTOR = re.compile(r"<class 'ray\.exceptions\.\w*Actor\w*'>")  # as Flower reports it
Settings = dict[str, Any]  # the values that a ConfigRecord takes


def array_bytes(message: Message) -> int:
    """Return how many bytes a message's arrays take when it is sent."""
    records = message.content.array_records.values()
    return sum(bytes_of(array) for record in records for array in record.values())


def is_flowers(grid: Grid, name: str) -> bool:
    """Whether ``grid`` is of Flower's class called ``name``.

    Names are compared because importing the class takes a second.
    """
    return any(kind.__name__ == name for kind in type(grid).__mro__)


def _logged(kind: str, text: str) -> None:
    (logger.warning if kind == "warning" else logger.info)(text)


class Answer(NamedTuple):
    """What a node answers: its partition and, where the run uses nodes' own data, their schema."""

    partition: int
    data: Any  # the schema as a dict, else None


class RosterError(RuntimeError):
    """The federation's nodes cannot serve the configured clients."""


class OneAtATime(Grid):
    """A grid that sends a node only one message at a time; the rest is up to the grid it wraps."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        """Send in waves of one message per node; ``timeout`` seconds are for each wave.

        Messages of later waves get a time to live that covers the earlier waves: Flower refuses to
        send an expired one.
        """
        waves: list[list[Message]] = []
        sent_to: Counter[int] = Counter()
        for message in messages:
            wave = sent_to[message.metadata.dst_node_id]
            sent_to[message.metadata.dst_node_id] += 1
            message.metadata.ttl *= wave + 1
            if wave == len(waves):
                waves.append([])
            waves[wave].append(message)
        return [reply for wave in waves for reply in self._exchange(wave, timeout)]

    def _exchange(self, messages: list[Message], timeout: float | None) -> Iterable[Message]:
        """Send messages and return the replies.

        Over HTTP this polls by itself, because Flower's own grid looks only every 3 s.

        Raises:
            RosterError: Ray has lost a process of the simulation.
        """
        if not is_flowers(self._grid, "HttpGrid"):
            received = list(self._grid.send_and_receive(messages, timeout=timeout))
            if is_flowers(self._grid, "InMemoryGrid"):
                _check_all_actors_live(received)
            return received
        end = math.inf if timeout is None else time.monotonic() + timeout
        owed = set(self._grid.push_messages(messages))
        replies: list[Message] = []
        while owed and time.monotonic() < end:
            if new := list(self._grid.pull_messages(owed)):
                replies += new
                owed -= {reply.metadata.reply_to_message_id for reply in new}
            else:
                time.sleep(POLL)
        return replies

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)


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
        elif self._schema and (why := _mismatch((self._partitions[0], self._schema), answer)):
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
            RosterError: no node connects in time, none answers, or two claim the same partition;
                or, with nodes' own data, there are too few, others than before, or their data
                differ in classes or shape.
        """
        self._own_data, self._before, self._tell = own_data, sorted(before), tell
        self.common: Settings = {"run": run}  # settings that every message carries
        self.keeping: set[tuple[Any, int]] = set()
        self.grid, self.timeout = OneAtATime(grid), timeout
        answers = self._discover(num_clients)
        node_at = _node_at(answers)
        self.partitions = self._before or list(node_at)
        self._check_before(node_at)
        self.schema = _schema_of([answers[node] for node in node_at.values()])
        self._hosts = Hosts(self.partitions, node_at, self.schema, tell)
        self._known, self.present = set(answers), set(answers)
        self.data: Settings = {"schema": self.schema.checksum()} if self.schema else {}
        if own_data and self.partitions != list(range(len(self.partitions))):
            tell(
                "warning",
                f"nodes have the partition-ids {_listed(self.partitions)}: in this order they are "
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
        """Ask nodes who they are, as ``_ask`` does."""
        return _ask(self.grid, nodes, self.common, timeout or self.timeout, self._tell)

    def _check_before(self, there: Iterable[int]) -> None:
        """Refuse partitions that a resumed run did not have, and name those that are missing."""
        if others := sorted(set(there) - set(self.partitions)):
            raise RosterError(
                f"resume: the run has the partition-ids {_listed(self.partitions)}, but nodes "
                f"report {_listed(others)}: start the same nodes as before"
            )
        if missing := sorted(set(self.partitions) - set(there)):
            self._tell(
                "warning",
                f"the run goes on without partition-id {_listed(missing)}, until its node is here",
            )

    def _discover(self, num_clients: int) -> dict[int, Answer]:
        """Wait until all nodes are here or no more arrive, and ask them: {node id: its answer}.

        Nodes with their own data are all waited for, since each client needs its node.

        Raises:
            RosterError: no node connects or answers, or nodes with their own data are missing.
        """
        now = arrived = started = time.monotonic()
        nodes: set[int] = set()
        patience = min(self.timeout, 120)
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
            raise RosterError(
                f"no node has connected within {now - started:.3g} s: start the SuperNodes first, "
                "or raise timeout"
            )
        answers, failed = self._asked(sorted(nodes))
        within = f"within timeout = {self.timeout:g} s: raise timeout"
        if not answers and not failed:
            raise RosterError(f"none of {len(nodes)} nodes answered {within}")
        if self._own_data and len(answers) != num_clients and not (self._before and answers):
            raise _wrong_number(num_clients, len(nodes), answers, failed, within)
        if not answers:
            raise RosterError(f"the ClientApp fails on every node that answers: {failed}")
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
        """
        self.poll()
        to = []
        for client, message in messages.items():
            if self.is_here(client):  # maybe under another id than before
                message.metadata.dst_node_id = self.node_of(client)
                to.append(message)
        received = self.grid.send_and_receive(to, timeout=self.timeout)
        return match(messages, received)


def _ask(
    grid: Grid,
    nodes: Iterable[int],
    settings: Settings,
    timeout: float,
    tell: Callable[[str, str], object],
) -> tuple[dict[int, Answer], str]:
    """Ask nodes who they are: {node: its answer}, and why the last failing one failed or ""."""
    questions = [
        Message(
            RecordDict({"config": ConfigRecord(settings)}),
            dst_node_id=node,
            message_type=MessageType.QUERY,
        )
        for node in nodes
    ]
    answers: dict[int, Answer] = {}
    failed = ""
    for reply in grid.send_and_receive(questions, timeout=timeout):
        node = reply.metadata.src_node_id
        partition = None if reply.has_error() else _partition_of(reply)
        if partition is None:
            why = cause(reply)[:300] if reply.has_error() else "does not say who it is"
            failed = f"node {node}: {why}"
            tell("warning", f"no client there: {failed}")
        else:
            answers[node] = Answer(partition, reply.content.config_records.get("data"))
    return answers, failed


def _wrong_number(
    wanted: int, nodes: int, answers: dict[int, Answer], failed: str, within: str
) -> RosterError:
    """Return the error where not as many nodes have data of their own as clients are ``wanted``."""
    if failed:
        why = f"; one without data: {failed}"
    elif len(answers) < nodes:
        why = f"; {nodes - len(answers)} did not answer {within}"
    elif nodes < wanted:
        why = ": start the others first"
    else:
        why = ": set it to that"
    there = _listed(sorted(answer.partition for answer in answers.values()))
    which = f" (partition-id {there})" if answers else ""
    return RosterError(
        f"num-clients is {wanted}, but the number of nodes with data is {len(answers)}{which}{why}"
    )


def _check_all_actors_live(replies: Iterable[Message]) -> None:
    """Raise a RosterError if Ray's simulation has lost an actor, to lack of memory or otherwise.

    Flower keeps sending clients to the lost actor, where all of them fail at once, so that hardly
    any client would still learn.
    """
    for reply in replies:
        reason = (reply.error.reason or "") if reply.has_error() else ""
        if _LOST_ACTOR.match(reason):
            raise RosterError(
                "Ray has lost a process in which clients train, or its machine, and Flower does "
                "not replace it: start the run again with resume=true, with fewer workers if "
                f"memory ran out ({' '.join(reason.split())[-200:]})"
            )


def _partition_of(reply: Message) -> int | None:
    """The partition that a node says it has; None if it does not say so."""
    record: Any = reply.content.metric_records.get("node", {})
    partition = record.get("partition-id")
    return partition if isinstance(partition, int) else None


def _node_at(answers: dict[int, Answer]) -> dict[int, int]:
    """Return {partition: its node}, in rising order; refuse a partition that two nodes have."""
    for partition, times in Counter(answer.partition for answer in answers.values()).items():
        if times > 1:
            raise RosterError(
                f"{times} nodes have partition-id={partition}: give each its own in --node-config"
            )
    return dict(sorted((answer.partition, node) for node, answer in answers.items()))


def _schema_of(answers: Iterable[Answer]) -> Schema | None:
    """Return the schema of the nodes' own data; None if a node has none, as with shared data.

    Raises:
        RosterError: a schema cannot be read, or two differ.
    """
    first: tuple[int, Schema] | None = None
    for answer in answers:
        if answer.data is None:
            return None
        if why := _mismatch(first, answer):
            raise RosterError(why)
        first = first or (answer.partition, Schema.of(NODES, answer.data))
    return first[1] if first else None


def _mismatch(first: tuple[int, Schema] | None, answer: Answer) -> str:
    """Say why a node's data do not match those of the ``first`` partition; "" if they do."""
    partition, data = answer
    try:
        found = Schema.of(NODES, data)
    except (KeyError, TypeError, ValueError) as error:
        return (
            f"partition {partition} describes its data in another version's way: give all "
            f"nodes the same version ({type(error).__name__}: {error})"
        )
    if first is None or found == first[1]:
        return ""
    difference = _difference(first, (partition, found))
    return f"nodes' data do not match: {difference}: {_remedy(first[1], found)}"


def _listed(partitions: Iterable[int]) -> str:
    return listed([str(partition) for partition in partitions], most=20)


def _difference(one: tuple[int, Schema], other: tuple[int, Schema]) -> str:
    """Say how the data of two partitions differ: in the order of columns, or altogether."""
    (first, ours), (second, theirs) = one, other
    if ours.classes == theirs.classes and sorted(ours.columns) == sorted(theirs.columns):
        for place, (here, there) in enumerate(zip(ours.columns, theirs.columns, strict=True), 1):
            if here != there:
                return (
                    f"the same columns are in another order: column {place} is {here!r} in "
                    f"partition {first} and {there!r} in partition {second}"
                )
    return f"partition {first} has {ours.examples()}, partition {second} has {theirs.examples()}"


def _remedy(one: Schema, other: Schema) -> str:
    """Say how to make the nodes' data alike."""
    if one.classes != other.classes:
        return (
            "give classes the same names; if a node has no example of some, name them all for "
            "the run, as in classes=cat,dog,owl"
        )
    if one.columns != other.columns:
        return "give all nodes the same columns in the same order"
    if one.pixels and other.pixels and one.shape[1:] == other.shape[1:]:
        return "some are grey and some in colour: convert those of one kind at their site"
    if one.pixels and other.pixels:
        return "give all nodes images of the same size and colours; image-size=64 resizes them"
    return "give all nodes examples of the same shape and kind"


def match(sent: dict[int, Message], received: Iterable[Message]) -> dict[int, Message]:
    """Return the replies by client, in rising order.

    They are matched by the message they reply to, not by sender: a reply that the server made for
    a dead node comes from node 1.
    """
    client_of = {message.metadata.message_id: client for client, message in sent.items()}
    by_client = {}
    for reply in received:
        client = client_of.get(reply.metadata.reply_to_message_id)
        if client is not None:
            by_client[client] = reply
    return dict(sorted(by_client.items()))
