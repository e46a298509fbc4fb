"""End the processes of a home when whoever started them is gone, however it ended.

As a process of its own: ``python -m pfedgpa_app.engine.guard HOME PARENT``. It ends its parent's
home once its parent is gone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

HOME = "FLWR_HOME"  # environment: the home that a process belongs to


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """Find other processes than this one whose environment has the value for the variable."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):  # it has just ended, or is somebody else's
            if process.environ().get(variable) == value and process.pid != os.getpid():
                found.append(process)
    return found


def processes_of(home: Path) -> list[int]:
    """Find the processes whose environment names the home: all that were started, detached too."""
    return [process.pid for process in processes_with(HOME, str(home))]


def end_all(home: Path) -> None:
    """End the processes of the home, and remove it."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        for pid in processes_of(home):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sign)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and processes_of(home):
            time.sleep(0.1)
    shutil.rmtree(home, ignore_errors=True)


def over(home: Path) -> subprocess.Popen[bytes]:
    """Start a guard over the home; it ends with ``kill``."""
    return subprocess.Popen(
        [sys.executable, "-B", "-P", "-m", __name__, str(home), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # signals from a terminal are for who is guarded
    )


if __name__ == "__main__":
    while os.getppid() == int(sys.argv[2]):
        time.sleep(1.0)
    end_all(Path(sys.argv[1]))
