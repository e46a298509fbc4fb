"""What users run: real data, default settings, as many threads as the machine has.

Each is a process of its own that is started by the command as it is installed; what is small
here are the federations. All of it stood still for ever where a process was forked from one in
which torch had computed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.engine.flower import free_port
from pfedgpa_app.engine.guard import processes_of
from pfedgpa_app.runs import experiment
from tests.support.federations import records, summary
from tests.support.local_grid import InProcessGrid
from tests.support.processes import alive

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("user")]
LIMIT = 240  # seconds; each takes some ten
BIN = Path(sys.executable).parent
FEW = {"num-clients": 4, "train-per-client": 60, "test-per-client": 20, "fine-tune-epochs": 0}
SHORT = {"num-server-rounds": 3, "pfedgpa.fit-steps": 20}


def environment(data: Path, **more: str) -> dict[str, str]:
    """A user's: nothing says how many threads torch may have, or where the checkout is."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    ours.pop("PYTHONPATH", None)
    path = f"{BIN}{os.pathsep}{ours['PATH']}"
    return ours | {"PFEDGPA_DATA": str(data), "PATH": path} | more


def words(*settings: dict[str, Any]) -> list[str]:
    return [f"{key}={value}" for each in settings for key, value in each.items()]


def pfedgpa(folder: Path, data: Path, *arguments: str) -> str:
    """Run the command in ``folder``; what it said. It comes to its end in time."""
    done = subprocess.run(
        ["pfedgpa", *arguments],
        cwd=folder,
        env=environment(data),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def begun(
    folder: Path, data: Path, settings: dict[str, Any]
) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
    """A run on Fashion-MNIST that has come to its third round, and what it has started."""
    run = subprocess.Popen(
        ["pfedgpa", "run", "--conf", "fashion-mnist-20", *words(settings)],
        cwd=folder,
        env=environment(data),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    for line in run.stdout:
        if "round 3/" in line:
            break
    return run, psutil.Process(run.pid).children(recursive=True)


@pytest.fixture
def fashion(fashion_mnist: Path, tmp_path: Path) -> Path:
    """The data folder; the current folder holds what must not be imported from there."""
    for name in ("torch", "flwr", "pfedgpa_app", "server_app"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('a foreign module')")
    return fashion_mnist


@pytest.fixture(scope="module")
def few_of_cifar10(cifar10_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with as many of CIFAR-10's images as four clients hold."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 100), ("test", 50)):
        for label in (cifar10_folder / "cifar10" / split).iterdir():
            place = folder / "cifar10" / split / label.name
            place.mkdir(parents=True)
            for image in sorted(label.iterdir())[:count]:
                (place / image.name).symlink_to(image.resolve())
    return folder


CIFAR10 = {"dataset": "imagefolder:cifar10", "num-server-rounds": 2}


class TestRun:
    def test_fashion_mnist(self, tmp_path: Path, fashion: Path) -> None:
        more = FEW | SHORT | {"num-clients": 5, "run-name": "run"}
        said = pfedgpa(tmp_path, fashion, "run", "--conf", "fashion-mnist-20", *words(more))
        assert "| pFedGPA" in said
        rows = summary(tmp_path / "results" / "run")
        assert list(rows) == ["local", "fedavg", "fedavg-ft", "client-mean", "pfedgpa"]
        assert all(row["dataset"] == "fashion-mnist" for row in rows.values())

    @pytest.mark.parametrize("engine", ["process", "ray", "batched"])
    def test_cifar10_as_images(self, engine: str, tmp_path: Path, few_of_cifar10: Path) -> None:
        more = FEW | CIFAR10 | {"method": "fedavg", "run-name": "run", "device": "cpu"}
        arguments = ["run", "--conf", "cifar10-20", "--engine", engine, *words(more)]
        pfedgpa(tmp_path, few_of_cifar10, *arguments)
        trained = [r for r in records(tmp_path / "results" / "run") if r["participated"]]
        assert len(trained) == 2 * 4

    def test_a_worker_that_is_killed_is_replaced(self, tmp_path: Path, fashion: Path) -> None:
        """Its server has long computed with threads."""
        more = FEW | {"num-server-rounds": 12, "method": "fedavg", "evaluate-every": 1}
        more |= {"run-name": "run", "workers": 2}
        run, started = begun(tmp_path, fashion, more)
        newest = max((p for p in started if alive(p)), key=psutil.Process.create_time)
        newest.kill()  # the server is older than its workers
        said, _ = run.communicate(timeout=LIMIT)
        assert run.returncode == 0, said
        [lost] = [line for line in said.splitlines() if "lost its process" in line]
        assert "exit status -9" in lost
        told = records(tmp_path / "results" / "run")
        trained = [r for r in told if r["participated"]]
        evaluated = [r for r in told if r["accuracy"] is not None]
        assert len(trained) + len(evaluated) == 2 * 12 * 4 - 1  # it was busy with either

    @pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
    def test_one_that_is_stopped_leaves_nothing_running(
        self, sign: signal.Signals, tmp_path: Path, fashion: Path
    ) -> None:
        more = FEW | {"num-server-rounds": 100_000, "method": "fedavg", "run-name": "run"}
        run, started = begun(tmp_path, fashion, more)
        if sign == signal.SIGINT:
            os.killpg(run.pid, sign)  # as a terminal does
        else:
            run.kill()
        said, _ = run.communicate(timeout=60)
        assert run.returncode == (130 if sign == signal.SIGINT else -9)
        if sign == signal.SIGINT:
            assert "resume=true" in said
            assert "Traceback" not in said
        _, left = psutil.wait_procs([p for p in started if alive(p)], timeout=60)
        assert not [process for process in left if alive(process)]


class TestManyRuns:
    """One job, two workers: the settings in which each of them stood still."""

    JOBS = ("--jobs", "1", "--out", "out")

    def test_sweep(self, tmp_path: Path, fashion: Path) -> None:
        more = FEW | {"num-server-rounds": 2, "method": "fedavg", "workers": 2}
        arguments = ["--conf", "fashion-mnist-20", "--over", "seed=0", *words(more)]
        said = pfedgpa(tmp_path, fashion, "sweep", *arguments, *self.JOBS)
        assert "1/1 done" in said

    def test_compare(self, tmp_path: Path, fashion: Path) -> None:
        more = FEW | {"num-server-rounds": 2, "workers": 2, "fine-tune-grid-epochs": 1}
        arguments = ["--conf", "compare-fashion-mnist", "--methods", "fedbabu"]
        said = pfedgpa(
            tmp_path, fashion, "compare", *arguments, "--seeds", "0", *words(more), *self.JOBS
        )
        assert "| FedBABU |" in said

    def test_tune(self, tmp_path: Path, fashion: Path) -> None:
        mine = tmp_path / "mine.yaml"
        mine.write_text("conf: fashion-mnist-20\nmethod: [fedala]\n")
        more = FEW | {"num-server-rounds": 1, "workers": 2}
        arguments = ["--conf", str(mine), "--methods", "fedala", *words(more)]
        pfedgpa(tmp_path, fashion, "tune", *arguments, *self.JOBS)
        assert yaml.safe_load(mine.read_text())["fedala.layers"] in (1, 2)


def test_plain_flwr_run(tmp_path: Path, fashion_mnist: Path) -> None:
    """On Flower's two default nodes, to the same numbers as in this process."""
    settings = FEW | {"num-server-rounds": 1, "method": "fedavg", "conf": "fashion-mnist-20"}
    settings |= {"run-name": "run"}
    here = settings | {"data-dir": str(fashion_mnist), "out-dir": str(tmp_path / "reference")}
    reference = experiment.run(InProcessGrid(here, 4), resolve(here))
    home = tmp_path / "home"
    ports = {
        f"FLWR_LOCAL_{name}_PORT": str(free_port())
        for name in ("SUPERLINK_HTTP_API", "CONTROL_API")
    }
    env = environment(
        fashion_mnist,
        FLWR_HOME=str(home),
        FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION="1",
        FLWR_DISABLE_UPDATE_CHECK="1",
        **ports,
    )
    quoted = {k: f'"{v}"' if isinstance(v, str) else v for k, v in settings.items()}
    try:
        done = subprocess.run(
            ["flwr", "run", str(APP_DIR), "--stream", "-c", " ".join(words(quoted))],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
        folder = tmp_path / "results" / "run"  # in the user's folder, not in a copy of the app
        assert f"results are in {folder}" in done.stdout + done.stderr
        assert records(folder) == records(reference)
    finally:
        for pid in processes_of(home):
            os.kill(pid, signal.SIGTERM)
