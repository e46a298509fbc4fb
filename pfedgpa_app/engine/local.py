"""Run the app's two doors in a process of their own, over a grid without a network."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from flwr.app import Context, RecordDict
from flwr.common.config import get_project_config
from flwr.supercore.object_ref import load_app

from pfedgpa_app.config import PACKAGE, Config, package_of, resolve
from pfedgpa_app.engine import LaunchError, gpu_for
from pfedgpa_app.engine.grid import RUN_ID
from pfedgpa_app.engine.process import ProcessGrid, context_for


def load_door(app: Path, door: str) -> Any:
    """The Flower app's "serverapp" or "clientapp", as its pyproject.toml names it."""
    reference = get_project_config(app)["tool"]["flwr"]["app"]["components"][door]
    return load_app(reference, LaunchError, app)


def run(
    app: Path, settings: Mapping[str, Any], config: Config, log: Path, look: Callable[[], None]
) -> str:
    """Run the app in ``app`` with ``settings``; ``look`` is called while it runs.

    Returns:
        why the run did not complete, or "".
    """
    ours = package_of(app).samefile(PACKAGE)
    if not ours:  # an app with a package of its own: nothing that is imported here may be used
        sys.path.insert(0, str(app))
    start = context_for(fork=ours and not gpu_for(config.device))
    server = start.Process(target=_serve, args=(app, dict(settings), log))
    server.start()
    try:
        while server.exitcode is None:
            look()
            server.join(0.2)
    finally:
        server.terminate()
        server.join(20)
        server.kill()
        server.join()
    return "" if server.exitcode == 0 else f"the server ended with exit status {server.exitcode}"


def _serve(app: Path, settings: dict[str, Any], log: Path) -> None:
    """The server process: both doors and, between them, a grid."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the launcher decides when to stop
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    load_client = functools.partial(load_door, app, "clientapp")
    server_app = load_door(app, "serverapp")
    context = Context(RUN_ID, 1, {}, RecordDict(), settings)
    config = resolve(settings).config
    if config.engine == "batched":
        from pfedgpa_app.engine.batched import BatchedGrid

        _end_with_launcher()
        server_app(grid=BatchedGrid(load_client(), settings, config), context=context)
        return
    load_client()  # before the workers are forked: imported once
    fork = not gpu_for(config.device)
    with ProcessGrid(load_client, settings, config.num_clients, config.workers, fork) as grid:
        _end_with_launcher()  # a thread, which is better not there when workers are forked
        server_app(grid=grid, context=context)


def _end_with_launcher() -> None:
    """A launcher that was killed cannot end the run; then the run ends itself."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def watch(sentinel: int) -> None:
        wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
        os._exit(1)

    threading.Thread(target=watch, args=(launcher.sentinel,), daemon=True).start()
