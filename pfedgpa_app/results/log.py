"""The run's log: a record for each round and client, and events that show its progress."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import time
import traceback
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pfedgpa_app.core.files import as_json, sync
from pfedgpa_app.core.settings import ConfigError

logger = logging.getLogger("pfedgpa")

METRICS, EVENTS, SUMMARY = "metrics.jsonl", "events.jsonl", "summary.json"
TABLE = "table.md"  # has all methods and is written last
CLIENTS, JOINING = "clients.jsonl", "joining.jsonl"  # accuracies, by method and client
RECORDS = (METRICS, CLIENTS, JOINING)  # a resumed run cuts them back


def clock(seconds: float) -> str:
    """Format seconds as minutes and seconds: 95 as ``1:35``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Records:
    """Reads the records of a log that may still be growing.

    Lines that a killed process or a full disk left incomplete are skipped.
    """

    def __init__(self, path: Path, place: int = 0) -> None:
        """Read the file from byte ``place`` on."""
        self.path, self.place = path, place

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the complete records that have not been read yet."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self.place)
            while (line := file.readline()).endswith(b"\n"):
                self.place = file.tell()
                if record := record_in(line):
                    yield record


def record_in(line: bytes) -> dict[str, Any]:
    """Return the record in a line; {} if there is none."""
    try:
        found = json.loads(line.decode())
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def last_event(folder: Path) -> dict[str, Any]:
    """Return the newest complete event of the run in ``folder``; {} before the first."""
    path = folder / EVENTS
    window, size = 4096, path.stat().st_size if path.exists() else 0
    while True:  # read from the end, as a long run's log is large
        newest = deque(Records(path, max(0, size - window)).new(), maxlen=1)
        if newest or window >= size:
            return newest[0] if newest else {}
        window *= 8


def participants(folder: Path, name: str, server_round: int, clients: int) -> set[int]:
    """Return the clients whose uploads counted in a round, if it is the newest one in the log.

    Args:
        name: the round's federation.
        clients: how many clients the run has, which tells how much of the log's end to read.
    """
    path, most = folder / METRICS, clients * 2**9  # bytes that a round's records take at most
    if not path.exists():
        return set()
    return {
        record["client"]
        for record in Records(path, max(0, path.stat().st_size - most)).new()
        if (record["federation"], record["round"]) == (name, server_round)
        and record["participated"]
    }


def _summed(path: Path, size: int = 0, checksum: int = 0) -> tuple[int, int]:
    """Return a file's size and CRC-32, without reading again what has been summed.

    Args:
        size, checksum: those of the part that has been summed.
    """
    with path.open("rb") as file:
        file.seek(size)
        more = file.read()
    return size + len(more), zlib.crc32(more, checksum)


def end_whole(path: Path) -> None:
    """Cut off an incomplete last line, so that the next record has a line of its own."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def is_done(folder: Path) -> bool:
    """Whether the run in ``folder`` has finished."""
    return last_event(folder).get("kind") == "done"


def finished_in(out: Path) -> list[Path]:
    """Return the folders of the finished runs in ``out``, in the order in which they ended."""
    ends = {path.parent: last_event(path.parent) for path in sorted(out.glob(f"*/{SUMMARY}"))}
    found = [folder for folder, event in ends.items() if event.get("kind") == "done"]
    return sorted(found, key=lambda folder: float(ends[folder].get("time", 0)))


def say(folder: Path, kind: str, text: str, progress: float) -> None:
    """Add an event to a run's folder from outside the run's own process."""
    record = {"kind": kind, "text": text, "time": round(time.time(), 3), "progress": progress}
    append(folder / EVENTS, record)


def append(path: Path, *records: dict[str, Any]) -> None:
    """Add records, a line each, to a file of records."""
    with path.open("a", encoding="utf-8") as out:
        out.writelines(as_json(record) + "\n" for record in records)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the summary of the run in ``folder``, a row for each method.

    Raises:
        ConfigError: it cannot be read.
    """
    path = folder / SUMMARY
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
            raise ValueError("it has no entry per method")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path} cannot be read: {error}; delete {folder}, and run it again"
        ) from error
    return rows


