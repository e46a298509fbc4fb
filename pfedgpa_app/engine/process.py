"""The process engine: a pool of single-threaded workers serves the clients of a round.

A worker is sent a client's message and context, and answers with the reply and the new state. So
any worker can serve any client, and one that dies takes no state with it. Images are mapped from
the machine's cache; weights go through a pipe (0.4 MB take under a millisecond, a client's round
about a hundred).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Self

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from joblib import cpu_count

from pfedgpa_app.engine import spawning
from pfedgpa_app.engine.grid import Awaited, LocalGrid, identify, raised

LoadApp = Callable[[], ClientApp]


def _work(load_app: LoadApp, connection: Connection, log: Path | None) -> None:
    """Serve one message after another, as a worker, until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    spawning.write_to(log)
    spawning.end_with_parent()
    identify()
    torch.set_num_threads(1)
    app = load_app()
    while True:
        try:
            message, context = connection.recv()
        except EOFError:
            return
        try:
            reply = app(message, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned {reply!r} instead of a Message")
            answer = reply, context.state
        except Exception as error:
            answer = raised(message, error), None
        connection.send(answer)


class _Worker:
    """A worker process and what it is busy with."""

    def __init__(self, start: Any, load_app: LoadApp, log: Path | None) -> None:
        self.connection, theirs = start.Pipe()
        self.process: BaseProcess = start.Process(target=_work, args=(load_app, theirs, log))
        self.process.start()
        theirs.close()
        self.message: Message | None = None
        self.since = 0.0

    def begin(self, message: Message, context: Context) -> None:
        """Have the worker serve a message."""
        self.message, self.since = message, time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # it has ended: seen at its answer
            self.connection.send((message, context))

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessGrid(LocalGrid):
    """Serves messages with ``workers`` processes while the ``with`` block lasts.

    A worker that dies costs only the reply that it owed; one that is late loses its work. Both are
    replaced, so that the next round starts with all workers.
    """

    def __init__(
        self,
        load_app: LoadApp,
        run_config: dict[str, Any],
        nodes: int,
        workers: int | None = None,
        log: Path | None = None,
    ) -> None:
        """Prepare to serve ``nodes`` nodes.

        Args:
            load_app: loads the ClientApp in each worker; pickle must know it.
            workers: how many there are at most; None: one per core.
            log: where the workers' output goes.
        """
        super().__init__(run_config, nodes)
        self._start, self._load_app, self._log = spawning.starter(), load_app, log
        self._size = min(nodes, workers or int(cpu_count()))
        self._workers: list[_Worker] = []

    def __enter__(self) -> Self:
        self._workers = [self._new_worker() for _ in range(self._size)]
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.end()
        self._workers = []

    def _new_worker(self) -> _Worker:
        return _Worker(self._start, self._load_app, self._log)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = self._new_worker()

    def awaited(self) -> list[Awaited]:
        now = time.monotonic()
        return [
            Awaited(self.client_of(message), worker.process.pid or 0, now - worker.since)
            for worker in list(self._workers)
            if (message := worker.message) is not None
        ]

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        queue, replies = deque(messages), list[Message]()
        while True:
            for worker in self._workers:
                if worker.message is None and queue:
                    message = queue.popleft()
                    worker.begin(message, self.contexts[message.metadata.dst_node_id])
            busy = [worker for worker in self._workers if worker.message is not None]
            if not busy:
                return replies
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            ready = wait([w.connection for w in busy], left)
            if not ready:  # too late: nobody waits for them any more
                for worker in busy:
                    self._replace(worker)
                return replies
            replies += [self._answer(w) for w in busy if w.connection in ready]
            self.answered(len(replies) / len(messages))

    def _answer(self, worker: _Worker) -> Message:
        message = worker.message
        assert message is not None
        try:
            reply, state = worker.connection.recv()
        except (EOFError, OSError):  # the pipe ends with the process
            worker.process.join()
            reason = f"the client's process ended (exit status {worker.process.exitcode})"
            self._replace(worker)
            error = Error(code=ErrorCode.CLIENT_APP_CRASHED, reason=reason)
            return Message(error, reply_to=message)
        worker.message = None
        if state is not None:
            self.contexts[message.metadata.dst_node_id].state = state
        answer: Message = reply
        return answer
