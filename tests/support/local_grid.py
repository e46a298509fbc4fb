"""A ClientApp in this process, called in turn; what is sent can be seen and tampered with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flwr.app import Message
from flwr.clientapp import ClientApp

from client_app import app as our_app
from pfedgpa_app.engine.grid import LocalGrid, raised

Tamper = Callable[[Message, Message], Message | None]


class InProcessGrid(LocalGrid):
    """Calls the ClientApp; ``tamper`` may replace its reply, or return None to swallow it."""

    def __init__(
        self,
        run_config: dict[str, Any],
        nodes: int,
        tamper: Tamper | None = None,
        app: ClientApp = our_app,
    ):
        super().__init__(run_config, nodes)
        self.app = app
        self.tamper = tamper
        self.sent: list[Message] = []
        self.received: list[dict[str, Any]] = []  # clients' metrics

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies = []
        for message in messages:
            self.sent.append(message)
            reply: Message | None
            try:
                reply = self.app(message, self.contexts[message.metadata.dst_node_id])
            except Exception as error:
                reply = raised(message, error)
            if self.tamper and message.metadata.message_type != "query":
                reply = self.tamper(message, reply)
            if reply is not None:
                replies.append(reply)
                self._note(message, reply)
            self.answered(len(replies) / len(messages))
        return replies

    def _note(self, message: Message, reply: Message) -> None:
        asked = message.content.config_records.get("config")
        if asked is not None and "client" in asked and not reply.has_error():
            metrics: dict[str, Any] = dict(reply.content.metric_records.get("metrics", {}))
            self.received.append({"client": asked["client"], **metrics})
