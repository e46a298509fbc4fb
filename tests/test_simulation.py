"""Real Flower simulations on Ray, each by a process of its own, as a user starts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app.config import APP_DIR
from pfedgpa_app.engine.ray import _processes_of, free_port
from tests.test_federation import SMALL, federate, records, summary

SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]
LIMIT = 400  # seconds; a run takes about 30


def pfedgpa(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pfedgpa_app.cli", "run", *SETTINGS, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)},
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )


def results(folder: Path) -> Path:
    (run,) = (folder / "results").iterdir()
    return run


def broken_app(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the app with one line of ``file`` changed."""
    app = folder / "app"
    app.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "server_app.py", "client_app.py"):
        shutil.copy(APP_DIR / name, app / name)
    for name in ("pfedgpa_app", "conf"):
        shutil.copytree(APP_DIR / name, app / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (app / file).read_text()
    assert text.count(old) == 1
    (app / file).write_text(text.replace(old, new))
    return app


@pytest.fixture(scope="module")
def in_process(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same federation without Ray."""
    folder, _ = federate(tmp_path_factory.mktemp("local"), dataset="digits")
    return records(folder)


def test_the_demo_runs_where_the_user_is_and_leaves_nothing_running(
    tmp_path: Path, in_process: list[dict[str, Any]]
) -> None:
    done = pfedgpa(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = results(tmp_path)
    assert str(folder) in done.stdout
    assert "fedavg round 4/4" in done.stdout
    assert "left" in done.stdout
    assert "| pFedGPA" in done.stdout
    assert list(summary(folder)) == ["local", "fedavg", "fedavg-ft", "client-mean", "pfedgpa"]
    assert records(folder) == in_process  # Ray or not: the same numbers, to the last digit
    names = {p.name for p in folder.iterdir()}
    assert {"accuracy.png", "clients.png", "latents.png", "table.md", "weights"} <= names
    assert not [p for p in Path("/proc").glob("[0-9]*") if _runs_in(p, str(tmp_path))]


def _runs_in(process: Path, mark: str) -> bool:
    try:
        return mark.encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False


def test_plain_flwr_run_does_the_same_on_flowers_two_default_nodes(
    tmp_path: Path, in_process: list[dict[str, Any]]
) -> None:
    home = tmp_path / "home"
    env = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(free_port()),
        "FLWR_LOCAL_CONTROL_API_PORT": str(free_port()),
    }
    try:
        done = subprocess.run(
            ["flwr", "run", str(APP_DIR), "--stream", "-c", " ".join(SETTINGS)],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        folder = results(tmp_path)  # in the user's folder, not in a copy of the app
        assert f"results are in {folder}" in done.stdout + done.stderr
        assert records(folder) == in_process
    finally:
        for pid in _processes_of(home):
            os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        (
            "server_app.py",
            "    run(grid, resolve(context.run_config))",
            '    raise RuntimeError("the roof is on fire")',
            "",
        ),
        (
            "server_app.py",
            "    run(grid, resolve(context.run_config))",
            "    raise SystemExit(3)",
            "",
        ),
        (
            "client_app.py",
            "    weights, loss = visit.method.train(task)",
            '    raise RuntimeError("no idea")',
            "none of 4 clients sent a usable upload",
        ),
    ],
    ids=["ServerApp raises", "ServerApp exits", "every client raises"],
)
def test_a_failed_run_says_so_and_exits_with_1(
    tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    app = broken_app(tmp_path, file, old, new)
    done = pfedgpa(tmp_path, "--app", str(app), "method=fedavg")
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr
    assert "flower" in done.stderr.lower()  # where the log is
    if words:
        assert "no idea" in done.stdout + done.stderr
        assert json.loads((results(tmp_path) / "config.json").read_text())


def test_an_interrupted_run_stops_what_it_started(tmp_path: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    process = subprocess.Popen(
        [sys.executable, "-m", "pfedgpa_app.cli", "run", *SETTINGS, "num-server-rounds=100000"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(APP_DIR), "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "round 2/" in line:
            break
    (home,) = temporary.glob("pfedgpa-*")
    assert len(_processes_of(home)) > 3  # SuperLink, simulation, Ray
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    assert _processes_of(home) == []
    assert not home.exists()
    temporary.rmdir()
