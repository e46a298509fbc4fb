"""Run an experiment on an engine, show its progress, and tell the truth about how it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pfedgpa_app.config import APP_DIR, Config, resolve
from pfedgpa_app.data.client import load_partition, load_schema
from pfedgpa_app.data.datasets import resolve_data_dir
from pfedgpa_app.engine import LaunchError, Look, engine_for, gpu_for, local, ray
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.engine.spawning import Server
from pfedgpa_app.experiment import initial_weights, run_folder
from pfedgpa_app.results.log import EVENTS, clock, say
from pfedgpa_app.settings import ConfigError

LOG = "flower.log"


class Patience:
    """How long a run may say nothing before its user is told.

    A multiple of its longest silence so far, a round's as a rule; before the first round
    ``timeout`` seconds, in which a client must answer, but no more than two minutes.
    """

    LEAST, MOST_AT_FIRST, TIMES = 60.0, 120.0, 5

    def __init__(self, timeout: float, now: float) -> None:
        self.first, self.heard, self.longest = min(timeout, self.MOST_AT_FIRST), now, 0.0
        self.said = 0.0  # the silence that was told of last

    def hear(self, kind: str, now: float) -> None:
        """There was an event."""
        if self.longest or kind == "round":
            self.longest = max(self.longest, now - self.heard)
        self.heard, self.said = now, 0.0

    def is_over(self, now: float) -> bool:
        """Whether to tell of a silence, for the first time or since it was half as long."""
        limit = max(self.LEAST, self.TIMES * self.longest) if self.longest else self.first
        silence = now - self.heard
        if silence <= max(limit, 2 * self.said):
            return False
        self.said = silence
        return True

    def text(self, why: str, advice: str) -> str:
        """What to tell."""
        usual = f" (a round took {clock(self.longest)} at most)" if self.longest else ""
        parts = [f"nothing has happened for {clock(self.said)}{usual}", why, advice]
        return "; ".join(part for part in parts if part)


class Watcher:
    """Shows a run's events: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, events: Path, console: Console, patience: Patience, advice: str) -> None:
        """``advice``: how to go on with a run that stands still."""
        self.events, self.console = events, console
        self.patience, self.advice = patience, advice
        self.place, self.last, self.progress = 0, "", 0.0
        self.status = console.status("starting") if console.is_terminal else None

    def look(self, explain: Callable[[], str] = lambda: "") -> None:
        """Show what is new, or that for too long nothing is.

        Args:
            explain: tells which process waits for what.
        """
        if self.status:
            self.status.start()
        self._read()
        if self.patience.is_over(time.monotonic()):
            why = explain()  # takes a while
            self._read()
            if self.patience.said and self.last != "done":
                text = self.patience.text(why, self.advice)
                say(self.events.parent, "stalled", text, self.progress)
                self._read()

    def _read(self) -> None:
        if not self.events.exists():
            return
        with self.events.open() as file:
            file.seek(self.place)
            while (line := file.readline()).endswith("\n"):
                self.place = file.tell()
                self.show(json.loads(line))

    def show(self, event: dict[str, Any]) -> None:
        """One event."""
        if event["kind"] != "stalled":
            self.last = event["kind"]
            self.progress = event.get("progress", 0.0)
            self.patience.hear(self.last, time.monotonic())
        if event["kind"] == "failed":
            return  # said at the end, once
        if event["kind"] in ("round", "status") and self.status:
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
        initial_weights(config, load_schema(config))
        load_partition(config)
        if config.uploads and not Path(config.uploads).expanduser().is_file():
            raise ConfigError(f"uploads = {config.uploads!r}: no such file")
    except ValueError as error:
        raise ConfigError(str(error)) from error


def launch(
    run_config: Mapping[str, Any],
    app: Path = APP_DIR,
    console: Console | None = None,
    flower: Simulation | None = None,
    server: Server | None = None,
) -> Path:
    """Run the app in ``app`` and return the folder of its results, once it has succeeded.

    Args:
        flower: for the ray engine, if one has been started already.
        server: for the other engines, likewise.

    Raises:
        ConfigError, DataError, FileExistsError: refused before anything started.
        LaunchError: the run failed.
    """
    console = console or Console()
    config = resolve(run_config).config
    gpu_for(config.device)
    engine = engine_for(config.engine, config.device)
    preflight(config)
    folder = run_folder(config)
    if not (app / "pyproject.toml").is_file():
        raise LaunchError(f"{app} is not the app's folder: it has no pyproject.toml")
    folder.mkdir(parents=True, exist_ok=True)
    # the run works elsewhere: every path it gets is absolute
    settings = dict(run_config) | {
        "engine": engine,
        "out-dir": str(folder.parent),
        "run-name": folder.name,
        "data-dir": str(resolve_data_dir(config.data_dir)),
    }
    if (conf := Path(str(settings.get("conf", "demo"))).expanduser()).is_file():
        settings["conf"] = str(conf.absolute())
    for name, path in (("start-from", config.start_from), ("uploads", config.uploads)):
        if path:
            settings[name] = str(Path(path).expanduser().absolute())
    there = resolve(settings).config

    def carry_out(look: Look) -> str:
        if engine == "ray":
            return ray.run(app, settings, there, folder / LOG, look, flower)
        return local.run(app, settings, folder / LOG, look, server)

    reason = watched(folder, console, there, carry_out)
    if reason:
        raise LaunchError(f"{reason}\nResults so far and Flower's log are in {folder}")
    return folder


def advice(config: Config) -> str:
    """How to go on with a run that stands still."""
    if config.checkpoint_every:
        again = f"go on from its last checkpoint by run-name={config.run_name} resume=true"
    else:
        again = "start it again; with checkpoint-every=1 it could go on where it was"
    return f"if that does not change, stop it with Ctrl-C and {again}"


def watched(
    folder: Path, console: Console, config: Config, carry_out: Callable[[Look], str]
) -> str:
    """Show the events of the run in ``folder`` while it goes on: why it failed, or "".

    Args:
        carry_out: calls what it is given while the run goes on; why that failed, or "".
    """
    events = folder / EVENTS
    watcher = Watcher(events, console, Patience(config.timeout, time.monotonic()), advice(config))
    try:
        failure = carry_out(watcher.look)
    finally:
        watcher.close()
    if not failure and watcher.last == "done":
        return ""
    lines = events.read_text().splitlines() if events.exists() else []
    reasons = [e["text"] for e in map(json.loads, lines) if e["kind"] == "failed"]
    if reasons:
        return f"the run failed: {reasons[-1]}"
    return failure or "the server ended before the run was done"
