"""Ray: Flower's own simulation, with a SuperLink of the run's own.

Flower's ``flwr run`` exits 0 whatever becomes of the run, and serves it from a lasting
daemon with the first caller's folder and environment. Here each run has a SuperLink of its
own, on a free port, with a home that is deleted with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from flwr.common.config import get_project_config

from pfedgpa_app.config import Config
from pfedgpa_app.engine import LaunchError, gpu_for

CONNECTION = "pfedgpa"


def free_port() -> int:
    """A port on loopback that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _processes_of(home: Path) -> list[int]:
    """Processes whose environment names the run's home: what we started, wherever it detached."""
    mark = f"FLWR_HOME={home}".encode()
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except (OSError, ValueError):
            continue
    return [pid for pid in found if pid != os.getpid()]


class Flower:
    """A SuperLink in simulation mode that lives as long as the ``with`` block.

    It takes a second to come up; ``wait_until_ready`` before it is used.
    """

    def __init__(self) -> None:
        # Ray makes sockets below its folder, whose whole paths may have 107 characters
        where = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 20 else "/tmp"
        self.home = Path(tempfile.mkdtemp(prefix="pfedgpa-", dir=where))
        self.port, self.log = free_port(), self.home / "superlink.log"
        bin_dir = Path(sys.executable).parent
        self.env = os.environ | {
            "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # two Python processes at once that no client could use: ours have an environment
            "RAY_prestart_worker_first_driver": "0",
            "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
            "RAY_TMPDIR": str(self.home / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }
        if "RAY_ADDRESS" not in self.env:
            # Ray listens on every interface: it shall obey only who knows this run's token
            self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def __enter__(self) -> Flower:
        (self.home / "ray").mkdir()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        # its folder is its own: Ray workers import from there first, and must find nothing
        with self.log.open("ab") as log:
            self.superlink = subprocess.Popen(
                command,
                cwd=self.home,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def wait_until_ready(self) -> None:
        """Return when it listens.

        Raises:
            LaunchError: it ended, or took a minute.
        """
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.superlink.poll() is not None:
                break
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        said = self.log.read_text(errors="replace")[-2000:]
        raise LaunchError(f"Flower's SuperLink did not start:\n{said}")

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command that answers in JSON."""
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            cwd=self.home,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        start = done.stdout.find("{")
        if done.returncode or start < 0:
            raise LaunchError(f"flwr {arguments[0]} failed:\n{done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[start:])[0]
        if answer.get("success") is False:
            raise LaunchError(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def follow(self, run_id: str, log: Path) -> subprocess.Popen[bytes]:
        """Append the run's log to ``log``; the process ends when the run does."""
        with log.open("ab") as out:
            return subprocess.Popen(
                ["flwr", "log", run_id, CONNECTION, "--stream"],
                cwd=self.home,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __exit__(self, *_: object) -> None:
        for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.superlink.pid, sign)
            for pid in _processes_of(self.home):  # Ray's have left the group
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, sign)
            deadline = time.monotonic() + patience
            while time.monotonic() < deadline and _processes_of(self.home):
                self.superlink.poll()  # a zombie of ours has no environment left
                time.sleep(0.1)
        self.superlink.wait()
        shutil.rmtree(self.home, ignore_errors=True)


def stage(app: Path, folder: Path) -> Path:
    """A copy of the app's files in ``folder``: Flower looks at every file below an app's folder,
    and data sets that lie there, too, can be a hundred thousand."""
    config = get_project_config(app)
    doors = config["tool"]["flwr"]["app"]["components"].values()
    parts = {door.partition(":")[0].partition(".")[0] for door in doors}
    parts |= {Path(__file__).parents[1].name, "conf"}
    folder.mkdir()
    for entry in app.iterdir():
        if entry.is_file():
            shutil.copy(entry, folder)
        elif entry.name in parts:
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(entry, folder / entry.name, ignore=ignored)
    return folder


def run(
    app: Path,
    settings: Mapping[str, Any],
    config: Config,
    log: Path,
    look: Callable[[], None],
    flower: Flower | None = None,
) -> str:
    """Run the app in ``app`` with ``settings``; ``look`` is called while it runs.

    Args:
        flower: one that has been started already; it stays the caller's.

    Returns:
        why the run did not complete, or "".
    """
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
    # one CPU a client keeps torch to one thread each
    federation = f"num-supernodes={config.num_clients} client-resources-num-cpus=1"
    if config.workers and "RAY_ADDRESS" not in os.environ:  # a running cluster has its own size
        federation += f" init-args-num-cpus={config.workers}"
    if gpu_for(config.device):
        federation += " client-resources-num-gpus=0.1"
    with contextlib.nullcontext(flower) if flower else Flower() as flower:
        staged = stage(app, flower.home / "app")
        flower.wait_until_ready()
        answer = flower.flwr(
            "run", str(staged), CONNECTION, "--federation-config", federation, "-c", overrides
        )
        run_id = str(answer["run-id"])
        status: dict[str, Any] = {"status": ""}
        while not str(status["status"]).startswith("finished"):
            follower = flower.follow(run_id, log)  # a log stream may break off before the run ends
            while follower.poll() is None:
                look()
                time.sleep(0.2)
            status = flower.flwr("ls", CONNECTION, "--run-id", run_id)["runs"][0]
    if str(status["status"]).startswith("finished:completed"):
        return ""
    return str(status.get("status-details") or status["status"])


def _toml(value: Any) -> str:
    """As TOML; JSON's text, numbers and booleans are TOML's."""
    if isinstance(value, (list, tuple)):
        return json.dumps(",".join(map(str, value)))
    return json.dumps(value, ensure_ascii=False)
