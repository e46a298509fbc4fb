"""Show the user how a sweep is going."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from pfedgpa_app.study.plan import PlannedRun


class Show(Protocol):
    """Shows the user how the sweep is going."""

    def begin(self, run: PlannedRun, text: str) -> None: ...
    def update(self, run: PlannedRun, event: Mapping[str, Any], text: str) -> None: ...
    def end(self, run: PlannedRun, outcome: str, text: str) -> None: ...


class Lines:
    """Prints a line when a run starts, when it ends, and when it stands still."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stalled: dict[str, str] = {}  # {run: what was last said of its stall}

    def begin(self, run: PlannedRun, text: str) -> None:
        self.console.print(f"{text}  {run.name}: started")

    def update(self, run: PlannedRun, event: Mapping[str, Any], text: str) -> None:
        if event.get("kind") == "stalled" and self.stalled.get(run.name) != event["text"]:
            self.stalled[run.name] = event["text"]
            self.console.print(f"{text}  {run.name}: {event['text']}")

    def end(self, run: PlannedRun, outcome: str, text: str) -> None:
        self.console.print(f"{text}  {run.name}: {outcome}")


class Bars(Lines):
    """Shows a live bar for each run that is going on and one for the sweep, below the lines."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.progress = Progress(
            TextColumn(
                "{task.description}", markup=False, table_column=Column(no_wrap=True, min_width=24)
            ),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[now]}", markup=False, table_column=Column(no_wrap=True)),
            console=console,
            transient=True,
        )
        self.sweep = self.progress.add_task("sweep", total=None, now="")
        self.tasks: dict[str, TaskID] = {}
        self.progress.start()

    def begin(self, run: PlannedRun, text: str) -> None:
        self.tasks[run.name] = self.progress.add_task(run.name, total=1, now="starting")
        self.progress.update(self.sweep, now=text)

    def update(self, run: PlannedRun, event: Mapping[str, Any], text: str) -> None:
        super().update(run, event, text)
        now = event["text"].splitlines()[0] if event else "starting"
        completed = event.get("progress", 0)
        self.progress.update(self.tasks[run.name], completed=completed, now=now)
        self.progress.update(self.sweep, now=text)

    def end(self, run: PlannedRun, outcome: str, text: str) -> None:
        self.progress.remove_task(self.tasks.pop(run.name))
        super().end(run, outcome, text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        self.progress.stop()
