"""Flower's Grid in this process: the real ClientApp, called in turn, over copied messages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any
from uuid import uuid4

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from client_app import app as client_app

RUN_ID = 1


class LocalGrid(Grid):
    """``nodes`` nodes; ``tamper`` may replace a reply, or return None to swallow it."""

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: int,
        tamper: Callable[[Message, Message], Message | None] | None = None,
    ) -> None:
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN_ID, 1, 1
        self._run = Run.create_empty(RUN_ID)
        self.tamper = tamper
        self.sent: list[Message] = []
        self._replies: dict[str, Message] = {}
        # ids neither start at 0 nor follow the partitions, as in Flower
        self.contexts = {
            9000 - 7 * i: Context(
                run_id=RUN_ID,
                node_id=9000 - 7 * i,
                state=RecordDict(),
                run_config=run_config,
                node_config={"partition-id": i, "num-partitions": nodes},
            )
            for i in range(nodes)
        }

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(self, *_: Any, **__: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = uuid4().hex
            ids.append(message.metadata.message_id)
            self.sent.append(message)
            try:
                reply: Message | None = client_app(
                    message, self.contexts[message.metadata.dst_node_id]
                )
            except Exception as error:
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(code=2, reason=reason), reply_to=message)
            if self.tamper and reply is not None and message.metadata.message_type != "query":
                reply = self.tamper(message, reply)
            if reply is not None:
                self._replies[message.metadata.message_id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(i) for i in list(message_ids) if i in self._replies]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))
