"""Start Flower's own processes, with a home folder that is theirs alone and ends with them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self
from urllib.error import URLError
from urllib.request import urlopen

from flwr.common.config import get_project_config

from pfedgpa_app.config.parse import in_toml
from pfedgpa_app.core.own_code import FOLDER
from pfedgpa_app.core.paths import INSTALLED, package_of
from pfedgpa_app.engine import LaunchError, guard

CONNECTION = "pfedgpa"
POLL_INTERVAL = "FLWR_SUPEREXEC_TASK_POLL_INTERVAL"  # environment: Flower's, in seconds
PATIENCE = 300.0  # seconds for which a running SuperLink may not answer
_LIST = "[tool.flwr.app.config]\n"


def free_port() -> int:
    """Return a port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Flower:
    """A SuperLink on loopback, and what else is started, while the ``with`` block lasts.

    It takes a second to come up: call ``wait_until_ready`` before using it.
    """

    ca: Path | None = None  # the certificate authority, where the link is encrypted
    host = "127.0.0.1"  # where the SuperLink listens

    def __init__(self) -> None:
        # Ray makes sockets below its folder, whose whole paths may have at most 107 characters
        where = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 20 else "/tmp"
        self.home = Path(tempfile.mkdtemp(prefix="pfedgpa-", dir=where))
        self.port, self.log = free_port(), self.home / "superlink.log"
        self.env = os.environ | {
            "PATH": os.pathsep.join([*_scripts(), os.environ.get("PATH", "")]),
            guard.HOME: str(self.home),  # marks the processes
            FOLDER: os.getcwd(),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            POLL_INTERVAL: os.environ.get(POLL_INTERVAL, "0.25"),  # a look costs two processes 5 ms
            "PYTHONUNBUFFERED": "1",
        }

    def superlink_options(self) -> list[str]:
        """Return the options that the SuperLink is started with."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        trust = f'root-certificates = "{self.ca}"' if self.ca else "insecure = true"
        (self.home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self.port}"\n{trust}\n',
            encoding="utf-8",
        )
        self._guard = guard.over(self.home)
        try:
            self.start_superlink()
        except OSError as error:
            self._guard.kill()
            self._guard.wait()
            shutil.rmtree(self.home, ignore_errors=True)
            raise LaunchError(
                f"Flower's SuperLink cannot be started: {error}; install Flower anew: "
                f"{sys.executable} -m pip install --force-reinstall flwr"
            ) from error
        return self

    def start_superlink(self) -> None:
        """Start the SuperLink, for the first time or again."""
        command = ["flower-superlink", "--host", self.host, "--port", str(self.port)]
        command += ["--disable-runtime-dependency-installation", *self.superlink_options()]
        self.superlink = self.spawn(command, self.log)

    def spawn(self, command: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
        """Start a process in the home, in a session of its own, which writes to ``log``."""
        # apps import from the current folder first: in the home they find nothing of the user's
        with log.open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=self.home,
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Return when the SuperLink listens.

        Raises:
            LaunchError: it has ended, or does not listen within a minute.
        """
        trust = ssl.create_default_context(cafile=self.ca) if self.ca else None
        scheme = "https" if self.ca else "http"
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self.superlink.poll() is not None:
                break
            try:
                with urlopen(f"{scheme}://127.0.0.1:{self.port}/health", timeout=1, context=trust):
                    return
            except (URLError, OSError):
                time.sleep(0.1)
        raise LaunchError(f"Flower's SuperLink did not start:\n{self._last_words()}")

    def _last_words(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-2000:]

    def flwr(self, *arguments: str) -> dict[str, Any]:
        """Run a ``flwr`` command that answers in JSON, and return the answer.

        Raises:
            LaunchError: the command fails.
        """
        done = subprocess.run(
            ["flwr", *arguments, "--format", "json"],
            cwd=self.home,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        start = done.stdout.find("{")
        if done.returncode or start < 0:
            raise LaunchError(f"flwr {arguments[0]} failed:\n{done.stdout}{done.stderr}")
        answer: dict[str, Any] = json.JSONDecoder().raw_decode(done.stdout[start:])[0]
        if answer.get("success") is False:
            raise LaunchError(f"flwr {arguments[0]} failed: {answer.get('error-message', answer)}")
        return answer

    def run(self, app: Path, settings: dict[str, Any], *options: str) -> str:
        """Start the app in ``app``; return the run's id."""
        answer = self.flwr("run", str(app), CONNECTION, *options, "-c", in_toml(settings))
        return str(answer["run-id"])

    def status(self, run_id: str) -> tuple[str, str]:
        """Return the run's status, ``finished:completed`` if all is well, and its details."""
        [run] = self.flwr("ls", CONNECTION, "--run-id", run_id)["runs"]
        return str(run["status"]), str(run.get("status-details") or "")

    def follow(self, run_id: str, log: Path) -> subprocess.Popen[bytes]:
        """Append the run's log to ``log``; the process ends when the run does."""
        return self.spawn(["flwr", "log", run_id, CONNECTION, "--stream"], log)

    def wait(self, run_id: str, log: Path, poll: Callable[[], None] = lambda: None) -> str:
        """Wait until the run has ended, and return why it did not complete, or "".

        Args:
            log: where the run's log goes.
            poll: called while the run goes on.
        """
        status, details = "", ""
        written = log.stat().st_size if log.exists() else 0  # by a run that this one resumes
        while not status.startswith("finished"):
            follower = self.follow(run_id, log)  # a log stream may break off before the run ends
            while follower.poll() is None:
                poll()
                time.sleep(0.2)
            status, details = self._status_once_it_answers(run_id)
        if status.startswith("finished:completed"):
            return ""
        said = log.read_bytes()[written:].decode(errors="replace") if log.exists() else ""
        return f"{details or status}{first_error(said)}"

    def _status_once_it_answers(self, run_id: str) -> tuple[str, str]:
        """Return the run's status; on a busy machine a SuperLink may not answer for a while.

        Raises:
            LaunchError: it has ended, or never answers.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return self.status(run_id)
            except LaunchError as error:
                if (ended := self.superlink.poll()) is not None:
                    said = f"exit status {ended}:\n{self._last_words()}"
                    raise LaunchError(f"Flower's SuperLink has ended, {said}") from error
                if time.monotonic() > deadline:
                    raise
                time.sleep(1.0)

    def __exit__(self, *_: object) -> None:
        guard.end_all(self.home)
        with contextlib.suppress(ProcessLookupError):  # should its environment be unreadable
            os.killpg(self.superlink.pid, signal.SIGKILL)
        self.superlink.wait()
        self._guard.kill()
        self._guard.wait()


def _scripts() -> list[str]:
    """Return the folders in which this Python's packages put their commands."""
    folders = [str(Path(sys.executable).parent), sysconfig.get_path("scripts")]
    if sys.prefix == sys.base_prefix:  # no virtual environment: also those of pip install --user
        folders.append(sysconfig.get_path("scripts", sysconfig.get_preferred_scheme("user")))
    return folders


def first_error(log: str) -> str:
    """Return the first error in Flower's log, which caused the others, as ``" (…)"``; else ""."""
    found = re.search(r"^(?:\w+\.)*(\w*(?:Error|Exception): .+)$", log, re.MULTILINE)
    return f" ({found[1][:300]})" if found else ""


def _unstaged(folder: str, names: list[str]) -> list[str]:
    """Return what a copy leaves out: bytecode, and the app's folder inside an installed package.

    In the copy, the app's folder is around the package.
    """
    return [n for n in names if n == "__pycache__" or Path(folder, n) == INSTALLED]


def stage(app: Path, folder: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """Copy the app's files to ``folder``, with ``settings`` as its defaults, and return the copy.

    Flower looks at every file below an app's folder, and data sets that lie there, too, may have a
    hundred thousand.

    Args:
        settings: Flower takes settings of a user's own method from the app's list only.
    """
    config = get_project_config(app)
    doors = config["tool"]["flwr"]["app"]["components"].values()
    parts = {app / door.partition(":")[0].partition(".")[0] for door in doors}
    parts |= {app / "conf", package_of(app)}
    folder.mkdir()
    for entry in app.iterdir():
        if entry.is_file():
            shutil.copy(entry, folder)
    for part in parts:
        if part.is_dir():
            shutil.copytree(part, folder / part.name, ignore=_unstaged)
    if settings:
        file = folder / "pyproject.toml"
        file.write_text(_listing(file.read_text(encoding="utf-8"), settings), encoding="utf-8")
    return folder


def _listing(text: str, settings: Mapping[str, Any]) -> str:
    """Return a pyproject.toml in whose list the ``settings`` have these values."""
    before, head, after = text.partition(_LIST)
    listed, end, others = after.partition("\n[")
    names = tuple(f"{name} =" for name in settings)
    kept = [line for line in listed.splitlines() if not line.startswith(names)]
    given = [in_toml({name: value}) for name, value in settings.items()]
    return before + (head or _LIST) + "\n".join([*given, *kept]) + end + others
