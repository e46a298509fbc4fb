"""Run an experiment on an engine, show its progress, and tell the truth about how it ended."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from pfedgpa_app.config import APP_DIR, Config, resolve
from pfedgpa_app.data.client import load_partition, load_schema
from pfedgpa_app.data.datasets import resolve_data_dir
from pfedgpa_app.engine import LaunchError, engine_for, gpu_for, local, ray
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.experiment import initial_weights, run_folder
from pfedgpa_app.results.log import EVENTS
from pfedgpa_app.settings import ConfigError

LOG = "flower.log"


class Watcher:
    """Shows a run's events: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, events: Path, console: Console) -> None:
        self.events, self.console = events, console
        self.place, self.last = 0, ""
        self.status = console.status("starting") if console.is_terminal else None

    def look(self) -> None:
        """Show what is new."""
        if self.status:  # its thread begins here, after an engine has forked
            self.status.start()
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
) -> Path:
    """Run the app in ``app`` and return the folder of its results, once it has succeeded.

    Args:
        flower: for the ray engine, if one has been started already.

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
        "data-dir": str(resolve_data_dir(config.data_dir, config.dataset)),
    }
    if (conf := Path(str(settings.get("conf", "demo"))).expanduser()).is_file():
        settings["conf"] = str(conf.absolute())
    for name, path in (("start-from", config.start_from), ("uploads", config.uploads)):
        if path:
            settings[name] = str(Path(path).expanduser().absolute())
    carry = functools.partial(ray.run, flower=flower) if engine == "ray" else local.run
    there = resolve(settings).config
    reason = watched(folder, console, lambda look: carry(app, settings, there, folder / LOG, look))
    if reason:
        raise LaunchError(f"{reason}\nResults so far and Flower's log are in {folder}")
    return folder


def watched(folder: Path, console: Console, carry_out: Callable[[Callable[[], None]], str]) -> str:
    """Show the events of the run in ``folder`` while it goes on: why it failed, or "".

    Args:
        carry_out: calls what it is given while the run goes on; why that failed, or "".
    """
    events = folder / EVENTS
    watcher = Watcher(events, console)
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
