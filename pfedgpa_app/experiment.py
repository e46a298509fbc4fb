"""One run: every configured method on one partition and seed, from round 1 to the last plot."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from safetensors.torch import save_file

from pfedgpa_app import memory
from pfedgpa_app.checkpoint import Checkpoint, CheckpointError
from pfedgpa_app.config import Config, Resolved
from pfedgpa_app.data import NODES
from pfedgpa_app.data.client import Schema, load_partition, load_schema
from pfedgpa_app.diffusion import saved
from pfedgpa_app.engine.grid import LocalGrid, is_simulated
from pfedgpa_app.files import checksum, write_text
from pfedgpa_app.folder import CONFIG, locked, run_folder, running
from pfedgpa_app.methods import federation_of, method_class
from pfedgpa_app.methods.base import Method
from pfedgpa_app.models import Weights, build, network_name, weights_of
from pfedgpa_app.results import plots, uploads
from pfedgpa_app.results.log import SUMMARY, RunLog, is_done, mean
from pfedgpa_app.results.tables import Outcome, outcome, summary_entry, text_table
from pfedgpa_app.roster import Roster
from pfedgpa_app.settings import ConfigError, user_path
from pfedgpa_app.strategy import FinalScore, Personalised, ways
from pfedgpa_app.training import bfloat16_is_emulated, device_for

CHECKPOINT = "checkpoint"


def federations(config: Config) -> dict[str, list[str]]:
    """{federation: its methods}: methods whose rounds are alike run them once."""
    shared: dict[str, list[str]] = {}
    for name in config.method:
        shared.setdefault(federation_of(name, config), []).append(name)
    return shared


def save_weights(path: Path, weights: dict[int, Weights], common: Weights) -> None:
    """Clients' weights as ``client-3/NAME``; the common ones once, as ``global/NAME``."""
    tensors: Weights = {}
    for client, mine in weights.items():
        prefix = "global" if mine is common else f"client-{client}"
        tensors |= {f"{prefix}/{name}": tensor.clone() for name, tensor in mine.items()}
    if tensors:
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)


def peak_memory() -> int:
    """The most bytes that this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def initial_weights(config: Config, schema: Schema) -> Weights:
    """What every method starts from: by the seed, or a saved distribution's mean.

    Raises:
        ValueError: no network fits the images.
        ConfigError: ``start-from`` cannot be read, or is of another network.
    """
    network = network_name(config.model, schema.shape)
    initial = weights_of(build(network, len(schema.classes), config.seed))
    return warm_start(Path(config.start_from), initial) if config.start_from else initial


def warm_start(path: Path, initial: Weights) -> Weights:
    """The mean of a saved distribution, in place of ``initial``; it may hold the last layers only.

    Raises:
        ConfigError: it cannot be read, or was learned from another network's weights.
    """
    try:
        start = saved.load(user_path(path).absolute())
    except ValueError as error:
        raise ConfigError(f"start-from = {str(path)!r}: {error}") from error
    mean = start.layout.unflatten(start.anchor)
    for name, tensor in mean.items():
        if name not in initial or tensor.shape != initial[name].shape:
            raise ConfigError(
                f"start-from = {str(path)!r}: has {name} of shape {list(tensor.shape)}, which this "
                "run's network has not"
            )
    return initial | mean


def _warnings(grid: Grid, config: Config) -> Iterator[str]:
    """What the user may not expect of such a run."""
    if config.engine not in ("auto", "ray") and not isinstance(grid, LocalGrid):
        yield f"engine = {config.engine} is for `pfedgpa run`; Flower carries this run itself"
    here = config.precision == "bfloat16" and is_simulated(grid)
    if here and bfloat16_is_emulated(device_for(config.device)):
        yield (
            "precision = bfloat16: this CPU has no instructions for it, training may take "
            "ten times as long as with precision=float32"
        )


def run(grid: Grid, resolved: Resolved) -> Path:
    """Run everything; returns the folder of the results.

    Whatever goes wrong, results so far are on disk and the error goes on to the caller.
    """
    folder = run_folder(resolved)
    if is_done(folder):
        return folder  # nothing is left to resume
    with locked(folder, running(folder)):
        _carry_out(grid, resolved, folder)
    return folder


def _carry_out(grid: Grid, resolved: Resolved, folder: Path) -> None:
    """The same, in a folder that is this run's alone."""
    config = resolved.config
    write_text(folder / CONFIG, json.dumps(resolved.as_dict(), indent=2) + "\n")
    shared = federations(config)
    evaluations = len({method_class(m).weights_from or m for m in config.method})
    # all clients take part in it; ways that differ in epochs share them
    per_evaluation = 1 + sum(way.epochs for way in ways(config)) / config.local_epochs / 2
    per_evaluation /= config.fraction_train
    rounds = 0 if config.uploads else len(shared) * config.num_server_rounds
    work = rounds + evaluations * per_evaluation
    making = {
        federation: max(method_class(name).making_seconds(config) for name in names)
        for federation, names in shared.items()
    }
    log = RunLog(folder, config.num_server_rounds, work, making)
    try:
        log.event("start", f"results: {folder}", process=os.getpid())
        for text in _warnings(grid, config):
            log.event("warning", text)
        _Run(grid, resolved, folder, log, per_evaluation).everything(shared)
    except Exception as error:
        log.failed(error)
        raise
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    log.event("done", f"results are in {folder}")


