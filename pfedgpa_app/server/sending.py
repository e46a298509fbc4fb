"""Send messages to nodes, and collect the replies."""

from __future__ import annotations

import errno
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from pfedgpa_app.messages import bytes_of
from pfedgpa_app.server.nodes import NodesError

POLL = 0.25  # seconds between polls for replies over HTTP
_LOST_ACTOR = re.compile(r"<class 'ray\.exceptions\.\w*Actor\w*'>")  # as Flower reports it


def array_bytes(message: Message) -> int:
    """Return how many bytes a message's arrays take when it is sent."""
    records = message.content.array_records.values()
    return sum(bytes_of(array) for record in records for array in record.values())


def is_flowers(grid: Grid, name: str) -> bool:
    """Whether ``grid`` is of Flower's class called ``name``.

    Names are compared because importing the class takes a second.
    """
    return any(kind.__name__ == name for kind in type(grid).__mro__)


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
            NodesError: Ray has lost a process of the simulation.
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


def _check_all_actors_live(replies: Iterable[Message]) -> None:
    """Raise a NodesError if Ray's simulation has lost an actor, to lack of memory or otherwise.

    Flower keeps sending clients to the lost actor, where all of them fail at once, so that hardly
    any client would still learn.
    """
    for reply in replies:
        reason = (reply.error.reason or "") if reply.has_error() else ""
        if _LOST_ACTOR.match(reason):
            raise NodesError(
                "Ray has lost a process in which clients train, or its machine, and Flower does "
                "not replace it: start the run again with resume=true, with fewer workers if "
                f"memory ran out ({' '.join(reason.split())[-200:]})"
            )


def check_room(replies: Iterable[Message], folder: str) -> None:
    """End the run if clients could not keep their state in ``folder``, for want of room.

    Its next rounds would be of those clients alone whose states are small.

    Raises:
        OSError: as a client raised it.
    """
    for reply in replies:
        reason = (reply.error.reason or "") if reply.has_error() else ""
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"{os.strerror(number)}: {folder!r}"[:-1] in reason:
                raise OSError(number, os.strerror(number), folder)


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
