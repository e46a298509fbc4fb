"""Start processes, and wait for them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from pfedgpa_app import cli
from pfedgpa_app.engine import spawning


def in_a_new_process(words: list[str], folder: Path) -> tuple[int | None, str]:
    """Run ``pfedgpa WORDS`` in ``folder``; return its exit status and what it printed.

    The process has imported torch already, so that many commands take less time.
    """
    log = folder / "said.log"
    log.unlink(missing_ok=True)
    given = words, folder, log, dict(os.environ), spawning._key()
    process = spawning.starter().Process(target=_command, args=given)
    process.start()
    process.join()
    return process.exitcode, log.read_text() if log.exists() else ""


def _command(words: list[str], folder: Path, log: Path, *launcher: Any) -> None:
    spawning._as_the_launcher(*launcher)
    os.chdir(folder)
    spawning.write_to(log)
    sys.exit(cli.main(words))


def until(condition: Callable[[], Any], seconds: float = 600) -> None:
    """Wait until ``condition`` holds.

    Raises:
        TimeoutError: it does not hold within ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
