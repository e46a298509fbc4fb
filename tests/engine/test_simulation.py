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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from rich.console import Console

from pfedgpa_app import cli
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data.datasets import load
from pfedgpa_app.engine import LaunchError, local
from pfedgpa_app.engine.flower import Flower
from pfedgpa_app.engine.guard import HOME, processes_of
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.runs.launcher import launch
from tests.support.federations import PLAIN, SMALL, federate, records, small, summary
from tests.support.processes import alive, until
from tests.support.ray_cluster import Cluster, two_machines

# one after the other: Ray fills the machine
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("simulation")]
SETTINGS, PLAINLY = (
    [f"{k}={v}" for k, v in (settings | {"num-server-rounds": 2}).items()]
    for settings in (SMALL, PLAIN)
)
LIMIT = 1200  # seconds; a run takes about 30
# a sweep's runs, not the sweep itself, read no images before they may
WAITING = """import pathlib, sys, time
import numpy
def read():
    while "sweep" not in sys.argv and not pathlib.Path("go").exists():
        time.sleep(0.1)
    return dict(numpy.load("mine.npz"))
"""


def pfedgpa(
    folder: Path, *arguments: str, where: Sequence[str] = (), **env: str
) -> subprocess.CompletedProcess[str]:
    """``pfedgpa run`` in ``folder``, behind the command that takes it ``where`` it is to run."""
    return subprocess.run(
        [*where, sys.executable, "-m", "pfedgpa_app", "run", *SETTINGS, *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)} | env,
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
    how = {"dataset": "digits", "save_uploads": True, "num_server_rounds": 2}
    return federate(tmp_path_factory.mktemp("local"), **how)[0]


