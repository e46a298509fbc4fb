"""The run's log: one record a round and client, and its progress for whoever watches."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from pathlib import Path
from typing import Any

logger = logging.getLogger("pfedgpa")

METRICS, EVENTS = "metrics.jsonl", "events.jsonl"
RECORDS = (METRICS, "clients.jsonl", "joining.jsonl")  # what a resumed run shortens, too


def clock(seconds: float) -> str:
    """``95`` → ``1:35``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def last_event(folder: Path) -> dict[str, Any]:
    """The newest whole event of the run in ``folder``; {} before the first."""
    events = folder / EVENTS
    lines = events.read_text().splitlines(keepends=True) if events.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return dict(json.loads(whole[-1])) if whole else {}


def is_done(folder: Path) -> bool:
    """Whether the run in ``folder`` came to its end."""
    return last_event(folder).get("kind") == "done"


def say(folder: Path, kind: str, text: str, progress: float) -> None:
    """Add to the events in a run's folder what somebody else says of it."""
    record = {"kind": kind, "text": text, "time": round(time.time(), 3), "progress": progress}
    with (folder / EVENTS).open("a", encoding="utf-8") as out:
        out.write(json.dumps(record) + "\n")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The summary of the run in ``folder``: one row a method."""
    rows: list[dict[str, Any]] = json.loads((folder / "summary.json").read_text())
    return rows


def mean(values: list[float]) -> float:
    """NaN for no values."""
    return sum(values) / len(values) if values else float("nan")


def _plain(value: Any) -> Any:
    """NaN becomes null: JSON has no word for it."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RunLog:
    """Appends to ``metrics.jsonl`` and ``events.jsonl`` in the run's folder.

    Attributes:
        curves: {federation: [(round, mean accuracy of all clients, of the participants)]}.
    """

    def __init__(self, folder: Path, rounds: int, work: float) -> None:
        """``work`` is the run's length in rounds, final evaluations reckoned as rounds."""
        self.folder, self.rounds = folder, rounds
        self.curves: dict[str, list[tuple[int, float, float]]] = {}
        self.rejections = 0
        self._work, self._done = work, 0.0
        self._started = self._last = time.monotonic()
        self._pace = 0.0  # seconds a round, smoothed

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the log."""
        sizes = {f: (self.folder / f).stat().st_size for f in RECORDS if (self.folder / f).exists()}
        return {
            "curves": self.curves,
            "rejections": self.rejections,
            "done": self._done,
            "sizes": sizes,
        }

    def go_on(self, state: dict[str, Any]) -> None:
        """Be as it was at a checkpoint: records written since then are forgotten."""
        self.curves, self.rejections = state["curves"], state["rejections"]
        self._done = state["done"]
        for file in RECORDS:
            path = self.folder / file
            if path.exists():
                os.truncate(path, state["sizes"].get(file, 0))

    def _append(self, file: str, record: dict[str, Any]) -> None:
        with (self.folder / file).open("a") as out:
            out.write(json.dumps(_plain(record)) + "\n")

    def event(self, kind: str, text: str, **more: Any) -> None:
        """Say something to whoever watches."""
        now = round(time.time(), 3)
        progress = round(self._done / self._work, 4) if self._work else 1.0
        record = {"kind": kind, "text": text, "time": now, "progress": progress}
        self._append(EVENTS, record | more)
        (logger.warning if kind == "warning" else logger.info)(text)

    def advance(self, work: float) -> float:
        """``work`` more rounds are done; the seconds that are left at the recent pace."""
        now = time.monotonic()
        pace = (now - self._last) / work
        if self._done <= 2:  # the first round starts the clients and says little
            self._pace = pace
        else:
            self._pace = 0.8 * self._pace + 0.2 * pace
        self._done, self._last = self._done + work, now
        return max(0.0, self._work - self._done) * self._pace

    def rejected(self, name: str, server_round: int, client: int, reason: str) -> None:
        """A client's reply cannot be used."""
        self.rejections += 1
        text = f"{name} round {server_round}: client {client} {reason}"
        self.event("warning", text)

    def round(
        self,
        name: str,
        server_round: int,
        participants: dict[int, dict[str, float]],
        scores: dict[int, dict[str, float]],
    ) -> None:
        """One record for every client that trained or was evaluated."""
        for client in sorted(participants.keys() | scores.keys()):
            record: dict[str, Any] = {
                "federation": name,
                "round": server_round,
                "client": client,
                "participated": client in participants,
                "train_loss": None,
                "accuracy": None,
                "test_loss": None,
            }
            record |= participants.get(client, {}) | scores.get(client, {})
            self._append(METRICS, record)
        loss = mean([p["train_loss"] for p in participants.values()])
        seconds_left = self.advance(1)
        text = f"{name} round {server_round}/{self.rounds}  loss {loss:.3f}"
        if scores:
            everyone = mean([s["accuracy"] for s in scores.values()])
            some = mean([s["accuracy"] for c, s in scores.items() if c in participants])
            self.curves.setdefault(name, []).append((server_round, everyone, some))
        if name in self.curves:
            text += f"  accuracy {self.curves[name][-1][1]:.1f} %"
        self.event("round", f"{text}  {clock(seconds_left)} left", federation=name)
