"""Whole runs on each engine, each by a process of its own, as a user starts them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from pfedgpa_app.config import APP_DIR
from pfedgpa_app.engine import LaunchError, local
from pfedgpa_app.engine.flower import free_port, processes_of
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.launcher import launch
from tests.test_federation import SMALL, federate, records, summary

# one after the other: Ray fills the machine
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("simulation")]
SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]
LIMIT = 1200  # seconds; a run takes about 30


def pfedgpa(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pfedgpa_app", "run", *SETTINGS, *arguments],
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
def in_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same federation, one client after another in this process."""
    return federate(tmp_path_factory.mktemp("local"), dataset="digits", save_uploads=True)[0]


@pytest.mark.parametrize("engine", ["ray", "process", "batched"])
def test_the_demo_runs_where_the_user_is_and_leaves_nothing_running(
    engine: str, tmp_path: Path, in_process: Path
) -> None:
    done = pfedgpa(tmp_path, "--engine", engine, "device=cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = results(tmp_path)
    assert str(folder) in done.stdout
    assert "fedavg round 4/4" in done.stdout
    assert "left" in done.stdout
    assert "| pFedGPA" in done.stdout
    assert list(summary(folder)) == ["local", "fedavg", "fedavg-ft", "client-mean", "pfedgpa"]
    if engine != "batched":  # whoever carries the messages: the same numbers, to the last digit
        assert records(folder) == records(in_process)
        assert records(folder, "clients.jsonl") == records(in_process, "clients.jsonl")
    config = json.loads((folder / "config.json").read_text())
    assert config["engine"] == {"value": engine, "from": "run-config"}
    names = {p.name for p in folder.iterdir()}
    assert {"accuracy.png", "clients.png", "latents.png", "table.md", "weights"} <= names
    commands = [p.info["cmdline"] for p in psutil.process_iter(["cmdline"])]
    assert not [c for c in commands if str(tmp_path) in " ".join(c or [])]


def test_relative_paths_are_the_users(
    tmp_path: Path, in_process: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(in_process / "distribution.safetensors", tmp_path / "learned")
    shutil.copy(in_process / "uploads.safetensors", tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    given = {"start-from": "learned", "uploads": "kept", "method": "fedavg", "engine": "process"}
    sent: dict[str, object] = {}

    def carry(app: Path, settings: dict[str, object], *rest: object) -> str:
        sent.update(settings)
        return "that will do"

    monkeypatch.setattr(local, "run", carry)
    with pytest.raises(LaunchError, match="that will do"):
        launch(given)
    assert sent["start-from"] == str(tmp_path / "learned")
    assert sent["uploads"] == str(tmp_path / "kept")


def test_plain_flwr_run_does_the_same_on_flowers_two_default_nodes(
    tmp_path: Path, in_process: Path
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
        assert records(folder) == records(in_process)
    finally:
        for pid in processes_of(home):
            os.kill(pid, signal.SIGTERM)


FAULTS = pytest.mark.parametrize(
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


@FAULTS
def test_a_failed_run_says_so_and_exits_with_1(
    tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    app = broken_app(tmp_path, file, old, new)
    done = pfedgpa(tmp_path, "--app", str(app), "--engine", "process", "method=fedavg")
    assert done.returncode == 1, done.stdout + done.stderr
    assert words in done.stderr
    assert "flower" in done.stderr.lower()  # where the log is
    if words:
        assert "no idea" in done.stdout + done.stderr
        assert json.loads((results(tmp_path) / "config.json").read_text())


@pytest.fixture(scope="module")
def simulation() -> Iterator[Simulation]:
    with Simulation() as flower:
        yield flower


@FAULTS
def test_so_does_one_under_ray(
    simulation: Simulation, tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    app = broken_app(tmp_path, file, old, new)
    chosen = SMALL | {"engine": "ray", "method": "fedavg", "out-dir": str(tmp_path / "results")}
    said = io.StringIO()
    with pytest.raises(LaunchError) as failed:  # for which the command exits with 1
        launch(chosen, app, Console(file=said, width=1000), simulation)
    assert words in str(failed.value)
    assert "flower" in str(failed.value).lower()  # where the log is
    if words:
        assert "no idea" in said.getvalue() + str(failed.value)
        assert json.loads((results(tmp_path) / "config.json").read_text())


def started(folder: Path, engine: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """An endless run that has come to its second round."""
    endless = [*SETTINGS, "--engine", engine, "workers=2", "num-server-rounds=100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pfedgpa_app", "run", *endless],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "round 2/" in line:
            break
    return process


def test_an_interrupted_ray_run_stops_what_it_started(tmp_path: Path) -> None:
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    process = started(tmp_path, "ray", {"TMPDIR": str(temporary)})
    (home,) = temporary.glob("pfedgpa-*")
    assert len(processes_of(home)) > 3  # SuperLink, simulation, Ray
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.wait(timeout=600) == 130
    assert processes_of(home) == []
    assert not home.exists()
    temporary.rmdir()


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_run_stops_what_it_started(
    sign: signal.Signals, tmp_path: Path
) -> None:
    process = started(tmp_path, "process", {})
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the server and two workers, and Python's own for starting them
    process.send_signal(sign)
    process.communicate()
    assert process.wait(timeout=600) == (-9 if sign == signal.SIGKILL else 130)
    deadline = time.monotonic() + 600  # a killed launcher's server notices by itself
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_a_ray_cluster_of_two_nodes_serves_a_run(tmp_path: Path, in_process: Path) -> None:
    home = Path(tempfile.mkdtemp(dir="/tmp"))  # Ray's sockets want a short path
    ray = str(Path(sys.executable).parent / "ray")
    address = f"127.0.0.1:{free_port()}"
    env = os.environ | {
        "FLWR_HOME": str(home),  # marks the cluster's processes
        "PYTHONPATH": str(APP_DIR),
        "RAY_USAGE_STATS_ENABLED": "0",
    }

    def node(*arguments: str) -> None:
        options = ["--num-cpus=1", "--node-ip-address=127.0.0.1", *arguments]
        subprocess.run([ray, "start", *options], env=env, check=True, capture_output=True)

    try:
        node("--head", f"--port={address[10:]}", "--include-dashboard=false", f"--temp-dir={home}")
        node(f"--address={address}")
        done = subprocess.run(
            [sys.executable, "-m", "pfedgpa_app", "run", *SETTINGS, "engine=ray", "method=fedavg"],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(APP_DIR), "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        fedavgs = [r for r in records(in_process) if r["federation"] == "fedavg"]
        assert records(results(tmp_path)) == fedavgs
        # two actors, each taking the whole of a node: the run has no Ray of its own
        logs = {log.name: log.read_text() for log in home.glob("session_*/logs/worker-*.out")}
        assert sum("ClientAppActor" in log for log in logs.values()) == 2
    finally:
        for sign in (signal.SIGTERM, signal.SIGKILL):
            for pid in processes_of(home):
                os.kill(pid, sign)
            time.sleep(2)
        shutil.rmtree(home, ignore_errors=True)
