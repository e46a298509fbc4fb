"""The process engine: a pool of single-threaded workers serves the clients of a round.

A worker is sent a client's message and context and answers with the reply and the new state,
so any worker can serve any client and a dead one takes nothing with it. Images are mapped
from the machine's cache, weights go through a pipe (0.4 MB take under a millisecond, a
client's round some hundred).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Self

import torch
from flwr.app import Error, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from joblib import cpu_count

from pfedgpa_app.engine.grid import LocalGrid, identify, raised

LoadApp = Callable[[], ClientApp]


def context_for(fork: bool) -> Any:
    """How processes are started: forked, so that nothing is imported twice, or afresh.

    CUDA does not survive a fork, nor does macOS's Accelerate.
    """
    return multiprocessing.get_context("fork" if fork and sys.platform == "linux" else "spawn")


def _work(load_app: LoadApp, connection: Connection) -> None:
    """A worker's life: serve one message after another until the server is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server decides when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    identify()
    torch.set_num_threads(1)
    app, server = load_app(), multiprocessing.parent_process()
    assert server is not None
    while connection in wait([connection, server.sentinel]):
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

    def __init__(self, start: Any, load_app: LoadApp) -> None:
        self.connection, theirs = start.Pipe()
        self.process: BaseProcess = start.Process(target=_work, args=(load_app, theirs))
        self.process.start()
        theirs.close()
        self.message: Message | None = None

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class ProcessGrid(LocalGrid):
    """Serves messages with ``workers`` processes while the ``with`` block lasts.

    A worker that dies costs the one reply it owed, and one that is late its whole work: both
    are replaced, so that the next round starts with all workers.
    """

    def __init__(
        self,
        load_app: LoadApp,
        run_config: dict[str, Any],
        nodes: int,
        workers: int | None = None,
        fork: bool = True,
    ) -> None:
        """``load_app`` runs in each worker; forked workers cannot use CUDA."""
        super().__init__(run_config, nodes)
        self._start, self._load_app = context_for(fork), load_app
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
        return _Worker(self._start, self._load_app)

    def _replace(self, worker: _Worker) -> None:
        worker.end()
        self._workers[self._workers.index(worker)] = self._new_worker()

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        deadline = None if timeout is None else time.monotonic() + timeout
        queue, replies = deque(messages), list[Message]()
        while True:
            for worker in self._workers:
                if worker.message is None and queue:
                    worker.message = queue.popleft()
                    context = self.contexts[worker.message.metadata.dst_node_id]
                    with contextlib.suppress(BrokenPipeError):  # seen below, as its end
                        worker.connection.send((worker.message, context))
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
