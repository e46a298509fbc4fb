"""A run's checkpoints: what a killed run needs to go on, and whether all of it is still there."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pfedgpa_app.client import memory
from pfedgpa_app.core.files import checksum
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.results.log import METRICS, RunLog
from pfedgpa_app.runs.about import MODEL, WEIGHTS, changed_code, read_about
from pfedgpa_app.runs.checkpoint import (
    CHECKPOINT,
    Checkpoint,
    CheckpointError,
    encode,
)
from pfedgpa_app.runs.personal import weights_file
from pfedgpa_app.runs.summary import Summary

_ABSENT: dict[str, Any] = {"weights": {}, "partitions": [], "keeping": []}


class Resuming:
    """Keeps what a run has done, and restores it.

    Attributes:
        name: by which clients know the run; it stays the same when the run is resumed.
        finished: the federations that are done.
        partitions: the partitions of clients whose data are their nodes' own, in the clients'
            order.
    """

    def __init__(self, folder: Path, log: RunLog, summary: Summary) -> None:
        self.log, self.summary = log, summary
        self.name = secrets.token_hex(8)
        self.finished: list[str] = []
        self.partitions: list[int] = []
        self.clients = folder / CHECKPOINT / "clients"  # what clients keep, if they share our disk
        self._checkpoint = Checkpoint(folder / CHECKPOINT)
        self._checksums: dict[str, int] = {}  # of the files that clients keep
        self._weights: dict[str, int] = {}  # checksums of the weights of methods that are done
        self._restored = False

    def restore(self, every: int) -> dict[str, Any]:
        """Go on after the last checkpoint, if there is one.

        Args:
            every: rounds between two checkpoints from now on; 0: none.

        Returns:
            of the federation that was going on: its name, how many of its rounds are done, what
            they cost, the clients that keep something for it, and ``node``, its encoded state, to
            be given to ``state``; {} between two federations or without a checkpoint.

        Raises:
            ConfigError: the checkpoint cannot be used, or ``every`` is 0.
        """
        try:
            kept = self._checkpoint.read()
            if not kept:
                if (self.log.folder / METRICS).exists():
                    self.log.event("warning", "no checkpoint was kept: the run begins anew")
                self.log.restore({"curves": {}, "done": 0.0, "sizes": {}})
                return {}
            if not every:  # clients would not keep their state either
                raise ConfigError(
                    "checkpoint-every = 0: a resumed run keeps checkpoints; set 1 or more"
                )
            # older checkpoints have none of these
            kept = {n: encode(_ABSENT[n], lambda _, frozen: []) for n in _ABSENT} | kept
            names = ("name", "finished", "rows", "outcomes", "log", *_ABSENT)
            values = {name: self._checkpoint.restore(kept[name]) for name in names}
            self.name, self.finished = values["name"], values["finished"]
            self.partitions = values["partitions"]
            going = {}
            if "state" in kept:
                going = {"federation": kept["federation"], "round": kept["round"]}
                going["costs"] = self._checkpoint.restore(kept["costs"])
                going["keeping"] = values["keeping"]
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

    def check_project(self, schema: Schema) -> None:
        """Compare a resumed run's data and own code with those that it began with.

        Each imported file of the user's own that has changed since is warned of.

        Raises:
            ConfigError: the data have other classes now, or examples of another shape; or what is
                kept of them cannot be read.
        """
        if not self._restored or not (self.log.folder / MODEL).exists():  # it is written again
            return
        about = read_about(self.log.folder)
        now = schema if about.schema.columns else replace(schema, columns=())  # earlier had none
        if about.schema.as_dict() != now.as_dict():
            raise ConfigError(
                f"resume: the run began with {about.schema.examples()}, but the data now are "
                f"{schema.examples()}: restore them, or run anew under another run-name"
            )
        for text in dict.fromkeys(changed_code(self.log.folder, about)):
            self.log.event("warning", text)

    def state(self, node: Any, begun: Any) -> Any:
        """Decode a federation's state.

        Args:
            node: the encoded state, as ``restore`` returned it.
            begun: the state before the federation's first round.

        Raises:
            ConfigError: the state is damaged.
        """
        try:
            return self._checkpoint.restore(node, begun)
        except CheckpointError as error:
            raise _refused(error) from error

    @staticmethod
    def check(state: Any) -> None:
        """Refuse a federation's state that a checkpoint cannot hold.

        Raises:
            ConfigError: says why not.
        """
        encode(state, lambda _, frozen: [])

    def keep(self, going: dict[str, Any]) -> None:
        """Replace the checkpoint; if the disk is full, the run goes on without one, with a warning.

        Args:
            going: the name, round, state and costs of the federation that is going on, and the
                clients that keep something for it; {} between two.
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
            text = f"no checkpoint could be written, the run goes on without one: {error}"
            self.log.event("warning", text)

    @property
    def _kept(self) -> Path:
        """The folder in which clients of this run keep their state, if they share our disk."""
        return self.clients / f"run-{self.name}"

    def _client_files(self, federation: str) -> dict[str, int]:
        """Return {file: its checksum} of what clients kept last; such a file is never changed."""
        files = memory.newest(self._kept, federation)
        known = self._checksums
        self._checksums = {f.name: known.get(f.name) or checksum(f) for f in files}
        return self._checksums

    def _weight_files(self) -> dict[str, int]:
        """Return {file: its checksum} of clients' weights that are made and will not change."""
        files = [weights_file(self.log.folder, method) for method in self.summary.rows]
        for federation in self.finished:  # what clients left beside them
            files += (self.log.folder / WEIGHTS).glob(f"{federation}.*-*.safetensors")
        for file in files:
            if file.name not in self._weights and file.is_file():
                self._weights[file.name] = checksum(file)
        return self._weights

    def _lost(self, weights: dict[str, int]) -> Iterator[str]:
        """Yield a warning for each file of ``weights`` that is missing or damaged."""
        for name, expected in weights.items():
            path = self.log.folder / WEIGHTS / name
            if wrong := _harm(path, expected):
                yield (
                    f"{path}, weights of a method that is done, is {wrong}: put it back; the "
                    "figures are complete, but these weights are not made again"
                )

    def _check_clients(self, files: dict[str, int]) -> None:
        """Refuse to go on without what clients had kept: their results would differ.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        for name, expected in files.items():
            path = self._kept / name
            if wrong := _harm(path, expected):
                raise CheckpointError(
                    f"{path}, what a client kept for its next round, is {wrong}: put it back, "
                    "or run anew under another run-name"
                )


def _refused(error: Exception) -> ConfigError:
    """Return the error for the user where a checkpoint cannot be used."""
    advice = "" if "run anew" in str(error) else "; put it back, or run anew under another run-name"
    return ConfigError(f"resume: {error}{advice}")


def _harm(path: Path, expected: int) -> str:
    """Say what is wrong with a file, whose checksum was ``expected``; "" if nothing is."""
    if not path.exists():
        return "missing"
    return "" if checksum(path) == expected else "damaged"
