"""A run's checkpoints: what a killed run needs to go on, and whether all of it is still there."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pfedgpa_app.client import memory
from pfedgpa_app.core.files import checksum
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.results.log import METRICS, RunLog
from pfedgpa_app.runs.checkpoint import Checkpoint, CheckpointError, encode
from pfedgpa_app.runs.personal import WEIGHTS, changed_code, read_about
from pfedgpa_app.runs.summary import Summary

CHECKPOINT = "checkpoint"


class Resuming:
    """Keeps what a run has done, and restores it.

    Attributes:
        name: what clients know the run by, after a resumption, too.
        finished: the federations that are done.
        partitions: of the clients whose data are their nodes' own, in the clients' order.
    """

    def __init__(self, folder: Path, log: RunLog, summary: Summary) -> None:
        self.log, self.summary = log, summary
        self.name = secrets.token_hex(8)
        self.finished: list[str] = []
        self.partitions: list[int] = []
        self.clients = folder / CHECKPOINT / "clients"  # what they keep, if they are here
        self._checkpoint = Checkpoint(folder / CHECKPOINT)
        self._checksums: dict[str, int] = {}  # of clients' files
        self._weights: dict[str, int] = {}  # checksums of the files of weights that are done
        self._restored = False

    def restore(self, every: int) -> dict[str, Any]:
        """Go on after the last checkpoint, if there is one.

        Args:
            every: rounds between two checkpoints from now on; 0: no more.

        Returns:
            of the federation that was going on: its name, how many rounds of it are done, what
            they cost, and a ``node`` of its state for ``state``; {} between two federations.

        Raises:
            ConfigError: the checkpoint cannot be used, or is to be the last.
        """
        try:
            kept = self._checkpoint.read()
            if not kept:
                if (self.log.folder / METRICS).exists():
                    self.log.event("warning", "no checkpoint was kept: the run begins anew")
                self.log.restore({"curves": {}, "done": 0.0, "sizes": {}})
                return {}
            if not every:  # nor would clients keep what they go on from
                raise ConfigError(
                    "checkpoint-every = 0: a run that goes on keeps checkpoints; give 1 or more"
                )
            kept = {"weights": encode({}, lambda _, frozen: [])} | kept  # older ones have none
            names = ("name", "finished", "rows", "outcomes", "log", "weights")
            values = {name: self._checkpoint.restore(kept[name]) for name in names}
            self.name, self.finished = values["name"], values["finished"]
            self.partitions = self._checkpoint.restore(
                kept.get("partitions", [])
            )  # older ones have none
            going = {}
            if "state" in kept:
                going = {"federation": kept["federation"], "round": kept["round"]}
                going["costs"] = self._checkpoint.restore(kept["costs"])
                going["node"] = kept["state"]
                self._check_clients(self._checkpoint.restore(kept["clients"]))
                memory.forget_after(self._kept, going["federation"], going["round"])
        except (CheckpointError, KeyError) as error:
            raise _refused(error) from error
        self.summary.rows, self.summary.outcomes = values["rows"], values["outcomes"]
        self.log.restore(values["log"])
        after = "round {round} of {federation}".format_map(going) if going else ""
        self.log.event("resumed", f"the run goes on after {after or ', '.join(self.finished)}")
        for text in self._lost(values["weights"]):
            self.log.event("warning", text)
        self._restored = True
        return going

    def warn_of_edits(self) -> None:
        """Say which of the user's own files, by now imported, a run that goes on had otherwise."""
        if not self._restored:
            return
        with contextlib.suppress(ConfigError):  # it is written anew by a run that goes on
            about = read_about(self.log.folder)
            for text in dict.fromkeys(changed_code(self.log.folder, about)):
                self.log.event("warning", text)

    def state(self, node: Any, begun: Any) -> Any:
        """A federation's state, ``begun`` being the one before its first round.

        Raises:
            ConfigError: it is damaged.
        """
        try:
            return self._checkpoint.restore(node, begun)
        except CheckpointError as error:
            raise _refused(error) from error

    @staticmethod
    def check(state: Any) -> None:
        """Refuse a federation's state that a checkpoint cannot hold.

        Raises:
            ConfigError: why not.
        """
        encode(state, lambda _, frozen: [])

    def keep(self, going: dict[str, Any]) -> None:
        """Replace the checkpoint; a disk that is full does not end the run.

        Args:
            going: of the federation that goes on; {} between two.
        """
        try:
            every = {
                "name": self.name,
                "finished": self.finished,
                "partitions": self.partitions,
                "rows": self.summary.rows,
                "outcomes": self.summary.outcomes,
                "log": self.log.state(),
                "clients": self._client_files(going.get("federation", "")),
                "weights": self._weight_files(),
            }
            self._checkpoint.save(every | going)
        except OSError as error:
            text = f"no checkpoint could be written, the run goes on without: {error}"
            self.log.event("warning", text)

    @property
    def _kept(self) -> Path:
        """Where clients keep what is theirs, if they are here."""
        return self.clients / f"run-{self.name}"

    def _client_files(self, federation: str) -> dict[str, int]:
        """{file: its checksum} of what clients have kept last; a file is never changed."""
        files = memory.newest(self._kept, federation)
        known = self._checksums
        self._checksums = {f.name: known.get(f.name) or checksum(f) for f in files}
        return self._checksums

    def _weight_files(self) -> dict[str, int]:
        """{file: its checksum} of clients' weights that are made; they change no more."""
        folder = self.log.folder / WEIGHTS
        made = [folder / f"{method}.safetensors" for method in self.summary.rows]
        made += [file for name in self.finished for file in folder.glob(f"{name}.*-*.safetensors")]
        for file in made:
            if file.name not in self._weights and file.is_file():
                self._weights[file.name] = checksum(file)
        return self._weights

    def _lost(self, weights: dict[str, int]) -> Iterator[str]:
        """Which of ``weights`` are no more what they were; nothing makes them again."""
        for name, expected in weights.items():
            path = self.log.folder / WEIGHTS / name
            if wrong := _harm(path, expected):
                yield (
                    f"{path}, weights of a method that is done, is {wrong}: put it back; the "
                    "figures are whole, but these weights are not made again"
                )

    def _check_clients(self, files: dict[str, int]) -> None:
        """Refuse to go on without what clients had kept: their results would be others.

        Raises:
            CheckpointError: it is not there, or not what it was.
        """
        for name, expected in files.items():
            path = self._kept / name
            if wrong := _harm(path, expected):
                raise CheckpointError(
                    f"{path}, what a client kept for its next round, is {wrong}: put it back, "
                    "or run anew under another run-name"
                )


def _refused(error: Exception) -> ConfigError:
    """What the user reads where a checkpoint cannot be used."""
    advice = "" if "run anew" in str(error) else "; put it back, or run anew under another run-name"
    return ConfigError(f"resume: {error}{advice}")


def _harm(path: Path, expected: int) -> str:
    """What has become of a file whose checksum was ``expected``; "" if it is as it was."""
    if not path.exists():
        return "missing"
    return "" if checksum(path) == expected else "damaged"