def rounds_of(folder: Path) -> dict[str, dict[int, list[dict[str, Any]]]]:
    """Return {federation: {round: its records, one for each client}} of the run in ``folder``."""
    found: dict[str, dict[int, list[dict[str, Any]]]] = {}
    for record in Records(folder / METRICS).new():
        rounds = found.setdefault(record["federation"], {})
        rounds.setdefault(record["round"], []).append(record)
    return found


def accuracies_of(folder: Path) -> dict[str, dict[int, list[float]]]:
    """Return {federation: {round: every evaluated client's accuracy}} of the run in ``folder``."""
    found: dict[str, dict[int, list[float]]] = {}
    for federation, rounds in rounds_of(folder).items():
        for server_round, records in rounds.items():
            values = [r["accuracy"] for r in records if r.get("accuracy") is not None]
            if values:
                found.setdefault(federation, {})[server_round] = values
    return found


def warnings_of(folder: Path) -> list[str]:
    """Return what the run in ``folder`` warned of, each text once."""
    events = Records(folder / EVENTS).new()
    return list(dict.fromkeys(e["text"] for e in events if e["kind"] == "warning"))


def mean(values: list[float]) -> float:
    """Return the mean; NaN if there are no values."""
    return sum(values) / len(values) if values else float("nan")


