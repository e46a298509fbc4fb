"""What real machines do, on real processes: nothing is lost, and somebody says what happened."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app.config import APP_DIR
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.engine import LaunchError
from pfedgpa_app.engine.flower import stage
from tests.test_federation import PLAIN, federate, records, summary
from tests.test_resume import results

LOST = ("did not answer", "lost its process")  # whether Flower or we noticed first
SLOW = 90.0  # seconds, longer than what Flower takes to notice a dead process
QUICK = PLAIN | {"evaluate-every": 0}  # every message starts a process that imports torch
pytestmark = pytest.mark.xdist_group("processes")  # one after the other: they fill the machine


def faulty(folder: Path, faults: dict[str, str]) -> Path:
    """The app, whose clients go wrong: {"PARTITION ROUND": FAULT}."""
    staged = stage(APP_DIR, folder)
    (staged / "client_app.py").rename(staged / "honest_client_app.py")
    shutil.copy(Path(__file__).parent / "faulty_client_app.py", staged / "client_app.py")
    (staged / "faults.json").write_text(json.dumps(faults))
    return staged


def until(condition: Callable[[], Any], seconds: float = 120) -> None:
    """Return when it holds.

    Raises:
        TimeoutError: it does not.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def warnings(folder: Path) -> list[str]:
    return [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]


def test_clients_that_go_wrong(tmp_path: Path) -> None:
    """Five nodes, one of them healthy; what others send never enters, and the run ends."""
    faults = {
        **{"1 1": "raises", "1 2": "nan", "1 3": "huge"},
        **{"2 1": "shape", "2 2": "dtype", "2 3": "infinite"},
        **{"3 1": "names", "3 2": "empty", "3 3": "exits"},
        **{"4 2": "replayed", "4 3": "slow"},
    }
    said = {
        **{"1 1": "out of paper", "1 2": "not finite", "1 3": "as large as usual"},
        **{"2 1": "of shape", "2 2": "float64", "2 3": "not finite"},
        **{"3 1": "missing names", "3 2": "missing names", "3 3": "lost"},
        **{"4 2": "an upload of round 1", "4 3": "lost"},
    }
    settings = QUICK | {"method": "pfedgpa-once", "num-clients": 5, "num-server-rounds": 3}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "timeout": SLOW / 2}
    with Deployment() as deployment:
        deployment.wait_until_ready()
        for node in range(5):
            deployment.start_node(node)
        deployment.await_nodes()
        run_id = deployment.run(faulty(deployment.home / "app", faults), settings)
        failure = deployment.wait(run_id, tmp_path / "log")
    assert not failure, (tmp_path / "log").read_text()
    folder = tmp_path / "run"
    for where, what in said.items():
        client, server_round = where.split()
        start = f"fedavg round {server_round}: client {client} "
        found = [text for text in warnings(folder) if text.startswith(start)]
        lost = what == "lost" and any(text in found[0] for text in LOST)
        assert what in found[0] or lost, found
    wrong = {(int(r), int(c)) for c, r in (key.split() for key in faults)}
    took_part = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
    assert took_part == {(r, c) for r in range(1, 4) for c in range(5)} - wrong
    assert {r["client"] for r in records(folder, "clients.jsonl")} >= {0, 1, 2, 3}


def test_a_node_that_dies_in_a_round_and_comes_back(tmp_path: Path) -> None:
    """Without a key it comes back by another name, and is still the same client.

    Another one sends 2 GiB.
    """
    here = tmp_path / "here"
    settings = QUICK | {"method": "fedper", "num-clients": 3, "timeout": SLOW}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "num-server-rounds": 3}
    with Deployment() as deployment:
        deployment.wait_until_ready()
        for node in range(3):
            deployment.start_node(node, state_dir=str(deployment.home / f"state-{node}"))
        deployment.await_nodes()
        app = faulty(deployment.home / "app", {"1 1": "large", "2 2": f"touch {here}"})
        run_id = deployment.run(app, settings)
        until(here.exists)
        deployment.kill_node(2)
        deployment.start_node(2, state_dir=str(deployment.home / "state-2"))
        failure = deployment.wait(run_id, tmp_path / "log")
    assert not failure, (tmp_path / "log").read_text()
    folder = tmp_path / "run"
    [text] = [text for text in warnings(folder) if "round 2: client 2 " in text]
    assert "code 5" in text or "did not answer" in text
    assert any("round 1: client 1 sent" in t and "are enough" in t for t in warnings(folder))
    took_part = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
    assert took_part == {(r, c) for r in range(1, 4) for c in range(3)} - {(1, 1), (2, 2)}


def test_a_superlink_that_is_killed(tmp_path: Path) -> None:
    """Nodes reconnect; the run is started again and ends as if nothing had happened."""
    how: dict[str, Any] = {"method": "fedper", "num_clients": 2, "num_server_rounds": 2}
    how["evaluate_every"] = 0
    reference, _ = federate(tmp_path / "reference", **how)
    settings = QUICK | {key.replace("_", "-"): value for key, value in how.items()}
    settings |= {"out-dir": str(tmp_path), "run-name": "run"}
    events = tmp_path / "run" / "events.jsonl"
    with Deployment() as deployment:
        deployment.wait_until_ready()
        for node in range(2):
            deployment.start_node(node, state_dir=str(deployment.home / f"state-{node}"))
        deployment.await_nodes()
        staged = stage(APP_DIR, deployment.home / "app")
        deployment.run(staged, settings)
        until(lambda: events.exists() and "fedper round 1/2" in events.read_text())
        os.killpg(deployment.superlink.pid, signal.SIGKILL)
        deployment.superlink.wait()
        deployment.start_superlink()
        deployment.wait_until_ready()

        def again() -> str:
            try:
                return deployment.run(staged, settings | {"resume": True})
            except LaunchError:
                return ""

        run_id = again()
        failure = deployment.wait(run_id, tmp_path / "log")
    assert not failure, (tmp_path / "log").read_text()
    assert results(tmp_path / "run") == results(reference)
    assert any(e["kind"] == "resumed" for e in records(tmp_path / "run", "events.jsonl"))


def test_a_disk_without_room_for_checkpoints(tmp_path: Path) -> None:
    """Files above 150 kB cannot be written: the run says so and comes to its end."""
    settings = QUICK | {"method": "fedavg", "num-clients": 8, "num-server-rounds": 2}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "save-weights": "false"}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "pfedgpa_app.cli", "run", "--engine", "process", *words]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no checkpoint could be written" in "".join(warnings(tmp_path / "run"))
    assert summary(tmp_path / "run")["fedavg"]["accuracy_before_ft"] > 0
