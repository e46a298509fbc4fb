"""Sweeps: many runs that share one machine or a cluster.

A sweep is every combination of the settings it varies. Each run is a ``pfedgpa run`` of its own, in
a folder named after its settings, so that a sweep that was stopped can go on: runs that are done
are skipped, and one that was broken off goes on from its checkpoint.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pfedgpa_app.config.parse import argument
from pfedgpa_app.core.files import write_json, write_text
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.engine import StoppedError, engine_elsewhere, engine_for
from pfedgpa_app.results.log import (
    EVENTS,
    clock,
    finished_in,
    is_done,
    last_event,
    rows_of,
    warnings_of,
)
from pfedgpa_app.results.tables import seeds_table
from pfedgpa_app.runs import report
from pfedgpa_app.runs.folder import is_running, locked
from pfedgpa_app.runs.launcher import plain_console, preflight
from pfedgpa_app.study.places import Going, Here, Lost, Place, place_of
from pfedgpa_app.study.plan import PlannedRun, Settings, expand
from pfedgpa_app.study.progress import Bars, Lines, Show
from pfedgpa_app.training.sgd import slow_precision

LOOK = 0.5  # seconds between looks at the runs
COLUMNS = {
    "as sent": "accuracy_before_ft",
    "after FT": "accuracy_after_ft",
    "kept by validation": "accuracy_kept",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client as sent": "accuracy_worst_client_before_ft",
    "rounds to 95 % of the peak": "rounds_to_95_percent_of_peak",
    "server s": "server_seconds",
    "peak MiB so far": "peak_memory_mib",
}
JOINED = "accuracy_of_joining_clients"  # a list: as welcomed, and after each upload

# takes a run and its newest event; returns why to end the run early, or None
Judge = Callable[[PlannedRun, Mapping[str, Any]], str | None]


def shares(
    runs: Sequence[PlannedRun], jobs: int | None, machines: Sequence[int], here: bool = True
) -> tuple[int, int | None]:
    """Return how many runs go at once, and how many workers each has (None: as its settings say).

    Runs on the process engine share the cores, one worker each while there are enough runs: while
    one run's server works, another's client trains. Ray and a GPU serve one run at a time.

    Args:
        machines: the number of cores of each machine.
        here: whether they are this one, whose GPU then decides on ``engine=auto``.
    """
    cores = sum(machines)
    engine = engine_for if here else engine_elsewhere
    engines = {engine(run.config.engine, run.config.device) for run in runs}
    asked = [run.config.workers for run in runs if run.config.workers]
    if engines != {"process"}:
        return jobs or len(machines), None
    if asked:
        return jobs or max(1, cores // max(asked)), None
    at_once = jobs or max(1, min(cores, len(runs)))
    return at_once, max(1, min(cores // at_once, *machines))


def lenient(_: PlannedRun, __: Mapping[str, Any]) -> str | None:
    """End no run early."""
    return None


class Sweep:
    """Runs what is not done, several at once, and keeps count."""

    TRIES = 3  # for a run whose machines leave

    def __init__(
        self,
        runs: Sequence[PlannedRun],
        app: Path,
        jobs: int,
        workers: int | None,
        show: Show,
        place: Place | None = None,
        judge: Judge = lenient,
    ) -> None:
        """Plan the sweep; ``place`` is where runs work, None for this machine."""
        self.runs, self.app, self.jobs, self.workers, self.show = runs, app, jobs, workers, show
        self.place, self.judge = place or Here(), judge
        self.waiting = [run for run in runs if not is_done(run.folder)]
        self.done = len(runs) - len(self.waiting)
        self.going: list[tuple[PlannedRun, Going]] = []
        self._earlier: dict[str, dict[str, Any]] = {}  # {run: its last event before it was resumed}
        self._lost = Counter[str]()
        self.failed: dict[str, str] = {}
        self._started = time.monotonic()
        self._finished_work = 0.0

    def run_all(self) -> None:
        """Run until no run is left; whatever happens, none is going on afterwards."""
        try:
            while self.waiting or self.going:
                while self.waiting and len(self.going) < self.jobs:
                    self._begin(self.waiting.pop(0))
                time.sleep(LOOK)
                for run, going in list(self.going):
                    self._look(run, going)
        finally:
            for _, going in self.going:
                going.stop()
            for _, going in self.going:
                going.wait()

    def _begin(self, run: PlannedRun) -> None:
        resume = self.place.shared and run.can_go_on()
        self._earlier[run.name] = last_event(run.folder) if resume else {}
        if run.folder.exists() and not resume and not is_running(run.folder):
            shutil.rmtree(run.folder)
        settings = run.settings | {"resume": resume}
        going = self.place.start(settings, self.app, run.folder, self.workers)
        self.going.append((run, going))
        self.show.begin(run, self.state())

    def _look(self, run: PlannedRun, going: Going) -> None:
        try:
            status = going.status()
        except Lost as loss:
            self.going.remove((run, going))
            self._lost[run.name] += 1
            if self._lost[run.name] < self.TRIES:
                self.waiting.append(run)
                again = "it goes on" if self.place.shared else "it begins anew"
                self.show.end(run, f"lost with its machine; {again}", self.state())
            else:
                self._fail(run, f"lost its machine {self.TRIES} times: {loss}")
            return
        event = going.event()
        fresh = event != self._earlier[run.name]
        self.show.update(run, event if fresh else {}, self.state())
        if status is not None:
            self._end(run, going, status)
        elif fresh and (why := self.judge(run, event)):
            going.stop()
            going.wait()
            self.going.remove((run, going))
            self.show.end(run, why, self.state())

    def _end(self, run: PlannedRun, going: Going, status: int) -> None:
        said = going.said().strip()
        said = said[max(0, said.rfind("pfedgpa: ")) :]  # the user's own code wrote what precedes
        self.going.remove((run, going))
        self._finished_work += self._worked(run, 1.0)
        if status:
            self._fail(run, said[-1000:] or f"exit status {status}")
        else:
            self.done += 1
            self.show.end(run, _headline(run.folder), self.state())

    def _fail(self, run: PlannedRun, why: str) -> None:
        self.failed[run.name] = f"failed: {why}"
        self.show.end(run, self.failed[run.name], self.state())

    def state(self) -> str:
        """Say how far the sweep is, as in ``3/9 done, 12:31 left``."""
        partly = {run.name: going.event().get("progress", 0.0) for run, going in self.going}
        going = [run for run, _ in self.going]
        left = sum(run.work for run in [*self.waiting, *going])
        left -= sum(run.work * partly[run.name] for run in going)
        worked = self._finished_work + sum(self._worked(run, partly[run.name]) for run in going)
        text = f"{self.done}/{len(self.runs)} done"
        if worked > 0:
            elapsed = time.monotonic() - self._started
            text += f", {clock(left / worked * elapsed)} left"
        return text

    def _worked(self, run: PlannedRun, progress: float) -> float:
        """Return how much of the run's work was done since it began, or was resumed, here."""
        before: float = self._earlier[run.name].get("progress", 0.0)
        return run.work * max(0.0, progress - before)