class RunLog:
    """Appends to ``metrics.jsonl`` and ``events.jsonl`` in the run's folder.

    Attributes:
        curves: {federation: [(round, mean accuracy of all clients)]}.
        making: {federation: seconds that the server will take to make its clients' weights}.
        listeners: functions to call with each round's federation, number and records.
    """

    def __init__(
        self, folder: Path, rounds: int, work: float, making: Mapping[str, float] | None = None
    ) -> None:
        """Start the log; ``work`` is the run's length in rounds, with its evaluations as rounds."""
        self.folder, self.rounds, self.making = folder, rounds, dict(making or {})
        self.curves: dict[str, list[tuple[int, float]]] = {}
        self.listeners: list[Callable[[str, int, list[dict[str, Any]]], None]] = []
        self._work, self._done = work, 0.0
        self._last = time.monotonic()
        self._begun = 0.0  # work that was done when this process began
        self._pace = 0.0  # seconds a round, smoothed
        self._sums: dict[str, tuple[int, int]] = {}  # {file of records: its size and CRC-32}
        end_whole(folder / EVENTS)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of the log.

        The records that it counts have been written to the disk.
        """
        paths = [self.folder / file for file in RECORDS if (self.folder / file).exists()]
        for path in paths:
            sync(path)
        for path in paths:
            self._sums[path.name] = _summed(path, *self._sums.get(path.name, (0, 0)))
        return {
            "curves": self.curves,
            "done": self._done,
            "sizes": {name: size for name, (size, _) in self._sums.items()},
            "checksums": {name: checksum for name, (_, checksum) in self._sums.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint, removing the records written since.

        Raises:
            ConfigError: records that the checkpoint counts are missing or damaged.
        """
        # older checkpoints have a third number
        self.curves = {n: [(r, a) for r, a, *_ in points] for n, points in state["curves"].items()}
        self._done = self._begun = state["done"]
        sizes = {self.folder / file: state["sizes"].get(file, 0) for file in RECORDS}
        for path, size in sizes.items():
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise ConfigError(
                    f"resume: {path} has {there} bytes, but the checkpoint recorded {size}: it "
                    "has been cut since; put it back, or run anew under another run-name"
                )
        checksums = state.get("checksums", {})  # older checkpoints have none
        for path, size in sizes.items():
            if not path.exists():
                continue
            os.truncate(path, size)
            found = self._sums[path.name] = _summed(path)
            if found[1] != checksums.get(path.name, found[1]):
                raise ConfigError(
                    f"resume: {path} is damaged: it is not what the checkpoint recorded; put it "
                    "back, or run anew under another run-name"
                )

    def event(self, kind: str, text: str, **more: Any) -> None:
        """Write an event, for whoever watches the run."""
        now = round(time.time(), 3)
        progress = round(self._done / self._work, 4) if self._work else 1.0
        record = {"kind": kind, "text": text, "time": now, "progress": progress}
        append(self.folder / EVENTS, record | more)
        (logger.warning if kind == "warning" else logger.info)(text)

    def failed(self, error: Exception) -> None:
        """Write that the run failed; a full disk does not hide the error.

        This package's errors are sentences for the user; others are shown with their type, too.
        """
        ours = type(error).__module__.startswith("pfedgpa_app.")
        text = f"{error}" if ours else f"{type(error).__name__}: {error}".removesuffix(": ")
        no_room = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and no_room:
            text = (
                f"{error.filename or self.folder}: {error.strerror}: make room there, then go on "
                "from the last checkpoint with resume=true"
            )
        with contextlib.suppress(OSError):
            end_whole(self.folder / EVENTS)  # the disk may have filled up in the middle of a line
            trace = "".join(traceback.format_exception(error))
            self.event("failed", text, traceback=trace, no_room=no_room)

    def advance(self, work: float) -> float:
        """Count ``work`` more rounds as done; return the seconds left at the recent pace."""
        now = time.monotonic()
        pace = (now - self._last) / work
        if self._done - self._begun <= 2:  # the first round starts the clients and says little
            self._pace = pace
        else:
            self._pace = 0.8 * self._pace + 0.2 * pace
        self._done, self._last = self._done + work, now
        return self.left()

    def left(self) -> float:
        """Return the seconds that are left at the recent pace."""
        return max(0.0, self._work - self._done) * self._pace + sum(self.making.values())

    def watch(self, federation: str, what: str, work: float = 0.0) -> Callable[[float], None]:
        """Return a function to call with the share of ``what`` done; it says so once a second.

        Args:
            work: how long it takes, in rounds, if the run's length counts it.
        """
        self.making.pop(federation, None)  # from here on, its own pace tells
        self.event("status", what)
        said = time.monotonic()
        first: tuple[float, float] | None = None  # time and share at the first call

        def tell(share: float) -> None:
            nonlocal said, first
            now = time.monotonic()
            if first is None:
                said, first = now, (now, share)
            elif now - said >= 1 and share > first[1]:
                pace = (now - first[0]) / (share - first[1])
                rest = max(0.0, self.left() - work * self._pace)  # the run's seconds after this
                said, left = now, pace * (1 - share) + rest
                self.event("progress", f"{what}: {share:.0%}  {clock(left)} left")

        return tell

    def rejected(self, name: str, when: str, client: int, reason: str) -> None:
        """Warn that a client's reply cannot be used."""
        self.event("warning", f"{name} {when}: client {client} {reason}")

    def round(
        self,
        name: str,
        server_round: int,
        participants: dict[int, dict[str, float]],
        scores: dict[int, dict[str, float]],
        loss: float,
    ) -> None:
        """Write a record for every client that trained or was evaluated in a round.

        Args:
            name: the federation's.
            participants: {client: its figures from training}, such as ``train_loss``.
            scores: {client: its figures from evaluation}, such as ``accuracy`` in percent.
            loss: the round's training loss.
        """
        records = []
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
            records.append(record)
        append(self.folder / METRICS, *records)
        for tell in self.listeners:
            tell(name, server_round, records)
        seconds_left = self.advance(1)
        text = f"{name} round {server_round}/{self.rounds}  loss {loss:.3f}"
        if scores:
            everyone = mean([s["accuracy"] for s in scores.values()])
            self.curves.setdefault(name, []).append((server_round, everyone))
            text += f"  accuracy {everyone:.1f} %"
        self.event("round", f"{text}  {clock(seconds_left)} left", federation=name, loss=loss)
