"""A Flower Grid without a network: its nodes are contexts in this process."""

from __future__ import annotations

import contextlib
import traceback
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Self
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from pfedgpa_app.server.sending import is_flowers

RUN_ID = 1
# ids neither start at 0 nor follow the partitions, as in Flower
FIRST_NODE, NODE_STEP = 1_000_003, -7


def identify() -> None:
    """Tell Flower who this process is; without that it can make no messages."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1


class Awaited(NamedTuple):
    """A client that the server waits for."""

    client: int
    process: int  # the id of the process that serves it
    seconds: float  # since it was asked


class LocalGrid(Grid):
    """A federation of ``nodes`` nodes, one per partition; a subclass says how messages are served.

    Attributes:
        contexts: each node's context; what a client keeps between rounds lives there.
        answered: is called with the share of the messages being served that have a reply.
    """

    def __init__(self, run_config: dict[str, Any], nodes: int) -> None:
        identify()
        self._run = Run.create_empty(RUN_ID)
        self._replies: dict[str, Message] = {}
        self._remarks: list[str] = []
        self._listener: Callable[[str], object] | None = None
        self.answered: Callable[[float], object] = lambda share: None
        self.contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                state=RecordDict(),
                run_config=run_config,
                node_config={"partition-id": i, "num-partitions": nodes},
            )
            for i, node in enumerate(range(FIRST_NODE, FIRST_NODE + nodes * NODE_STEP, NODE_STEP))
        }

    @abstractmethod
    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        """Have the clients answer; return replies in any order, without those of silent clients."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End what serves the messages; here there is nothing to end."""

    def remark(self, text: str) -> None:
        """Tell the run's user something about how messages are served, but only once."""
        if text not in self._remarks:
            self._remarks.append(text)
            if self._listener is not None:
                self._listener(text)

    def listen(self, listener: Callable[[str], object]) -> None:
        """Have ``listener`` called with every remark, including those made so far."""
        self._listener = listener
        for text in self._remarks:
            listener(text)

    def client_of(self, message: Message) -> int:
        """Return the client that a message is for."""
        return int(self.contexts[message.metadata.dst_node_id].node_config["partition-id"])

    def awaited(self) -> list[Awaited]:
        """Return the clients that have yet to answer; a thread of its own calls this."""
        return []

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = self._addressed(messages)
        for reply in self.serve(sent, None):
            self._replies[reply.metadata.reply_to_message_id] = reply
        return [message.metadata.message_id for message in sent]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.serve(self._addressed(messages), timeout)

    @staticmethod
    def _addressed(messages: Iterable[Message]) -> list[Message]:
        """Return the messages, each with an id of its own, as Flower's link state gives them."""
        addressed = list(messages)
        for message in addressed:
            message.metadata.__dict__["_message_id"] = uuid4().hex
        return addressed


def raised(message: Message, error: BaseException) -> Message:
    """Make the reply to ``message`` when the ClientApp has raised ``error``.

    It is as Flower makes it, with the whole traceback.
    """
    where = "".join(traceback.format_exception(error))
    reason = f"{type(error)}:<'{error}'>\n{where}"
    code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    return Message(Error(code=code, reason=reason), reply_to=message)


@contextlib.contextmanager
def telling(grid: Grid, answered: Callable[[float], object]) -> Iterator[None]:
    """While the block lasts, tell ``answered`` what share of its messages ``grid`` has replies to.

    Flower's own grids do not tell.
    """
    if not isinstance(grid, LocalGrid):
        yield
        return
    before, grid.answered = grid.answered, answered
    try:
        yield
    finally:
        grid.answered = before


def is_simulated(grid: Grid) -> bool:
    """Whether the clients are on this machine."""
    return isinstance(grid, LocalGrid) or is_flowers(grid, "InMemoryGrid")
