"""Read a run, or all runs in some folders, from the files there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pfedgpa_app.config.checks import RUN_CONFIG
from pfedgpa_app.config.names import defaults, keys, without_idle
from pfedgpa_app.config.parse import argument
from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import ConfigError, listed
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.results.log import (
    CLIENTS,
    SUMMARY,
    Records,
    accuracies_of,
    last_event,
    mean,
    rows_of,
)
from pfedgpa_app.runs.folder import CONFIG, HOLDINGS, USERS, kept_methods, kept_settings

Row = dict[str, Any]
# settings of the machine that a run was on; the launcher fills them in, differently elsewhere
OF_ITS_PLACE = ("code-dir", "engine", "workers")
MOST_USERS = 3  # how many of one client's users are named
_NAMED_OTHERWISE = ("conf", "out-dir", "run-name", "resume")


@dataclass(frozen=True)
class Run:
    """A run, read from its folder."""

    folder: Path

    @cached_property
    def _kept(self) -> dict[str, Any]:
        return kept_settings(self.folder)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings, {setting: {"value": …, "from": …}}.

        Those that a run of an earlier version lacked have their defaults.
        """
        before = {name: {"value": value, "from": "default"} for name, value in defaults().items()}
        return before | self._kept

    @cached_property
    def rows(self) -> list[Row]:
        """The rows of ``summary.json``, one for each method."""
        kept_methods(self.folder)  # imports methods of the user's own
        return rows_of(self.folder)

    def lines(self, file: str) -> Iterator[Row]:
        """Yield the records of one of its files."""
        return Records(self.folder / file).new()

    def read(self, file: str) -> dict[str, Any] | None:
        """Return the dict in one of its JSON files; None if there is no such file.

        Raises:
            ConfigError: the file is damaged.
        """
        path = self.folder / file
        if not path.exists():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError("it holds none of a run's records")
            return found
        except ValueError as error:
            raise ConfigError(
                f"{path} cannot be read: {error}: put it back, or remove it"
            ) from error

    @cached_property
    def users(self) -> list[list[str]]:
        """The names of each client's users; [] where clients are not users, or are not known.

        Raises:
            ConfigError: as ``read``.
        """
        held = self.read(HOLDINGS) or {}
        return list(held.get(USERS, []))  # earlier versions did not keep them

    def named(self, client: int) -> str:
        """Return a client's number, followed by the names of its users, if it has any."""
        return f"{client}: {listed(self.users[client], MOST_USERS)}" if self.users else str(client)

    @cached_property
    def ended(self) -> float:
        """When its last event was, in seconds since the epoch."""
        return float(last_event(self.folder).get("time", 0.0))

    def choice(self, method: str, varied: Sequence[str]) -> dict[str, Any]:
        """Return the values of those ``varied`` settings that ``method`` uses."""
        here = self.goes_by([method])
        return values_of({name: here[name] for name in varied if name in here})

    def goes_by(self, methods: Sequence[str]) -> dict[str, Any]:
        """Return those of its settings that at least one of ``methods`` uses."""
        return without_idle(self.settings, methods, self.settings["partition"]["value"])

    def in_each_round(self) -> str:
        """Say who takes part in each of its rounds."""

        def value(name: str) -> float:
            return float(self.settings[name]["value"])

        share = value("fraction-train")
        part = f"{100 * share:g} % of the" if share < 1 else "all"
        who = "clients that were there from the start" if value("join-clients") else "clients"
        shares = {"drop out": value("dropout-share"), "are late": value("straggler-share")}
        lost = [f"{100 * share:g} % {what}" for what, share in shares.items() if share]
        return f"{part} {who} in each" + (f" (of whom {' and '.join(lost)})" if lost else "")

    @cached_property
    def curves(self) -> dict[str, dict[int, float]]:
        """{federation: {round: mean accuracy of its clients}}."""
        found = accuracies_of(self.folder)
        return {name: {r: mean(a) for r, a in rounds.items()} for name, rounds in found.items()}

    @cached_property
    def clients(self) -> dict[str, dict[int, Row]]:
        """{method's title: {client: its accuracies}}."""
        titles = {row["method"]: row["title"] for row in self.rows}
        found: dict[str, dict[int, Row]] = {}
        for record in self.lines(CLIENTS):
            if record["method"] in titles:
                found.setdefault(titles[record["method"]], {})[record["client"]] = record
        return found


def runs_in(paths: Sequence[Path]) -> list[Run]:
    """Return the runs with results in these folders and below them: a sweep's, a comparison's.

    A folder whose runs have no results yet is left out with a warning.

    Raises:
        ConfigError: a folder holds no run at all, or no run in any of them has results.
    """
    found: dict[Path, None] = {}
    undone: list[Path] = []
    for path in paths:
        folders = sorted(f.parent for f in path.rglob(SUMMARY) if (f.parent / CONFIG).is_file())
        if not folders and not next(path.rglob(CONFIG), None):
            raise ConfigError(f"{path}: holds no finished run")
        if not folders:
            undone.append(path)
        found |= dict.fromkeys(folders)
    for path in undone:
        text = f"{path}: holds no finished run"
        if not found:
            raise ConfigError(text)
        warn_once(f"{text}; it is left out")
    return [Run(folder) for folder in found]


def files_named(name: str, folder: Path) -> list[Path]:
    """Return the run's file of this name, after those that have a method's name in it, too."""
    plain = folder / name
    others = sorted(folder.glob(f"{plain.stem}.*{plain.suffix}"))
    return [path for path in (*others, plain) if path.is_file()]


def chosen(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield the settings whose value is not the default, except those of the launch."""
    before = defaults()
    for name, entry in run.settings.items():
        launch = name in keys() and keys()[name].is_for_launch
        if entry["value"] != before.get(name) and not launch:
            yield name, entry


def command_of(run: Run) -> str:
    """Return the command that makes such a run again, under a name of its own.

    It has every setting that was given for the run, except where the run was.
    """
    apart = {*OF_ITS_PLACE, *_NAMED_OTHERWISE}
    given = {
        name: entry["value"]
        for name, entry in run.settings.items()
        if entry["from"] == RUN_CONFIG and name in keys() and name not in apart
    }
    conf = str(run.settings["conf"]["value"])
    words = [f"{name}={argument(value)}" for name, value in given.items()]
    if run.settings["dataset"]["value"] == NODES:
        made = shlex.join(["pfedgpa", "app", "FOLDER", f"conf={conf}", *words])
        return f"{made} && flwr run FOLDER SUPERLINK --stream"
    return shlex.join(["pfedgpa", "run", "--conf", conf, *words])
