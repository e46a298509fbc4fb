"""One run: every configured method on one partition and seed, from round 1 to the last plot."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord
from flwr.serverapp import Grid

from pfedgpa_app.config.checks import without_effect
from pfedgpa_app.config.resolve import Resolved, values_of
from pfedgpa_app.core.files import write_json
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import LABEL_FLIP, NODES, Config
from pfedgpa_app.core.settings import listed
from pfedgpa_app.core.weights import Weights, own_statistics
from pfedgpa_app.data.client import (
    data_in_words,
    fingerprint,
    load_dataset,
    load_partition,
    load_schema,
)
from pfedgpa_app.data.dataset import remarks
from pfedgpa_app.diffusion import saved
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.engine.grid import LocalGrid, is_simulated, telling
from pfedgpa_app.methods import METHODS, federations, halves, name_of, rounds_class, rounds_of
from pfedgpa_app.methods.averaging import Defence
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.fine_tuning import fine_tunings
from pfedgpa_app.methods.generation import RememberedState, RememberingFedAvg
from pfedgpa_app.models.build import remarks_on_weights
from pfedgpa_app.results import plots, uploads
from pfedgpa_app.results.log import EVENTS, TABLE, RunLog, end_whole, is_done, say
from pfedgpa_app.results.tracking import Tracking, require_installed
from pfedgpa_app.runs import report
from pfedgpa_app.runs.about import MODEL, WEIGHTS, write_about
from pfedgpa_app.runs.checkpoint import CHECKPOINT
from pfedgpa_app.runs.folder import (
    CONFIG,
    USERS,
    holdings,
    keep_holdings,
    locked,
    run_folder,
    running,
)
from pfedgpa_app.runs.initial import (
    initial_weights,
    learn_nothing,
    origin,
    other_classes,
    share_little,
)
from pfedgpa_app.runs.personal import note_parts_on_nodes, weights_file
from pfedgpa_app.runs.resuming import Resuming
from pfedgpa_app.runs.summary import Summary, save_weights
from pfedgpa_app.server import privacy
from pfedgpa_app.server.joining import join
from pfedgpa_app.server.roster import Roster
from pfedgpa_app.server.strategy import Personalised
from pfedgpa_app.training.evaluation import FinalScore, FineTuning
from pfedgpa_app.training.sgd import slow_precision


def run(grid: Grid, resolved: Resolved) -> Path:
    """Run everything and return the folder of the results.

    Whatever goes wrong, the results so far are on disk, and the error is passed on to the caller.
    """
    folder = run_folder(resolved)
    if is_done(folder):
        return folder  # nothing is left to resume
    with locked(folder, running(folder)):
        if _lost_its_end(folder):
            end_whole(folder / EVENTS)
            say(folder, "done", f"results are in {folder}", 1.0)
        else:
            _run_in(folder, grid, resolved)
    return folder


def _lost_its_end(folder: Path) -> bool:
    """Whether all results are there, and only the event that says so is missing."""
    return (folder / TABLE).exists() and not (folder / CHECKPOINT).exists()


def _run_in(folder: Path, grid: Grid, resolved: Resolved) -> None:
    """Run everything in a folder that this run alone writes to."""
    config = resolved.config
    require_installed(config.track)
    privacy.check(config)
    write_json(folder / CONFIG, resolved.as_dict(), indent=2)
    shared = federations(config.method)
    evaluation = _evaluation_work(config)
    rounds = 0 if config.uploads else len(shared) * config.num_server_rounds
    evaluations = len({METHODS[m].weights_from or METHODS[m] for m in config.method})
    making = {
        federation: max(METHODS[name].making_seconds(config) for name in names)
        for federation, names in shared.items()
    }
    work = rounds + evaluations * evaluation
    log = RunLog(folder, config.num_server_rounds, work, making)
    try:
        log.event("start", f"results: {folder}", process=os.getpid())
        if config.dataset != NODES:
            log.event("data", data_in_words(config))
            keep_holdings(folder, config)
        if bad := sorted(config.malicious_clients):
            log.event("attack", _attack_in_words(config, bad), clients=bad)
        for text in (*_warnings(grid, config), *_remarks(resolved)):
            log.event("warning", text)
        if isinstance(grid, LocalGrid):
            grid.listen(partial(log.event, "warning"))
        Experiment(grid, resolved, folder, log).run_all(shared)
    except Exception as error:
        log.failed(error)
        raise
    if config.report:
        _report(folder, log)
    shutil.rmtree(folder / CHECKPOINT, ignore_errors=True)
    log.event("done", f"results are in {folder}")


def _remarks(resolved: Resolved) -> Iterator[str]:
    """Yield what the user should know of the data, and of settings that have no effect."""
    config = resolved.config
    if config.dataset == NODES:
        yield from without_effect(config, resolved.sources, own_test=False)
        return
    data = load_dataset(config)
    yield from remarks(data)
    yield from learn_nothing(config)
    yield from without_effect(config, resolved.sources, data.own_test)


def _report(folder: Path, log: RunLog) -> None:
    """Write the run's page; an error in doing so does not fail the run."""
    try:
        log.event("report", f"report: {report.write_own(folder)}")
    except Exception as error:
        log.event("warning", f"no report could be written: {type(error).__name__}: {error}")


