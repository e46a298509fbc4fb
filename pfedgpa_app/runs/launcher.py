"""Run an experiment on an engine, show its progress, and report how it ended."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from pfedgpa_app.config.parse import argument
from pfedgpa_app.config.resolve import resolve, with_absolute_files
from pfedgpa_app.core.paths import APP_DIR, YAML, user_path
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import load_partition, load_schema
from pfedgpa_app.data.datasets import resolve_data_dir
from pfedgpa_app.engine import LaunchError, Poll, StoppedError, engine_for, gpu_for, local, ray
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.methods import federations, rounds_class
from pfedgpa_app.methods.contract import MethodError
from pfedgpa_app.methods.halves import ServerHalf, begun
from pfedgpa_app.results import tracking, uploads
from pfedgpa_app.results.log import EVENTS, Records, clock, is_done, last_event, say
from pfedgpa_app.runs.folder import (
    LOG,
    check_unchanged,
    check_uploads,
    is_running,
    run_folder,
    running,
)
from pfedgpa_app.runs.initial import initial_weights
from pfedgpa_app.server import privacy


class Patience:
    """Decides how long a run may be silent before its user is told.

    The limit is a multiple of the longest silence so far, usually a round's. Before the first round
    it is ``timeout``, the seconds in which a client must answer, but at most two minutes.
    """

    LEAST, MOST_AT_FIRST, TIMES = 60.0, 120.0, 5

    def __init__(self, timeout: float, now: float) -> None:
        self.first, self.heard, self.longest = min(timeout, self.MOST_AT_FIRST), now, 0.0
        self.said = 0.0  # the silence, in seconds, that the user was last told of

    def hear(self, kind: str, now: float) -> None:
        """Take note that an event of this kind happened."""
        if self.longest or kind == "round":
            self.longest = max(self.longest, now - self.heard)
        self.heard, self.said = now, 0.0

    def is_over(self, now: float) -> bool:
        """Whether to tell the user: it is silent too long, and twice as long as when last told."""
        limit = max(self.LEAST, self.TIMES * self.longest) if self.longest else self.first
        silence = now - self.heard
        if silence <= max(limit, 2 * self.said):
            return False
        self.said = silence
        return True

    def text(self, why: str, advice: str) -> str:
        """Return what to tell the user."""
        usual = f" (a round took {clock(self.longest)} at most)" if self.longest else ""
        parts = [f"nothing has happened for {clock(self.said)}{usual}", why, advice]
        return "; ".join(part for part in parts if part)


def plain_console() -> Console:
    """Return a console that prints text as it is: no markup, no emoji, no line broken."""
    return Console(markup=False, emoji=False, highlight=False, soft_wrap=True)


class Watcher:
    """Shows a run's events: one live line on a terminal, plain lines elsewhere."""

    def __init__(self, events: Path, console: Console, patience: Patience, advice: str) -> None:
        """Watch the file ``events``; ``advice`` says how to go on with a run that stands still."""
        self.events, self.console = Records(events), console
        self.patience, self.advice = patience, advice
        self.last, self.failure, self.progress = "", "", 0.0
        for _ in self.events.new():  # skip what a resumed run said before
            pass
        self.status = console.status("starting") if console.is_terminal else None

    def poll(self, explain: Callable[[], str] = lambda: "") -> None:
        """Show new events, or say that there has been none for too long.

        Args:
            explain: says which process waits for what.
        """
        if self.status:
            self.status.start()
        self._read()
        if self.patience.is_over(time.monotonic()):
            why = explain()  # takes a while, in which events may come
            self._read()
            if self.patience.said and self.last != "done":
                text = self.patience.text(why, self.advice)
                say(self.events.path.parent, "stalled", text, self.progress)
                self._read()

    def _read(self) -> None:
        for event in self.events.new():
            self.show(event)

    def show(self, event: dict[str, Any]) -> None:
        """Show one event."""
        kind = event["kind"]
        if kind != "stalled":
            self.last, self.progress = kind, event.get("progress", 0.0)
            self.patience.hear(kind, time.monotonic())
        if kind == "failed":
            self.failure = event["text"]
            return  # it is shown once, at the end
        if kind in ("round", "status", "progress") and self.status:
            self.status.update(Text(event["text"]), spinner="dots")
        elif kind != "progress":  # progress is for a live line only
            self.console.print(event["text"])

    def close(self) -> None:
        self.poll()
        if self.status:
            self.status.stop()


def preflight(run_config: Mapping[str, Any], config: Config) -> None:
    """Refuse whatever can be refused before Flower is started.

    Args:
        run_config: the settings that ``config`` was resolved from.

    Raises:
        ConfigError, DataError: says what is wrong and what to do.
    """
    try:
        tracking.require_installed(config.track)
        privacy.check(config)
        initial = initial_weights(config, load_schema(config))
        _begin_own(config, initial)
        load_partition(config)
        if config.uploads and not user_path(config.uploads).is_file():
            raise ConfigError(f"uploads = {config.uploads!r}: no such file")
        if config.uploads:
            there = resolve(with_absolute_paths(run_config, config))
            uploads.require_alike(user_path(config.uploads), there)
            check_uploads(config)
    except (ValueError, MethodError) as error:
        raise ConfigError(str(error)) from error


