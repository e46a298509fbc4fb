"""What real machines do, on real processes: nothing is lost, and somebody says what happened."""

from __future__ import annotations

import importlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import client_app
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.deployment.processes import Deployment
from pfedgpa_app.engine.flower import stage
from pfedgpa_app.runs.experiment import run
from tests.support.federations import PLAIN, records, summary
from tests.support.local_grid import InProcessGrid
from tests.support.processes import until

LOST = ("did not answer", "lost its process", "code 5")  # whether Flower or we noticed first
TESTS = Path(__file__).parents[1]
QUICK = PLAIN | {"evaluate-every": 0}  # every message starts a process that imports torch


def faulty(folder: Path, faults: dict[str, str]) -> Path:
    """The app, whose clients go wrong: {"PARTITION ROUND": FAULT}."""
    staged = stage(APP_DIR, folder)
    (staged / "client_app.py").rename(staged / "honest_client_app.py")
    shutil.copy(
        Path(__file__).parents[1] / "support" / "faulty_client_app.py", staged / "client_app.py"
    )
    (staged / "faults.py").write_text(f"FAULTS = {faults!r}\n")
    return staged


def warnings(folder: Path) -> list[str]:
    return [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]


# {client: [(what goes wrong in a round, what is said of it)]}
GARBAGE = {
    "1": [
        ("raises", "out of paper"),
        ("nan", "not finite"),
        ("huge", "as large as usual"),
        ("shape", "of shape"),
    ],
    "2": [
        ("names", "missing names"),
        ("replayed", "of round 1"),
        ("infinite", "not finite"),
        ("dtype", "float64"),
    ],
    "3": [("empty", "missing names")] * 4,
}
Kinds = dict[str, list[tuple[str, str]]]


def by_round(kinds: Kinds) -> dict[str, str]:
    """As the faulty app wants it: {"CLIENT ROUND": FAULT}."""
    return {
        f"{c} {r}": fault for c, all_of in kinds.items() for r, (fault, _) in enumerate(all_of, 1)
    }


def check_garbage(folder: Path, kinds: Kinds) -> None:
    """It was named, and nothing of it entered."""
    for client, all_of in kinds.items():
        for server_round, (_, what) in enumerate(all_of, 1):
            start = f"fedavg round {server_round}: client {client} "
            [found] = [text for text in warnings(folder) if text.startswith(start)]
            assert what in found
    took_part = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
    assert took_part == {(r, 0) for r in range(1, len(kinds["1"]) + 1)}
    clients = {r["client"] for r in records(folder, "clients.jsonl")}
    assert clients == {0, *map(int, kinds)}


def test_clients_that_send_garbage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = ModuleType("faults")
    faults.FAULTS = by_round(GARBAGE)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "faults", faults)
    monkeypatch.setitem(sys.modules, "honest_client_app", client_app)
    monkeypatch.delitem(sys.modules, "tests.support.faulty_client_app", raising=False)
    app = importlib.import_module("tests.support.faulty_client_app").app
    settings = QUICK | {"method": "pfedgpa-once", "num-clients": 4, "num-server-rounds": 4}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "pfedgpa.fit-steps": 20}
    check_garbage(run(InProcessGrid(settings, 4, app=app), resolve(settings)), GARBAGE)


@pytest.mark.slow
def test_clients_over_a_network(tmp_path: Path) -> None:
    """In round 1 one loses its process; one's node dies and comes back, without a key and so by
    another name, and is still the same client; one is slower than the timeout. In round 2 the
    first two send garbage, and nothing of it enters."""
    here, go_on = tmp_path / "here", tmp_path / "go on"
    faults = {"1 1": "exits", "2 1": f"touch {here}", "3 1": f"wait {go_on}"}
    faults |= {"1 2": "raises", "2 2": "large"}  # 256 MiB where 100 kB were asked for
    said: dict[str, tuple[str, ...]] = dict.fromkeys(("1 1", "2 1", "3 1"), LOST)
    said |= {"1 2": ("out of paper",), "2 2": ("are enough",)}
    # Flower takes a minute to notice a dead process; on a busy machine the healthy take that, too
    settings = QUICK | {"method": "fedper", "num-clients": 4, "timeout": 90.0}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "num-server-rounds": 2}
    folder = tmp_path / "run"
    deployment = Deployment()
    with deployment:
        deployment.wait_until_ready()
        for node in range(4):
            deployment.start_node(node, state_dir=str(deployment.home / f"state-{node}"))
        deployment.await_nodes()
        run_id = deployment.run(faulty(deployment.home / "app", faults), settings)
        until(here.exists)
        deployment.kill_node(2)
        deployment.start_node(2, state_dir=str(deployment.home / "state-2"))
        events = folder / "events.jsonl"
        until(lambda: "round 1: client 3 did not answer" in events.read_text())
        go_on.touch()
        failure = deployment.wait(run_id, tmp_path / "log")
    assert not failure, (tmp_path / "log").read_text()
    for when, words in said.items():
        client, server_round = when.split()
        start = f"fedper round {server_round}: client {client} "
        [text] = [text for text in warnings(folder) if text.startswith(start)]
        assert any(word in text for word in words)
    took_part = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
    missing = {(r, c) for r in (1, 2) for c in range(4)} - took_part
    wrong = {(int(when[2]), int(when[0])) for when in faults}
    assert wrong <= missing <= wrong | {(2, 3)}  # the last may be late again
    assert {0, 1, 2} <= {r["client"] for r in records(folder, "clients.jsonl")}


@pytest.mark.slow
def test_a_disk_without_room_for_checkpoints(tmp_path: Path) -> None:
    """Files above 150 kB cannot be written: the run says so and comes to its end."""
    settings = QUICK | {"method": "client-mean", "num-clients": 8, "num-server-rounds": 2}
    settings |= {"out-dir": str(tmp_path), "run-name": "run", "save-weights": "false"}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "pfedgpa_app", "run", "--engine", "process", *words]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000)),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no checkpoint could be written" in "".join(warnings(tmp_path / "run"))
    assert summary(tmp_path / "run")["client-mean"]["accuracy_before_ft"] > 0