class _Run:
    """What the steps of one run share."""

    def __init__(
        self, grid: Grid, resolved: Resolved, folder: Path, log: RunLog, per_evaluation: float
    ) -> None:
        self.resolved, self.folder, self.log = resolved, folder, log
        config = self.config = resolved.config
        self.per_evaluation = per_evaluation
        self.rows: dict[str, dict[str, Any]] = {}
        self.results: dict[str, Outcome] = {}
        self.name = secrets.token_hex(8)  # what clients know the run by, after a resumption, too
        self.checkpoint = Checkpoint(folder / CHECKPOINT)
        self.finished: list[str] = []  # federations
        self._checksums: dict[str, int] = {}  # of clients' files
        self.going: dict[str, Any] = {}  # the checkpoint, as long as its federation goes
        own = config.dataset == NODES
        self.roster = Roster(grid, config.num_clients, config.timeout, own)
        self.dataset = self.roster.schema or load_schema(config)
        self.initial = initial_weights(config, self.dataset)
        self._resume()
        self.roster.common["run"] = self.name
        if config.checkpoint_every and is_simulated(grid):  # clients see our files
            self.roster.common["state-dir"] = str(self._clients)

    def _resume(self) -> None:
        """Be where the last checkpoint is, if there is one."""
        try:
            kept = self.checkpoint.read()
            if not kept:
                self.log.go_on({"curves": {}, "rejections": 0, "done": 0.0, "sizes": {}})
                return
            names = ("name", "finished", "rows", "results", "log")
            values = {name: self.checkpoint.restore(kept[name]) for name in names}
            self.name = values["name"]
            if "state" in kept:
                federation, done = kept["federation"], kept["round"]
                begun = method_class(federation).begin(self.config, self.initial)
                self.going = {
                    "state": self.checkpoint.restore(kept["state"], begun),
                    "costs": self.checkpoint.restore(kept["costs"]),
                    "round": done,
                }
                self._check_clients(self.checkpoint.restore(kept["clients"]))
        except (CheckpointError, KeyError) as error:
            raise ConfigError(f"resume: {error}") from error
        self.finished = values["finished"]
        self.rows, self.results = values["rows"], values["results"]
        self.log.go_on(values["log"])
        after = f"round {done} of {federation}" if self.going else ", ".join(self.finished)
        self.log.event("resumed", f"the run goes on after {after}")

    def _keep(self, going: dict[str, Any]) -> None:
        """Replace the checkpoint; a disk that is full does not end the run."""
        try:
            every = {
                "name": self.name,
                "finished": self.finished,
                "rows": self.rows,
                "results": self.results,
                "log": self.log.state(),
                "clients": self._client_files(going.get("federation", "")),
            }
            self.checkpoint.save(every | going)
        except OSError as error:
            text = f"no checkpoint could be written, the run goes on without: {error}"
            self.log.event("warning", text)

    @property
    def _clients(self) -> Path:
        """Where clients keep their state, if they are on this machine."""
        return self.folder / CHECKPOINT / "clients"

    def _client_files(self, federation: str) -> dict[str, int]:
        """{file: its checksum} of what clients have kept last; a file is never changed."""
        files = memory.newest(self._clients / f"run-{self.name}", federation)
        known = self._checksums
        self._checksums = {f.name: known.get(f.name) or checksum(f) for f in files}
        return self._checksums

    def _check_clients(self, files: dict[str, int]) -> None:
        """Refuse to go on without what clients had kept: their results would be others.

        Raises:
            CheckpointError: it is not there, or not what it was.
        """
        for name, expected in files.items():
            path = self._clients / f"run-{self.name}" / name
            wrong = "damaged" if path.exists() else "missing"
            if wrong == "missing" or checksum(path) != expected:
                raise CheckpointError(
                    f"{path}, what a client kept for its next round, is {wrong}: put it back, "
                    "or run anew under another run-name"
                )

    def everything(self, federations: dict[str, list[str]]) -> None:
        for federation in self.finished:
            self.log.making.pop(federation, None)
        for federation, names in federations.items():
            if federation not in self.finished:
                self.federation(federation, names)
                self.finished.append(federation)
                if self.config.checkpoint_every:
                    self._keep({})
        rows = [self.rows[name] for name in self.config.method]
        results = {name: self.results[name] for name in self.config.method}
        plots.accuracy_over_rounds(self.folder / "accuracy.png", self.log, results)
        plots.before_and_after(self.folder / "clients.png", results)
        table = text_table(rows)
        write_text(self.folder / "table.md", table + "\n")
        self.log.event("table", table)

    def federation(self, name: str, methods: list[str]) -> None:
        """Run one federation's rounds, then make and evaluate each of its methods' weights."""
        runner_class = method_class(name)
        going, self.going = self.going, {}
        state = going["state"] if going else runner_class.begin(self.config, self.initial)

        def keep(server_round: int) -> None:
            every = self.config.checkpoint_every
            if every and (server_round % every == 0 or server_round == rounds):
                self._keep(
                    {
                        "federation": name,
                        "round": server_round,
                        "state": state,
                        "costs": strategy.costs(),
                    }
                )

        rounds = self.config.num_server_rounds
        strategy = Personalised(
            runner_class(self.config, state),
            name,
            self.roster,
            self.config,
            self.log,
            len(self.dataset.classes),
            keep,
        )
        if going:
            strategy.go_on(going["costs"], going["round"])
        if self.config.uploads:
            path = user_path(self.config.uploads).absolute()
            state, costs = uploads.load(path, state, self.resolved)
            strategy.go_on(costs)
        elif strategy.done < rounds:
            strategy.start(
                grid=self.roster.grid,
                initial_arrays=ArrayRecord(self.initial),
                num_rounds=rounds - strategy.done,
                timeout=self.config.timeout,
            )
        if self.config.save_uploads and name == "fedavg":
            uploads.save(self.folder / uploads.FILE, state, self.resolved, strategy.costs())
        scores: dict[str, tuple[dict[int, FinalScore], int]] = {}
        for method_name in methods:
            method = method_class(method_name)(self.config, state)
            method.progress = self.log.watch(name, f"{method.title}: making clients' weights")
            started = time.perf_counter()
            weights = method.personalise()
            weights = {c: mine for c, mine in weights.items() if c in strategy.honest}
            seconds = time.perf_counter() - started
            if self.config.save_weights:
                save_weights(
                    self.folder / "weights" / f"{method_name}.safetensors",
                    weights,
                    getattr(state, "global_weights", {}),
                )
            source = method.weights_from or method_name
            if source not in scores:
                self.log.event("status", f"{method.title}: evaluating clients' weights")
                references = {c: r for c in weights if (r := method.reference(c)) is not None}
                scores[source] = strategy.finish(weights, references, method_name)
                self.log.advance(self.per_evaluation)
            self.record(method_name, method, strategy, scores[source], seconds)
            if self.config.join_clients:
                self.join(method_name, method, strategy)
        fitted = getattr(state, "fitted", None)
        if fitted is not None:
            if self.config.save_weights:
                saved.save(fitted, self.folder / saved.FILE)
            plots.latents(self.folder / "latents.png", fitted, self._groups())

    def _groups(self) -> list[int]:
        """Every client's hidden group; with data of their own, nobody knows any."""
        if self.config.dataset == NODES:
            return [0] * self.config.num_clients
        return [split.group for split in load_partition(self.config)]

    def join(self, name: str, method: Method[Any], strategy: Personalised) -> None:
        """Let the clients that were held back join; their curve goes into the summary."""
        curve = strategy.join(method)
        accuracies = [round(mean(list(scores.values())), 4) for scores in curve]
        self.rows[name]["accuracy_of_joining_clients"] = accuracies
        with (self.folder / "joining.jsonl").open("a", encoding="utf-8") as out:
            for iteration, scores in enumerate(curve):
                for client, accuracy in scores.items():
                    record = {"method": name, "iteration": iteration, "client": client}
                    out.write(json.dumps(record | {"accuracy": accuracy}) + "\n")
        shown = " → ".join(f"{accuracy:.1f}" for accuracy in accuracies)
        self.log.event("joined", f"{method.title}: clients that join: {shown} %")
        self._write_summary()

    def record(
        self,
        name: str,
        method: Method[Any],
        strategy: Personalised,
        scored: tuple[dict[int, FinalScore], int],
        seconds: float,
    ) -> None:
        """Add the method to the summary, which is on disk after each method."""
        scores, hand_over = scored
        result = outcome(scores, type(method), self.config)
        last_round = set(strategy.sample(self.config.num_server_rounds))
        took_part = [
            a for c, a in zip(result.clients, result.before, strict=True) if c in last_round
        ]
        accuracies = {r: a for r, a, _ in self.log.curves.get(strategy.name, [])}
        peak = max(accuracies.values(), default=0.0)
        soon = [r for r, a in accuracies.items() if a >= 0.95 * peak]
        last_five = [a for r, a, _ in self.log.curves.get(strategy.name, [])][-5:]
        self.results[name] = result
        self.rows[name] = summary_entry(
            name,
            type(method),
            result,
            self.config,
            dataset=self.dataset.name,
            accuracy_before_ft_participants=round(mean(took_part), 4),
            accuracy_mean_of_last_five_rounds=(
                round(mean(last_five), 4) if last_five and name == strategy.name else None
            ),
            rounds_to_95_percent_of_peak=(min(soon) if soon and name == strategy.name else None),
            server_seconds=round(strategy.server_seconds + seconds, 3),
            peak_memory_mib=round(peak_memory() / 2**20, 1),
            bytes_up=strategy.bytes_up,
            bytes_down=strategy.bytes_down + hand_over,
            **method.report(),
        )
        self.log.event(
            "method",
            f"{method.title}: {result.before.mean():.1f} % before fine-tuning, "
            f"{result.after.mean():.1f} % after",
        )
        with (self.folder / "clients.jsonl").open("a", encoding="utf-8") as out:
            for row, client in enumerate(result.clients):
                record = {
                    "method": name,
                    "client": client,
                    "before_ft": result.before[row],
                    "after_ft": result.after[row],
                    "kept": result.kept[row],
                }
                out.write(json.dumps(record) + "\n")
        self._write_summary()

    def _write_summary(self) -> None:
        summary = [self.rows[n] for n in self.config.method if n in self.rows]
        write_text(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")
