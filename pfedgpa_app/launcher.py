"""Run the app on a Flower simulation of its own, and tell the truth about how it ended.

Flower's ``flwr run`` exits 0 whatever becomes of the run, and serves it from a lasting
daemon with the first caller's folder and environment. Here each run has a SuperLink of its
own, on a free port, with a home that is deleted with it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from rich.console import Console

from pfedgpa_app.config import APP_DIR, Config, ConfigError, resolve
from pfedgpa_app.data.client import load_dataset, load_partition
from pfedgpa_app.data.datasets import resolve_data_dir
from pfedgpa_app.experiment import run_folder
from pfedgpa_app.models import network_name
from pfedgpa_app.results.log import EVENTS

CONNECTION = "pfedgpa"


class LaunchError(RuntimeError):
    """Flower could not be started, or the run failed; the text is for the user."""


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
    """A SuperLink in simulation mode that lives as long as the ``with`` block."""

    def __init__(self, log: Path) -> None:
        # Ray makes sockets below its folder, whose whole paths may have 107 characters
        where = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 20 else "/tmp"
        self.home = Path(tempfile.mkdtemp(prefix="pfedgpa-", dir=where))
        self.port, self.log = free_port(), log
        bin_dir = Path(sys.executable).parent
        self.env = os.environ | {
            "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
            "FLWR_HOME": str(self.home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "RAY_TMPDIR": str(self.home / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
            "PYTHONUNBUFFERED": "1",
        }

    def __enter__(self) -> Flower:
        (self.home / "ray").mkdir()
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        command = ["flower-superlink", "--insecure", "--simulation", "--host", "127.0.0.1"]
        command += ["--port", str(self.port), "--disable-runtime-dependency-installation"]
        self._log = self.log.open("ab")
        # its folder is its own: Ray workers import from there first, and must find nothing
        self.superlink = subprocess.Popen(
            command,
            cwd=self.home,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.superlink.poll() is not None:
                break
            try:
                with urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        raise LaunchError(f"Flower's SuperLink did not start; its log: {self.log}")

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

    def follow(self, run_id: str) -> subprocess.Popen[bytes]:
        """Copy the run's log to ``log``; the process ends when the run does."""
        return subprocess.Popen(
            ["flwr", "log", run_id, CONNECTION, "--stream"],
            cwd=self.home,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
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
        self._log.close()
        shutil.rmtree(self.home, ignore_errors=True)


class Watcher:
    """Shows a run's events: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, events: Path, console: Console) -> None:
        self.events, self.console = events, console
        self.place, self.last = 0, ""
        self.status = console.status("starting Flower") if console.is_terminal else None
        if self.status:
            self.status.start()

    def look(self) -> None:
        """Show what is new."""
        if not self.events.exists():
            return
        with self.events.open() as file:
            file.seek(self.place)
            while (line := file.readline()).endswith("\n"):
                self.place = file.tell()
                self.show(json.loads(line))

    def show(self, event: dict[str, Any]) -> None:
        """One event."""
        self.last = event["kind"]
        if self.last == "failed":
            return  # said at the end, once
        if self.last in ("round", "status") and self.status:
            self.status.update(event["text"], spinner="dots")
        else:
            self.console.print(event["text"], markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self.look()
        if self.status:
            self.status.stop()


def preflight(config: Config) -> None:
    """Everything that can be refused before Flower is started.

    Raises:
        ConfigError, DataError, FileExistsError: what is wrong and what to do.
    """
    try:
        data = load_dataset(config)
        network_name(config.model, data.shape)
        load_partition(config)
        if config.uploads and not Path(config.uploads).expanduser().is_file():
            raise ConfigError(f"uploads = {config.uploads!r}: no such file")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def launch(
    run_config: Mapping[str, Any], app: Path = APP_DIR, console: Console | None = None
) -> Path:
    """Run the app in ``app`` and return the folder of its results, once it has succeeded.

    Raises:
        ConfigError, DataError, FileExistsError: refused before anything started.
        LaunchError: the run failed.
    """
    console = console or Console()
    config = resolve(run_config).config
    preflight(config)
    folder = run_folder(config)
    if not (app / "pyproject.toml").is_file():
        raise LaunchError(f"{app} is not the app's folder: it has no pyproject.toml")
    folder.mkdir(parents=True, exist_ok=True)
    # the run works elsewhere: every path it gets is absolute
    settings = dict(run_config) | {
        "out-dir": str(folder.parent),
        "run-name": folder.name,
        "data-dir": str(resolve_data_dir(config.data_dir)),
    }
    if (conf := Path(str(settings.get("conf", "demo"))).expanduser()).is_file():
        settings["conf"] = str(conf.absolute())
    if config.uploads:
        settings["uploads"] = str(Path(config.uploads).expanduser().absolute())
    overrides = " ".join(f"{key}={_toml(value)}" for key, value in settings.items())
    # max-num-cpus of Ray is the machine's; one CPU a client keeps torch to one thread each
    federation = f"num-supernodes={config.num_clients} client-resources-num-cpus=1"
    if config.device != "cpu":
        federation += _gpu_share(config.device)
    watcher = Watcher(folder / EVENTS, console)
    try:
        with Flower(folder / "flower.log") as flower:
            answer = flower.flwr(
                "run", str(app), CONNECTION, "--federation-config", federation, "-c", overrides
            )
            run_id = str(answer["run-id"])
            status: dict[str, Any] = {"status": ""}
            while not str(status["status"]).startswith("finished"):
                follower = flower.follow(run_id)  # a log stream may break off before the run ends
                while follower.poll() is None:
                    watcher.look()
                    time.sleep(0.2)
                status = flower.flwr("ls", CONNECTION, "--run-id", run_id)["runs"][0]
    finally:
        watcher.close()
    if not str(status["status"]).startswith("finished:completed") or watcher.last != "done":
        reason = _failure(folder) or status.get("status-details") or status["status"]
        raise LaunchError(f"{reason}\nResults so far and Flower's log are in {folder}")
    return folder


def _gpu_share(device: str) -> str:
    import torch

    if not torch.cuda.is_available():
        if device == "cuda":
            raise ConfigError("device = 'cuda': torch sees no GPU on this machine")
        return ""
    return " client-resources-num-gpus=0.1"


def _failure(folder: Path) -> str:
    """Why the run says that it failed."""
    events = folder / EVENTS
    lines = events.read_text().splitlines() if events.exists() else []
    reasons = [e["text"] for e in map(json.loads, lines) if e["kind"] == "failed"]
    return f"the run failed: {reasons[-1]}" if reasons else ""


def _toml(value: Any) -> str:
    """As TOML; JSON's text, numbers and booleans are TOML's."""
    if isinstance(value, (list, tuple)):
        return json.dumps(",".join(map(str, value)))
    return json.dumps(value, ensure_ascii=False)