def _headline(folder: Path) -> str:
    figures = ", ".join(f"{r['method']} {r['accuracy_before_ft']:.1f}" for r in rows_of(folder))
    if not (warnings := warnings_of(folder)):
        return figures
    more = f" (and {len(warnings) - 1} more, in {EVENTS})" if len(warnings) > 1 else ""
    return f"{figures}; warning: {warnings[0]}{more}"


def summarise(runs: Sequence[PlannedRun], out: Path) -> str:
    """Write ``sweep.json`` (all finished rows), ``sweep.md`` (means over seeds) and a report."""
    finished = [run for run in runs if is_done(run.folder)]
    rows = {run.name: rows_of(run.folder) for run in finished}
    record = [{"run": r.name, "varied": r.varied, "summary": rows[r.name]} for r in finished]
    write_json(out / "sweep.json", record, indent=1)
    parts = []
    for varied, alike in _groups(finished):
        title = ", ".join(f"{key} = {argument(v)}" for key, v in varied.items()) or "all runs"
        seeds = ", ".join(str(run.config.seed) for run in alike)
        figures = table([rows[run.name] for run in alike])
        spread = ": means ± one standard deviation over them" if len(alike) > 1 else ""
        parts.append(f"### {title}\n\nSeeds {seeds}{spread}.\n\n{figures}\n")
    if undone := [run.name for run in runs if run not in finished]:
        parts.append(f"Without a result, so in no table: {', '.join(undone)}.\n")
    here = {run.folder.name for run in finished}
    if left_out := [each for each in finished_in(out) if each.name not in here]:
        parts.append(f"Not in these tables: {len(left_out)} more finished runs in {out.name}/.\n")
    write_text(out / "sweep.md", "\n".join(parts))
    if finished and all(run.config.report for run in finished):
        report.write([run.folder for run in finished], out / report.REPORT)
    return "\n".join(parts)