def _begin_own(config: Config, initial: Weights) -> None:
    """Try out the beginning of the user's own methods, which nothing has tested before.

    Raises:
        MethodError: one of them cannot begin.
    """
    for name in federations(config.method):
        kind = rounds_class(name)
        if kind.__module__.partition(".")[0] != __name__.partition(".")[0]:
            ServerHalf(name, kind(config, begun(name, kind, config, initial)), initial)


def launch(
    run_config: Mapping[str, Any],
    app: Path = APP_DIR,
    console: Console | None = None,
    flower: Simulation | None = None,
) -> Path:
    """Run the app in ``app`` and return the folder of its results once it has succeeded.

    Args:
        flower: a simulation for the ray engine that has been started already, if any.

    Raises:
        ConfigError, DataError: the run was refused before anything started.
        LaunchError: the run failed.
        StoppedError: the user stopped it.
    """
    console = console or plain_console()
    config = resolve(run_config).config
    gpu_for(config.device)
    if not (app / "pyproject.toml").is_file():
        raise LaunchError(f"{app} is not the app's folder: it has no pyproject.toml")
    preflight(run_config, config)
    engine = engine_for(config.engine, config.device)
    settings = with_absolute_paths(run_config, config) | {"engine": engine}
    folder = run_folder(resolve(settings))
    if is_done(folder):
        console.print(f"nothing is left to do: results are in {folder}")
        return folder
    check_unchanged(folder, config)
    settings |= {"out-dir": str(folder.parent), "run-name": folder.name}
    there = resolve(settings).config

    def run_it(poll: Poll) -> str:
        if engine == "ray":
            return ray.run(app, settings, there, folder / LOG, poll, flower)
        return local.run(app, settings, folder / LOG, poll)

    reason = watched(folder, console, there, run_it)
    if reason:
        left = f"Results so far and Flower's log are in {folder}"
        if not folder.exists():
            left = f"The run's folder, {folder}, is gone, and Flower's log with it"
        text = f"{reason}\n{left}"
        raise LaunchError(text) from _raised_there(folder)
    return folder


class RemoteError(Exception):
    """An error in the run's server process, shown by its traceback there."""

    def __str__(self) -> str:
        return f"in the run's server process\n{self.args[0]}"


def _raised_there(folder: Path) -> RemoteError | None:
    """Return the error that ended the run in ``folder``, with its traceback; None if unknown."""
    trace = last_event(folder).get("traceback")
    return RemoteError(trace) if trace else None


def with_absolute_paths(run_config: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return ``run_config`` with absolute paths, for a run that works in another folder.

    Args:
        config: what ``run_config`` resolves to.
    """
    settings = {  # messages carry lists as texts
        name: argument(value) if isinstance(value, (list, tuple)) else value
        for name, value in run_config.items()
    }
    settings["data-dir"] = str(resolve_data_dir(config.data_dir, config.dataset))
    conf = user_path(str(settings.get("conf", "")))
    if conf.suffix in YAML and conf.is_file():  # otherwise it names one of the app's files
        settings["conf"] = str(conf.absolute())
    settings["code-dir"] = str(user_path(config.code_dir or ".").absolute())
    return with_absolute_files(settings, config)


def advice(config: Config) -> str:
    """Say how to go on with a run that stands still."""
    if config.checkpoint_every:
        name = shlex.quote(f"run-name={config.run_name}")
        again = f"go on from its last checkpoint with {name} resume=true"
    else:
        again = "start it again; with checkpoint-every=1 it could go on where it was"
    return f"if that does not change, stop it with Ctrl-C and {again}"


def watched(folder: Path, console: Console, config: Config, run_it: Callable[[Poll], str]) -> str:
    """Show the events of the run in ``folder`` while it goes on; return why it failed, or "".

    Args:
        run_it: runs it, calling the function that it is given time and again; returns why the run
            failed, or "".

    Raises:
        ConfigError: another run has just begun there.
        StoppedError: the user stopped it.
    """
    watcher = Watcher(
        folder / EVENTS, console, Patience(config.timeout, time.monotonic()), advice(config)
    )
    try:
        failure = run_it(watcher.poll)
    except KeyboardInterrupt as stop:
        raise StoppedError(folder) from stop
    finally:
        watcher.close()
    if not failure and is_done(folder):
        return ""
    if watcher.failure:
        return f"the run failed: {watcher.failure}"
    if is_running(folder):  # ours has ended: another run began there at the same moment
        raise ConfigError(running(folder))
    return failure or "the server ended before the run was done"
