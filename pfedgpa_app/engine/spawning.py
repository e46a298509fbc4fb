"""How our processes start: never as a copy of one that has computed.

A fork copies memory and locks, but no threads. In a copy of a process in which torch has computed,
the next parallel loop waits for OpenMP's threads for ever (pytorch/pytorch#17199). So a run's
server and workers are copies of one fork server, which imports what they need, computes nothing
and has one thread; where there is no fork server, they are new interpreters.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Self, cast

IMPORTED = [
    "pfedgpa_app.cli",
    "pfedgpa_app.engine.local",
    "pfedgpa_app.client.cohort",
    "pfedgpa_app.runs.experiment",
    "flwr.serverapp",
]  # what is imported before they start
GRACE = 5.0  # seconds that a process is given to end
_SOCKET = 70  # longest temporary folder in which the name of the fork server's socket is valid


class Server:
    """A run's server process, which waits for its orders and ends with the ``with`` block."""

    def __init__(self, serve: Callable[[Connection], None], start: Any = None) -> None:
        """Start the process.

        Args:
            serve: what it does, given the connection that its orders come through.
            start: a ``multiprocessing`` context to start it with; None: the usual one.
        """
        start = start or starter()
        self.connection, theirs = start.Pipe()
        given = serve, theirs, dict(os.environ), _key()
        self.process = start.Process(target=_serve, args=given)
        with _deaf_to_interrupts():  # the launcher decides
            self.process.start()
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the process, by killing it if need be."""
        self.process.terminate()
        self.process.join(GRACE)
        self.process.kill()
        self.process.join()


def _serve(
    serve: Callable[[Connection], None], orders: Connection, environment: dict[str, str], key: Any
) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _as_the_launcher(environment, key)
    with contextlib.suppress(KeyboardInterrupt):
        serve(orders)


def _as_the_launcher(environment: dict[str, str], key: Any) -> None:
    """Give a copy of the fork server the launcher's environment, and its fork server."""
    if forkserver.get_inherited_fds() is None:  # a new interpreter
        return
    os.environ.clear()  # the fork server may have been started long ago
    os.environ.update(environment)
    _share_fork_server(key)


def _key() -> Any:
    """Return the key that newer Pythons' fork servers ask for; None in other Pythons."""
    return getattr(forkserver._forkserver, "_forkserver_authkey", None)


def _share_fork_server(key: Any) -> None:
    """Have this copy of a fork server start its processes by the same fork server.

    ``multiprocessing`` means to do so (``ForkServer.ensure_running``). But it sees no fork server
    that it has not started itself, and starts another, which imports everything anew.
    """
    known, parent = cast(Any, forkserver)._forkserver, os.getppid()
    start_another = known.ensure_running

    def ensure_running() -> None:
        if os.getppid() != parent:  # the fork server has died
            start_another()

    known._forkserver_authkey = key
    known.ensure_running = ensure_running
    forkserver.ensure_running = ensure_running


@contextlib.contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """Have the processes that are started in the block ignore Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def starter() -> Any:
    """Return the ``multiprocessing`` context that starts a run's processes."""
    if _has_fork_server():
        prepare()
        return multiprocessing.get_context("forkserver")
    return multiprocessing.get_context("spawn")


def _has_fork_server() -> bool:
    return sys.platform == "linux" and len(tempfile.gettempdir()) <= _SOCKET


def prepare() -> None:
    """Start the fork server, which imports while this process goes on."""
    if not _has_fork_server():
        return
    forkserver.set_forkserver_preload(IMPORTED)
    # modules come from where this process has them, never from the user's folder; NumPy's
    # OpenBLAS would start threads when it is imported
    path = os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path)
    environment = _environment(PYTHONPATH=path, PYTHONSAFEPATH="1", OPENBLAS_NUM_THREADS="1")
    with environment, _deaf_to_interrupts():
        forkserver.ensure_running()


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def write_to(log: Path | None) -> None:
    """Append what this process prints to ``log``."""
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(descriptor, stream)


def end_with_parent(
    questions: Connection | None = None, answer: Callable[[], object] = lambda: None
) -> None:
    """Have a thread end this process soon after its parent is gone.

    Args:
        questions: a connection on which the parent asks for an ``answer`` now and then.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        with contextlib.suppress(OSError, EOFError):
            while questions is not None and wait([sentinel, questions]) == [questions]:
                questions.recv()
                questions.send(answer())
            wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()