def _evaluation_work(config: Config) -> float:
    """Estimate how long one method's final evaluation takes, as a multiple of a round.

    All clients take part in it. Fine-tunings that differ only in their number of epochs count as
    one, the longest.
    """
    most: dict[FineTuning, int] = {}
    for each in fine_tunings(config, [METHODS[name] for name in config.method]):
        way = replace(each, epochs=0)
        most[way] = max(each.epochs, most.get(way, 0))
    epochs = sum(most.values()) / config.local_epochs
    return (1 + epochs / 2) / config.fraction_train


def _attack_in_words(config: Config, malicious: Sequence[int]) -> str:
    """Say which clients are malicious, and how."""
    strength = "" if config.attack == LABEL_FLIP else f" of strength {config.attack_strength:g}"
    many = f"{len(malicious)} of {config.initial_clients} clients"
    who = listed([str(client) for client in malicious])
    return f"attack: {config.attack}{strength} by {many} ({who}); all figures are for honest ones"


def _warnings(grid: Grid, config: Config) -> Iterator[str]:
    """Yield what the user may not expect of this run."""
    if config.engine not in ("auto", "ray") and not isinstance(grid, LocalGrid):
        yield f"engine = {config.engine} is only for `pfedgpa run`; Flower runs this one itself"
    if is_simulated(grid) and (text := slow_precision(config)):
        yield text
    if config.local_dp_epsilon and config.share_label_counts:
        yield (
            "share-label-counts: clients' class counts are sent as they are; local-dp-epsilon adds "
            "noise only to weights"
        )
    for method in (METHODS[name] for name in config.method):
        if method.fine_tuning == "tuned" and not config.fine_tune_grid_epochs:
            yield (
                f"fine-tune-grid-epochs = 0: {method.title} tunes nothing, and fine-tunes by "
                "fine-tune-epochs and fine-tune-learning-rate; set fine-tune-grid-epochs=5 to let "
                "validation data choose"
            )
        if issubclass(method, Defence):
            yield from method.doubts(config)


def _groups(config: Config) -> list[int]:
    """Return every client's hidden group; 0 for all if nodes have their own data."""
    if config.dataset == NODES:
        return [0] * config.num_clients
    return [split.group for split in load_partition(config)]


def _keep_distribution(
    folder: Path,
    config: Config,
    schema: Schema,
    learned: Mapping[str, WeightDistribution | None],
    state: Any,
) -> None:
    """Write what a federation's server learned, and draw its latents, if the settings ask for it.

    The last federation that learns has the files' plain names, the others their method's, as in
    ``distribution.pfedgpa.safetensors``.

    Args:
        learned: what each of the federation's methods learned, if anything; the last counts.
        state: the federation's, which has the weights that all clients share.
    """
    every = [(method, found) for method, found in learned.items() if found is not None]
    if not every:
        return
    method, found = every[-1]
    _name_earlier(folder, method)
    if config.save_weights:
        common: Weights = state.global_weights
        beside = {name: common[name] for name in own_statistics(common, found.layout.names)}
        told = origin(config, schema) | {"method": method}
        saved.save(found, folder / saved.FILE, beside, told)
    if config.report and (places := plots.latent_places(found)):
        write_json(folder / report.LATENTS, {"method": method} | places)
        plots.latents(folder / plots.LATENTS, places, _groups(config))


def _name_earlier(folder: Path, method: str) -> None:
    """Give what another federation than that of ``method`` has learned its own method's name."""
    distribution, latents = folder / saved.FILE, folder / report.LATENTS
    if distribution.exists():
        before = str(saved.origin_of(distribution).get("method", method))
    elif latents.exists():
        before = str(json.loads(latents.read_text(encoding="utf-8"))["method"])
    else:
        return
    if before != method:  # its own are there if it was interrupted before a checkpoint
        for path in (distribution, latents, folder / plots.LATENTS):
            if path.exists():
                path.rename(path.with_stem(f"{path.stem}.{before}"))


def _save_uploads(
    folder: Path, state: RememberedState, resolved: Resolved, costs: dict[str, float]
) -> None:
    """Write a federation's uploads, and what the run's data are, without users' names."""
    held = {name: kept for name, kept in holdings(folder).items() if name != USERS}
    uploads.save(folder / uploads.FILE, state, resolved, costs, held)