def check_the_demo_runs(
    engine: str, tmp_path: Path, in_process: Path, where: Sequence[str] = (), **env: str
) -> None:
    """It does so where the user is, and leaves nothing running."""
    done = pfedgpa(tmp_path, "--engine", engine, "device=cpu", where=where, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = results(tmp_path)
    assert str(folder) in done.stdout
    assert "fedavg round 2/2" in done.stdout
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


@pytest.mark.parametrize("engine", ["process", "batched"])
def test_the_demo_runs_where_the_user_is_and_leaves_nothing_running(
    engine: str, tmp_path: Path, in_process: Path
) -> None:
    check_the_demo_runs(engine, tmp_path, in_process)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings with which a run was started last, which is then broken off."""
    sent: dict[str, Any] = {}

    def carry(app: Path, settings: dict[str, Any], *rest: object) -> str:
        sent.update(settings)
        return "that will do"

    monkeypatch.setattr(local, "run", carry)
    return sent


@pytest.mark.parametrize(
    ("name", "kept"),
    [("start-from", "distribution.safetensors"), ("uploads", "uploads.safetensors")],
)
def test_relative_paths_are_the_users(
    name: str,
    kept: str,
    sent: dict[str, Any],
    tmp_path: Path,
    in_process: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(in_process / kept, tmp_path / "kept")
    monkeypatch.chdir(tmp_path)
    same = {"num-server-rounds": 2, "engine": "process", "method": "fedavg"}
    with pytest.raises(LaunchError, match="that will do"):
        launch(small(same | {name: "kept"}))
    assert sent[name] == str(tmp_path / "kept")


def test_a_list_of_methods_is_a_text_in_messages(sent: dict[str, Any], tmp_path: Path) -> None:
    methods = ["fedavg", "local"]
    with pytest.raises(LaunchError, match="that will do"):
        launch(small({"method": methods, "out-dir": str(tmp_path), "engine": "process"}))
    assert sent["method"] == "fedavg,local"


def test_uploads_of_another_federation_are_refused_before_anything_starts(
    sent: dict[str, Any], tmp_path: Path, in_process: Path
) -> None:
    settings: dict[str, Any] = {"method": "fedavg", "num-server-rounds": 2, "seed": 1}
    settings |= {"uploads": str(in_process / "uploads.safetensors"), "out-dir": str(tmp_path)}
    with pytest.raises(ConfigError, match="made with seed = 0, but this run has 1"):
        launch(small(settings))
    assert not sent
    assert not list(tmp_path.iterdir())


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
            "    return request.trained(request.method.train(request.task()))",
            '    raise RuntimeError("no idea")',
            "none of 4 clients sent a usable upload",
        ),
    ],
    ids=["ServerApp raises", "ServerApp exits", "every client raises"],
)


@FAULTS
def test_a_failed_run_says_so_and_exits_with_1(
    tmp_path: Path,
    file: str,
    old: str,
    new: str,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    app = broken_app(tmp_path, file, old, new)
    arguments = ["run", "--app", str(app), "--engine", "process", *PLAINLY, "method=fedavg"]
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert words in said.err
    assert "flower" in said.err.lower()  # where the log is
    if words:
        assert "no idea" in said.out + said.err
        assert json.loads((results(tmp_path) / "config.json").read_text())


@FAULTS
def test_so_does_one_under_ray(
    simulation: Simulation, tmp_path: Path, file: str, old: str, new: str, words: str
) -> None:
    app = broken_app(tmp_path, file, old, new)
    chosen = PLAIN | {"engine": "ray", "method": "fedavg", "out-dir": str(tmp_path / "results")}
    said = io.StringIO()
    with pytest.raises(LaunchError) as failed:  # for which the command exits with 1
        launch(chosen, app, Console(file=said, width=1000), simulation)
    assert words in str(failed.value)
    assert "flower" in str(failed.value).lower()  # where the log is
    if words:
        assert "no idea" in said.getvalue() + str(failed.value)
        assert json.loads((results(tmp_path) / "config.json").read_text())


def test_a_process_that_ray_loses_ends_the_run(simulation: Simulation, tmp_path: Path) -> None:
    """Flower would hand it clients for ever, and hardly any would be left to learn."""
    line = "    return request.trained(request.method.train(request.task()))"
    app = broken_app(tmp_path, "client_app.py", line, "    __import__('os')._exit(1)")
    chosen = PLAIN | {"engine": "ray", "method": "fedavg", "out-dir": str(tmp_path / "results")}
    with pytest.raises(LaunchError, match=r"Ray has lost a process .* with resume=true"):
        launch(chosen, app, Console(file=io.StringIO()), simulation)


def test_a_deaf_superlink_is_asked_again_while_it_lives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flower = object.__new__(Flower)
    flower.superlink, flower.log = subprocess.Popen(["sleep", "1000"]), tmp_path / "superlink.log"
    flower.log.write_text("no memory left")
    ended = subprocess.Popen(["true"])
    monkeypatch.setattr(flower, "follow", lambda *_: ended)
    asked: list[str] = []

    def status(run_id: str) -> tuple[str, str]:
        asked.append(run_id)
        if len(asked) == 2:
            return "finished:completed", ""
        raise LaunchError("flwr ls failed: connection unavailable")

    monkeypatch.setattr(flower, "status", status)
    assert flower.wait("1", tmp_path / "log") == ""
    flower.superlink.kill()
    flower.superlink.wait()
    with pytest.raises(LaunchError, match=r"SuperLink has ended, exit status -9:\nno memory left"):
        flower.wait("1", tmp_path / "log")


def test_a_superlink_that_is_not_there_is_said_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its commands are looked for where this Python has them, and its user, then in PATH."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("pfedgpa_app.engine.flower._scripts", lambda: [str(tmp_path / "none")])
    simulation = Simulation()
    with pytest.raises(LaunchError, match=r"install Flower anew: .*flwr"), simulation:
        pass
    assert not simulation.home.exists()


def test_what_fails_before_the_server_begins_is_told_by_its_first_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own words say that an error was encountered."""
    flower, log = object.__new__(Flower), tmp_path / "log"
    log.write_text("RuntimeError: of a run before, which this one resumes\n")

    def follow(_: str, log: Path) -> subprocess.Popen[bytes]:
        with log.open("a") as out:
            out.write("  raise Exception(\nException: The current node timed out.\n")
            out.write("RuntimeError: An error was encountered. Ending simulation.\n")
        return subprocess.Popen(["true"])

    monkeypatch.setattr(flower, "follow", follow)
    monkeypatch.setattr(flower, "status", lambda _: ("finished:failed", "Simulation failed."))
    said = flower.wait("1", log)
    assert said == "Simulation failed. (Exception: The current node timed out.)"


def started(folder: Path, engine: str, env: dict[str, str]) -> subprocess.Popen[str]:
    """An endless run that has come to its second round."""
    endless = [*PLAINLY, "--engine", engine, "num-server-rounds=100000", "method=fedavg"]
    endless += [f"workers={2 if engine == 'process' else 1}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pfedgpa_app", "run", *endless],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),  # nohup may run the tests
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "round 2/" in line:
            break
    return process


