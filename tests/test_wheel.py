"""The wheel, as `pip install` makes it, in an environment and a folder that hold nothing else.

The environment sees the packages that the tests have, but not the checkout.
"""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import flatten_dict

from pfedgpa_app import cli
from pfedgpa_app.config.names import keys
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from tests.support.federations import SMALL, federate, records, summary

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # installed once
_SCRIPT = "#!{python}\nimport sys\nfrom {module} import {main}\nsys.exit({main}())\n"
SETTINGS = [f"{key}={value}" for key, value in SMALL.items()]


def build(source: Path, folder: Path) -> Path:
    """The wheel of what is in ``source``."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


@dataclass(frozen=True)
class Environment:
    """A virtual environment that holds the wheel."""

    bin: Path
    packages: Path

    def run(self, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        """Run one of the environment's commands in ``folder``."""
        inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        return subprocess.run(
            [self.bin / command[0], *command[1:]],
            cwd=folder,
            env=inherited,
            capture_output=True,
            text=True,
            timeout=1200,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(APP_DIR, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", root], check=True)
    python = root / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True)
    (packages,) = root.glob("lib/*/site-packages")
    ours = [path for path in sys.path if Path(path).name == "site-packages"]
    (packages / "ours.pth").write_text("\n".join(ours))  # whose own .pth files are not followed
    for script in distribution("flwr").entry_points.select(group="console_scripts"):
        file = root / "bin" / script.name
        file.write_text(_SCRIPT.format(python=python, module=script.module, main=script.attr))
        file.chmod(0o755)
    return Environment(root / "bin", packages)


def test_the_checkout_is_out_of_sight(installed: Environment, tmp_path: Path) -> None:
    code = """if True:
        import sys, pfedgpa_app
        from pfedgpa_app.engine.local import APP_DIR, load_door
        load_door(APP_DIR, "serverapp"), load_door(APP_DIR, "clientapp")
        names = ("pfedgpa_app", "server_app", "client_app")
        print(*sys.path, *(sys.modules[name].__file__ for name in names), sep="\\n")
    """
    seen = installed.run(tmp_path, "python", "-c", code).stdout.splitlines()
    assert str(APP_DIR) not in seen
    assert all(path.startswith(str(installed.packages)) for path in seen[-3:])


def test_commands_that_start_nothing(installed: Environment, tmp_path: Path) -> None:
    tune = ["tune", "--conf", "demo", "--methods", "fedprox"]
    commands = [["settings"], ["doctor", "--dataset", "digits"], tune]
    code = f"from pfedgpa_app import cli; print([cli.main(words) for words in {commands}])"
    done = installed.run(tmp_path, "python", "-c", code)
    assert done.stdout.endswith("[0, 0, 2]\n"), done.stdout + done.stderr
    assert all(f"{name} = " in done.stdout for name in keys())
    assert "ok    packages" in done.stdout
    # an experiment of the package is not written into
    assert f"copy {installed.packages / 'pfedgpa_app/app/conf/demo.yaml'}" in done.stderr
    assert not list(tmp_path.iterdir())


def test_it_writes_an_app_that_flower_takes(installed: Environment, tmp_path: Path) -> None:
    words = ["app", "first", "dataset=nodes", "num-clients=2", "method=fedper"]
    done = installed.run(tmp_path, "pfedgpa", *words)
    assert done.returncode == 0, done.stderr
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(tmp_path / "first")))
    assert {"server_app.py", "client_app.py", "conf/demo.yaml"} <= set(bundle.namelist())
    app = tomllib.loads(bundle.read("pyproject.toml").decode())
    config = resolve(flatten_dict(app["tool"]["flwr"]["app"]["config"])).config
    assert (config.dataset, config.num_clients, config.method) == ("nodes", 2, ("fedper",))
    done = installed.run(tmp_path, "pfedgpa", *words)
    assert (done.returncode, "already exists" in done.stderr) == (2, True)


def test_a_run_comes_to_the_checkouts_numbers(installed: Environment, tmp_path: Path) -> None:
    reference, _ = federate(tmp_path / "checkout", num_server_rounds=2)
    words = [*SETTINGS, "num-server-rounds=2", "engine=process", "run-name=run"]
    done = installed.run(tmp_path, "pfedgpa", "run", *words)
    assert done.returncode == 0, done.stderr
    for file in ("metrics.jsonl", "clients.jsonl"):
        assert records(tmp_path / "results" / "run", file) == records(reference, file)


def test_a_run_on_fashion_mnist(
    installed: Environment, tmp_path: Path, fashion_mnist: Path
) -> None:
    words = ["--conf", "fashion-mnist-10", f"data-dir={fashion_mnist}", "method=fedavg"]
    words += ["num-server-rounds=1", "train-per-client=60", "test-per-client=40", "run-name=run"]
    done = installed.run(tmp_path, "pfedgpa", "run", *words, "engine=process")
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "results" / "run")["fedavg"]["dataset"] == "fashion-mnist"


def test_rehearsal(installed: Environment, tmp_path: Path) -> None:
    """TLS, authenticated nodes, data of their own."""
    words = ["rehearse", "--nodes", "2", f"out-dir={tmp_path}", "run-name=run"]
    words += ["num-server-rounds=1", "method=pfedgpa", "pfedgpa.fit-steps=20", "evaluate-every=0"]
    done = installed.run(tmp_path, "pfedgpa", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 SuperNodes, each with its own images" in done.stdout
    assert "only the results are left" in done.stdout
    rows = summary(tmp_path / "run")
    assert set(rows) == {"pfedgpa"}
    assert rows["pfedgpa"]["num_clients"] == 2
    assert rows["pfedgpa"]["dataset"] == "nodes"
    trained = [r for r in records(tmp_path / "run") if r["participated"]]
    assert len(trained) == 2
    assert cli.main(words) == 2  # the folder holds the results of another


def test_the_container_has_all_that_the_wheel_is_made_of(wheel: Path, tmp_path: Path) -> None:
    for line in (APP_DIR / "deploy" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY"):
            *sources, target = line.split()[2:]
            place = tmp_path / Path(target).relative_to("/tmp")
            place.parent.mkdir(exist_ok=True)
            for source in map(APP_DIR.joinpath, sources):
                if source.is_dir():
                    shutil.copytree(source, place)
                else:
                    place.mkdir(exist_ok=True)
                    shutil.copy(source, place)
    (folder,) = tmp_path.iterdir()
    made = build(folder, tmp_path)
    with zipfile.ZipFile(made) as one, zipfile.ZipFile(wheel) as other:
        assert [n for n in one.namelist() if "__pycache__" not in n] == other.namelist()
