"""Run the app's two doors in one server process, over a grid without a network."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, RecordDict
from flwr.common.config import get_project_config
from flwr.supercore.object_ref import load_app

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import PACKAGE, package_of
from pfedgpa_app.engine import LaunchError, Poll, spawning
from pfedgpa_app.engine.grid import RUN_ID, Awaited, LocalGrid
from pfedgpa_app.engine.process import ProcessGrid
from pfedgpa_app.engine.spawning import Server
from pfedgpa_app.results.log import clock

_PATIENCE = 5.0  # seconds that the server has to answer


def load_door(app: Path, door: str) -> Any:
    """Load the Flower app's "serverapp" or "clientapp", as its pyproject.toml names it."""
    reference = get_project_config(app)["tool"]["flwr"]["app"]["components"][door]
    return load_app(reference, LaunchError, app)


def run(
    app: Path,
    settings: Mapping[str, Any],
    log: Path,
    poll: Poll,
) -> str:
    """Run the app in ``app`` with ``settings``.

    Args:
        poll: called while it runs.

    Returns:
        why the run did not complete, or "".
    """
    start = None
    if not package_of(app).samefile(PACKAGE):  # with a package of its own, it must use none of ours
        sys.path.insert(0, str(app))
        start = multiprocessing.get_context("spawn")
    with Server(serve, start) as server:
        with contextlib.suppress(OSError):  # its exit status says more
            server.connection.send((app, dict(settings), log))
        while server.process.exitcode is None:
            poll(functools.partial(_state, server))
            server.process.join(0.2)
    status = server.process.exitcode
    return f"the server ended with exit status {status}" if status else ""


def serve(orders: Connection) -> None:
    """Do what the server process does: connect both doors by a grid, and run them."""
    try:
        app, settings, log = orders.recv()
    except EOFError:  # the launcher has refused the run
        return
    spawning.write_to(log)
    load_client = functools.partial(load_door, app, "clientapp")
    server_app = load_door(app, "serverapp")
    context = Context(RUN_ID, 1, {}, RecordDict(), settings)
    config = resolve(settings).config
    if config.engine == "batched":
        from pfedgpa_app.engine.batched import BatchedGrid

        grid: LocalGrid = BatchedGrid(load_client(), settings, config)
    else:
        grid = ProcessGrid(load_client, settings, config.num_clients, config.workers, log)
    with grid:
        spawning.end_with_parent(orders, grid.awaited)
        server_app(grid=grid, context=context)


def _state(server: Server) -> str:
    """Say in one sentence which process waits for what."""
    pid, questions = server.process.pid or 0, server.connection
    try:
        while questions.poll():  # answers that came too late
            questions.recv()
        questions.send(None)
        answers = questions.poll(_PATIENCE)
        awaited: list[Awaited] = questions.recv() if answers else []
    except (OSError, EOFError):
        return f"the server (process {pid}) is ending"
    load = _load([pid, *(each.process for each in awaited)])
    if not answers:
        return f"the server (process {pid}, {load[pid]}) does not answer"
    if not awaited:
        return f"the server (process {pid}, {load[pid]}) is waiting for no client"
    clients = ", ".join(
        f"client {each.client} (process {each.process}, {load[each.process]}, "
        f"for {clock(each.seconds)})"
        for each in awaited
    )
    return f"the server (process {pid}, {load[pid]}) is waiting for {clients}"


def _load(pids: Sequence[int]) -> dict[int, str]:
    """Measure what each process uses of a CPU in a second, as in "98 % CPU"."""
    found = {}
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            found[pid] = psutil.Process(pid)
            found[pid].cpu_percent()
    time.sleep(1)
    load = dict.fromkeys(pids, "gone")
    for pid, process in found.items():
        with contextlib.suppress(psutil.Error):
            load[pid] = f"{process.cpu_percent():.0f} % CPU"
    return load