def test_an_interrupted_ray_run_stops_what_it_started(tmp_path: Path) -> None:
    """By its terminal, which is closed."""
    temporary = Path(tempfile.mkdtemp(dir="/tmp"))
    process = started(tmp_path, "ray", {"TMPDIR": str(temporary)})
    (home,) = temporary.glob("pfedgpa-*")
    assert len(processes_of(home)) > 3  # SuperLink, simulation, Ray
    process.send_signal(signal.SIGHUP)
    process.communicate()
    assert process.wait(timeout=600) == 130
    assert processes_of(home) == []
    assert not home.exists()
    temporary.rmdir()


def test_a_guard_ends_what_a_killed_process_has_started(tmp_path: Path) -> None:
    """It is SIGKILL that leaves no time to do so, as where memory is full."""
    home = tmp_path / "home"
    home.mkdir()
    code = f"""if True:
        import subprocess, time
        from pathlib import Path
        from pfedgpa_app.engine import guard
        guard.over(Path({str(home)!r}))
        subprocess.Popen(["sleep", "1000"], start_new_session=True)
        print("started", flush=True)
        time.sleep(1000)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(APP_DIR), HOME: str(home)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"started\n"
    assert len(processes_of(home)) == 3  # the guard, too, which spares itself
    process.kill()
    process.wait()
    until(lambda: not home.exists())
    until(lambda: not processes_of(home))


def test_an_interrupted_process_run_stops_what_it_started(tmp_path: Path) -> None:
    """By a terminal or a kill: on the user's path (test_user_path.py)."""
    process = started(tmp_path, "process", {})
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # the server and two workers, and Python's own for starting them
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.wait(timeout=600) == 130
    deadline = time.monotonic() + 600  # a killed launcher's server notices by itself
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, children))


def check_a_sweep_outlives_a_node(folder: Path, cluster: Cluster) -> None:
    """It has a run on each of two nodes; one leaves, and its run begins anew on the other.

    The user's own code finds its file there, by a relative path.
    """
    digits = load("digits", "")
    np.savez(folder / "mine.npz", x=digits.train_images, y=digits.train_labels)
    (folder / "reading.py").write_text(WAITING)
    command = [*cluster.head, sys.executable, "-m", "pfedgpa_app", "sweep", "--on", "ray"]
    settings = PLAIN | {"num-server-rounds": 2, "method": "fedavg", "dataset": "reading:read"}
    command += ["--over", "seed=0,1", "--out", "sweep"]
    sweep = subprocess.Popen(
        [*command, *(f"{key}={value}" for key, value in settings.items())],
        cwd=folder,
        env=cluster.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def both_wait() -> bool:
        return all(cluster.running(f"run-name=own_seed={seed}") for seed in (0, 1))

    until(lambda: sweep.poll() is not None or both_wait())
    cluster.lose_the_other()
    (folder / "go").touch()
    said, _ = sweep.communicate()
    assert sweep.returncode == 0, said
    assert "lost with its machine; it begins anew" in said, said
    for seed in (0, 1):
        run = folder / "sweep" / f"own_seed={seed}"
        assert {r["round"] for r in records(run)} == {1, 2}


@pytest.mark.xdist_group("cluster")
def test_so_it_does_on_a_ray_cluster_of_two_machines(tmp_path: Path, in_process: Path) -> None:
    with two_machines() as cluster:
        check_the_demo_runs("ray", tmp_path, in_process, cluster.head, **cluster.env)
        # two actors, each taking the whole of a node: the run has no Ray of its own
        logs = [log.read_text() for log in cluster.home.glob("session_2*/logs/worker-*.out")]
        assert sum("ClientAppActor" in log for log in logs) == 2
        check_a_sweep_outlives_a_node(tmp_path, cluster)
