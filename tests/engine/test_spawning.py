"""Processes start afresh: never as a copy of one in which torch has computed."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest
import torch

from pfedgpa_app.engine import spawning

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="has no fork server")
LARGE = 1 << 20  # numbers: torch's loops over so many are parallel


def look_around(answer: Connection) -> None:
    """What a new process finds."""
    torch.set_num_threads(2)
    total = float(torch.ones(LARGE).clone().sum())  # waits for ever in a copy without threads
    parent = psutil.Process(os.getppid())
    answer.send(
        (total, parent.num_threads(), parent.cmdline(), "pfedgpa_app.client.cohort" in sys.modules)
    )


def found() -> tuple[float, int, list[str], bool]:
    start = spawning.starter()
    ours, theirs = start.Pipe()
    process = start.Process(target=look_around, args=(theirs,))
    process.start()
    assert ours.poll(120), "the new process stands still"
    answer: tuple[float, int, list[str], bool] = ours.recv()
    process.join()
    return answer


def tell_parent(answer: Connection) -> None:
    answer.send(os.getppid())


def serve_another(orders: Connection) -> None:
    """A run's server that starts one worker and tells who their parents are."""
    start = spawning.starter()
    ours, theirs = start.Pipe()
    process = start.Process(target=tell_parent, args=(theirs,))
    process.start()
    orders.send((os.getppid(), ours.recv(), os.environ.get("PFEDGPA_LATE")))
    process.join()


def test_a_process_computes_where_the_one_that_started_it_has() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(LARGE).clone()
        assert found()[0] == LARGE
    finally:
        torch.set_num_threads(threads)


@LINUX
def test_workers_are_copies_of_a_process_with_one_thread_that_has_imported_for_them() -> None:
    _, threads, command, imported = found()
    assert threads == 1
    assert "forkserver" in " ".join(command)
    assert imported


@LINUX
def test_a_server_and_its_workers_are_copies_of_one_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So that a run imports torch twice, in the launcher and there, not three times."""
    monkeypatch.setenv("PFEDGPA_LATE", "said after the fork server's start")
    found()  # it runs
    with spawning.Server(serve_another) as server:
        assert server.connection.poll(120)
        parent, worker_parent, late = server.connection.recv()
    assert parent == worker_parent
    assert late == "said after the fork server's start"


@LINUX
def test_where_the_fork_servers_socket_would_have_too_long_a_name(tmp_path: Path) -> None:
    place = tmp_path / ("x" * 80)
    place.mkdir()
    code = "from pfedgpa_app.engine import spawning; print(spawning.starter()._name)"
    env = os.environ | {"TMPDIR": str(place), "PYTHONPATH": str(Path(spawning.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "spawn\n", done.stderr


def test_what_a_run_waits_for_at_its_start_is_torch_alone() -> None:
    """Flower's own link, with its web server and data bases, would take a second and a half."""
    code = "import sys, pfedgpa_app.runs.launcher, pfedgpa_app.engine.local; print(*sys.modules)"
    env = os.environ | {"PYTHONPATH": str(Path(spawning.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded, done.stderr
    slow = {"fastapi", "sqlalchemy", "alembic", "sklearn", "pandas", "matplotlib", "torchvision"}
    assert not loaded & (slow | {"ray"})