def table(seeds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return a table over seeds, with the columns for which the runs have figures."""
    most = max(len(row.get(JOINED, [])) for rows in seeds for row in rows)
    joined = {f"joined, after {i}" if i else "joined": f"joined {i}" for i in range(most)}
    flat = [
        [row | {f"joined {i}": a for i, a in enumerate(row.get(JOINED, []))} for row in rows]
        for rows in seeds
    ]
    return seeds_table(flat, COLUMNS | joined)


def _groups(runs: Sequence[PlannedRun]) -> Iterator[tuple[Settings, list[PlannedRun]]]:
    """Yield, for each choice of the varied settings, the runs that differ only in the seed."""
    groups: dict[str, tuple[Settings, list[PlannedRun]]] = {}
    for run in runs:
        varied = {key: value for key, value in run.varied.items() if key != "seed"}
        groups.setdefault(json.dumps(varied), (varied, []))[1].append(run)
    yield from groups.values()


def sweep(
    settings: Settings,
    over: Mapping[str, Sequence[Any]],
    out: Path,
    app: Path,
    jobs: int | None = None,
    on: str = "here",
) -> bool:
    """Run every combination that is not done yet; return whether all of them are done now.

    Raises:
        ConfigError, DataError: refused before any run started.
    """
    return run_sweep(expand(settings, over, out), out, app, jobs, on)


def run_sweep(
    runs: list[PlannedRun],
    out: Path,
    app: Path,
    jobs: int | None,
    on: str = "here",
    judge: Judge = lenient,
) -> bool:
    """Run those of ``runs`` that are not done yet; return whether none failed.

    Args:
        on: the name of the place where they work; see ``places``.
        judge: ends some runs early.

    Raises:
        ConfigError, DataError: refused before any run started.
    """
    for run in runs:
        if on != "here" and run.config.engine == "ray":
            raise ConfigError("engine = ray: on a cluster a run stays on one machine; set process")
        preflight(run.settings, run.config)
        run.require_same_data()
        if on == "here" and not is_done(run.folder) and (text := slow_precision(run.config)):
            warn_once(text)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {out}: the folder cannot be made: {error.strerror}") from error
    with locked(out, f"{out}: another sweep is running there"):
        place = place_of(on, out)
        try:
            return _run_all(runs, out, app, jobs, place, judge)
        finally:
            place.close()


def _run_all(
    runs: list[PlannedRun],
    out: Path,
    app: Path,
    jobs: int | None,
    place: Place,
    judge: Judge,
) -> bool:
    console = plain_console()
    jobs, workers = shares(runs, jobs, place.machines(), isinstance(place, Here))
    place.check([run.config for run in runs if not is_done(run.folder)], workers)
    show = Bars(console) if console.is_terminal else Lines(console)
    going = Sweep(runs, app, jobs, workers, show, place, judge)
    if skipped := going.done:
        console.print(f"{skipped} of {len(runs)} runs are done already")
    try:
        going.run_all()
    except KeyboardInterrupt as stop:
        raise StoppedError(out.absolute()) from stop
    finally:
        if isinstance(show, Bars):
            show.close()
        table = summarise(runs, out)
    console.print(table)
    for name, outcome in going.failed.items():
        console.print(f"{name}: {outcome}")
    console.print(f"results are in {out.absolute()}")
    return not going.failed