def _lost_tracker(folder: Path, log: RunLog, kind: str, why: str) -> None:
    """Say that a run goes on without a dashboard, and how it can be given the run's figures."""
    words = ["pfedgpa", "export-metrics", str(folder), "--to", kind]
    text = f"track = {kind}: {why}; the run goes on without it; afterwards: {shlex.join(words)}"
    log.event("warning", text)


def _tell_start(config: Config, schema: Schema, log: RunLog) -> None:
    """Say which weights the rounds begin with, where it is another run's distribution."""
    every = map(rounds_class, federations(config.method))
    if all("start-from" in rounds.unused for rounds in every):
        return
    text = f"rounds begin with the mean of what {config.start_from} learned"
    log.event("status", f"{text}; what clients keep to themselves does not")
    for text in other_classes(config, schema):
        log.event("warning", text)


class Experiment:
    """One run: its federations, one after the other, and the methods of each."""

    def __init__(self, grid: Grid, resolved: Resolved, folder: Path, log: RunLog) -> None:
        self.resolved, self.config, self.folder, self.log = resolved, resolved.config, folder, log
        self.grid = grid
        self.record_asked: Callable[[str, int, Iterable[int]], None] = lambda *_: None
        config = self.config
        self.summary = Summary(folder, config, log)
        self.resuming = Resuming(folder, log, self.summary)
        # the federation to go on with, until its rounds begin; {} if there is none
        self.going = self.resuming.restore(config.checkpoint_every)
        own, before = config.dataset == NODES, self.resuming.partitions
        how: dict[str, Any] = {"own_data": own, "before": before, "run": self.resuming.name}
        self.roster = Roster(grid, config.num_clients, config.timeout, **how, tell=log.event)
        if own:
            self.resuming.partitions = self.roster.partitions
        self.dataset = self.roster.schema or load_schema(config)
        self.initial = initial_weights(config, self.dataset)
        remarks = share_little(config, self.dataset, self.initial)
        for text in (*remarks, *remarks_on_weights(config, self.dataset)):
            log.event("warning", text)
        if config.start_from and not self.going:
            _tell_start(config, self.dataset, log)
        self.fine_tunings = fine_tunings(config, [METHODS[name] for name in config.method])
        settings = values_of(resolved.as_dict())
        self._privacy = self._spent() if config.local_dp_epsilon else {}  # added to each row
        lost = partial(_lost_tracker, folder, log)
        self.tracking = Tracking(folder, config.track, settings, lost)
        log.listeners.append(self.tracking.round)
        if not own:
            self.roster.data = dict(fingerprint(config))
        self.resuming.check_project(self.dataset)
        write_about(folder, config, self.dataset)
        if config.save_weights and is_simulated(grid):  # a real client keeps them to itself
            self.roster.common["weights-dir"] = str(folder / WEIGHTS)
        if config.checkpoint_every and is_simulated(grid):  # clients share our disk
            self.roster.common["state-dir"] = str(self.resuming.clients)

    def _spent(self) -> dict[str, float]:
        """Return what the whole run spends of a client's privacy, ``{"epsilon_spent": …}``.

        The value is added to the rows of methods that are done, too.

        Raises:
            ConfigError: it is more than allowed.
        """
        going = self.going.get("federation", ""), self.going.get("round", 0)
        finished = self.resuming.finished
        made = privacy.Uploads(self.config, self.folder / privacy.FILE, finished, going)
        privacy.check(self.config, made)
        self.log.event("privacy", privacy.in_words(self.config, made.most))
        self.record_asked = made.record_asked
        spent = {"epsilon_spent": round(privacy.epsilon_of(self.config, made.most), 4)}
        for row in self.summary.rows.values():  # of methods done before a resumption
            row |= spent
        return spent

    def run_all(self, methods_of: dict[str, list[str]]) -> None:
        """Run all federations and write their results.

        Args:
            methods_of: {federation: the names of its methods}.
        """
        done = False
        try:
            self._run_federations(methods_of)
            self.summary.finish()
            self.tracking.results()
            done = True
        finally:
            self.tracking.close(done)

    def _run_federations(self, methods_of: dict[str, list[str]]) -> None:
        finished = self.resuming.finished
        for federation in finished:
            self.log.making.pop(federation, None)
        for federation, names in methods_of.items():
            if federation not in finished:
                self._run_federation(federation, names)
                finished.append(federation)
                if self.config.checkpoint_every:
                    self.resuming.keep({})

    def _run_federation(self, name: str, methods: list[str]) -> None:
        """Run one federation's rounds, then make and evaluate each of its methods' weights."""
        strategy = self._run_rounds(name, methods)
        state = strategy.method.state
        scores: dict[str, tuple[dict[int, FinalScore], int]] = {}
        learned = dict[str, WeightDistribution | None]()
        for method_name in methods:
            method = METHODS[method_name](self.config, state)
            weights = self._make_and_evaluate(method_name, method, strategy, scores)
            if self.config.join_clients:
                curve, sent = join(strategy, method)
                self.summary.add_joined(method_name, method, curve)
                self._save(method_name, method, weights | sent)
            learned[method_name] = halves.learned(method_name, method)
        _keep_distribution(self.folder, self.config, self.dataset, learned, state)

    def _run_rounds(self, name: str, methods: list[str]) -> Personalised:
        """Run one federation's rounds, or restore them, and return its strategy."""
        config, rounds = self.config, self.config.num_server_rounds
        going, self.going = self.going, {}
        kinds = [rounds_class(each) for each in (name, *methods)]
        if (config.save_uploads or config.uploads) and name == name_of(RememberingFedAvg):
            kinds.append(RememberingFedAvg)
        kind = rounds_of(kinds)
        state = halves.begun(name, kind, config, self.initial)
        if config.checkpoint_every:
            self.resuming.check(state)
        if going:
            state = self.resuming.state(going["node"], state)
        if config.save_uploads and kind is RememberingFedAvg:
            uploads.check_whole(state)

        def keep(server_round: int) -> None:
            every = config.checkpoint_every
            if every and (server_round % every == 0 or server_round == rounds):
                now = {"federation": name, "round": server_round, "state": method.state}
                keeping = sorted(client for of, client in self.roster.keeping if of == name)
                self.resuming.keep(now | {"costs": strategy.costs(), "keeping": keeping})

        classes = len(self.dataset.classes)
        method = kind(config, state)
        record = partial(self.record_asked, name)
        strategy = Personalised(
            method, name, self.roster, config, self.log, self.initial, classes, keep, record
        )
        if going:
            strategy.restore(going["costs"], going["round"])
            self.roster.keeping |= {(name, client) for client in going["keeping"]}
        if config.uploads:
            path = user_path(config.uploads).absolute()
            strategy.restore(uploads.load(path, state, self.resolved))
        elif strategy.done < rounds:
            strategy.start(
                grid=self.roster.grid,
                initial_arrays=ArrayRecord(self.initial),
                num_rounds=rounds - strategy.done,
                timeout=config.timeout,
            )
        if config.save_uploads and kind is RememberingFedAvg:
            _save_uploads(self.folder, state, self.resolved, strategy.costs())
        return strategy

    def _make_and_evaluate(
        self,
        name: str,
        method: Personaliser[Any],
        strategy: Personalised,
        scores: dict[str, tuple[dict[int, FinalScore], int]],
    ) -> dict[int, Weights]:
        """Make one method's weights by client, evaluate them and add the result to the summary.

        Args:
            scores: {method whose weights have been evaluated: (its clients' scores, bytes sent down
                for it)}; methods that evaluate the same weights share an entry. A new one is added.
        """
        text = f"{method.title}: making clients' weights"
        method.progress = self.log.watch(strategy.name, text)
        started = time.perf_counter()
        weights = halves.personalised(name, method, self.initial, strategy.honest)
        seconds = time.perf_counter() - started
        self._save(name, method, weights)
        source = name_of(method.weights_from) if method.weights_from else name
        if source not in scores:
            work = _evaluation_work(self.config)
            text = f"{method.title}: evaluating clients' weights"
            tell = self.log.watch(strategy.name, text, work)
            references = halves.references(name, method, weights)
            with telling(self.grid, tell):
                scores[source] = strategy.evaluator.final(
                    name, weights, references, self.fine_tunings
                )
            self.log.advance(work)
        counted, hand_over = scores[source]
        if self.config.save_weights and not is_simulated(self.grid):
            note_parts_on_nodes(self.folder, name, counted)
        self.summary.add(
            name,
            method,
            strategy,
            counted,
            self.fine_tunings,
            dataset=self.dataset.name,
            server_seconds=round(strategy.server_seconds + seconds, 3),
            bytes_up=strategy.bytes_up,
            bytes_down=strategy.bytes_down + hand_over,
            **self._privacy,
        )
        return weights

    def _save(self, name: str, method: Personaliser[Any], weights: dict[int, Weights]) -> None:
        """Write clients' weights to the run's folder, if the settings ask for it."""
        if self.config.save_weights:
            path = weights_file(self.folder, name)
            about = {"method": name, "model": (self.folder / MODEL).read_text(encoding="utf-8")}
            save_weights(path, weights, getattr(method.state, "global_weights", {}), about)
