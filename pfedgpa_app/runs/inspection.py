"""Describe, in lines of text, a run's folder, its checkpoint and its distribution."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from pfedgpa_app.config.checks import RUN_CONFIG
from pfedgpa_app.config.parse import argument, in_toml
from pfedgpa_app.config.resolve import values_of
from pfedgpa_app.core.sections import NODES
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.diffusion import saved
from pfedgpa_app.results.log import EVENTS, SUMMARY, Records, is_done, last_event, rows_of
from pfedgpa_app.results.tables import text_table
from pfedgpa_app.runs.about import runs_below
from pfedgpa_app.runs.checkpoint import CHECKPOINT, Checkpoint, CheckpointError
from pfedgpa_app.runs.folder import CONFIG, HOLDINGS, is_running
from pfedgpa_app.runs.reading import OF_ITS_PLACE, Run, command_of, files_named

MOST_NAMED = 20  # clients whose users are named


def lines_about(path: Path) -> list[str]:
    """Describe a run's folder or a distribution's file, a line for each fact.

    Raises:
        ConfigError: ``path`` is neither, or is damaged.
    """
    if (path / CONFIG).is_file():
        return list(_run(path))
    if path.is_file():
        return list(_distribution(path))
    if several := runs_below(path):
        raise ConfigError(f"{path}: {several}")
    kind = "a folder without a run" if path.is_dir() else "neither a file nor a folder"
    raise ConfigError(f"{path}: is {kind}: give a run's folder, or a distribution.safetensors")


def _run(folder: Path) -> Iterator[str]:
    run = Run(folder.absolute())  # a folder given as . has a name, too
    settings = values_of(run.settings)
    methods = ", ".join(settings["method"])
    yield f"run {run.folder.name}: {methods} on {settings['dataset']}"
    held = "data of their own" if settings["dataset"] == NODES else settings["partition"]
    yield (
        f"{settings['num-clients']} clients, {held}; {settings['num-server-rounds']} rounds, "
        f"{run.in_each_round()}; seed {settings['seed']}"
    )
    if run.users:
        named = "; ".join(map(run.named, range(len(run.users))[:MOST_NAMED]))
        more = f"; …, all in {HOLDINGS}" if len(run.users) > MOST_NAMED else ""
        yield f"clients by their users: {named}{more}"
    yield _state(folder)
    yield from _checkpoint(run)
    for path in files_named(saved.FILE, folder):
        yield from _distribution(path)
    if (folder / SUMMARY).is_file() and is_done(folder):
        yield from ("", text_table(rows_of(folder)))


def _state(folder: Path) -> str:
    starts = [e["time"] for e in Records(folder / EVENTS).new() if e.get("kind") == "start"]
    day = time.strftime("%Y-%m-%d %H:%M", time.localtime(starts[0])) if starts else "unknown"
    last = last_event(folder)
    text, progress = last.get("text", "nothing"), last.get("progress", 0.0)
    if is_done(folder):
        state = "done"
    elif is_running(folder):
        state = f"running, {progress:.0%} done; last message: {text}"
    else:
        state = f"stopped, {progress:.0%} done; last message: {text}"
    return f"started {day}; {state}"


def _checkpoint(run: Run) -> Iterator[str]:
    place = run.folder / CHECKPOINT
    if not place.is_dir():
        return
    try:
        kept = Checkpoint(place).read()
    except CheckpointError as error:
        yield f"checkpoint: cannot be used: {error}"
        return
    if not kept:
        return
    size = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    where = "a federation's last round"
    if "state" in kept:
        where = f"{kept['federation']} round {kept['round']}"
    yield f"checkpoint: after {where}, {size / 1e6:.1f} MB; to continue: {_resuming(run)}"


def _resuming(run: Run) -> str:
    """The command that resumes a run."""
    if run.settings["dataset"]["value"] == NODES:
        again = shlex.quote(in_toml({"resume": True, "run-name": run.folder.name}))
        return f"flwr run FOLDER SUPERLINK --stream --run-config {again}, as when it began"
    place = {name: run.settings[name] for name in OF_ITS_PLACE if name in run.settings}
    words = [f"{n}={argument(e['value'])}" for n, e in place.items() if e["from"] == RUN_CONFIG]
    out, name = run.folder.absolute().parent, run.folder.name
    words += [f"out-dir={out}", f"run-name={name}", "resume=true"]
    return f"{command_of(run)} {shlex.join(words)}"


def _distribution(path: Path) -> Iterator[str]:
    try:
        learned, method = saved.load(path), saved.origin_of(path).get("method")
    except ValueError as error:
        raise ConfigError(f"{path}: is not a run's distribution: {error}") from error
    layout, rounds = learned.layout, learned.rounds
    whose = f" of {method}" if method else ""  # earlier versions kept none
    yield (
        f"distribution{whose}: of {len(learned.latents)} uploads of "
        f"{len(learned.clients.unique())} clients, rounds {int(rounds.min())} to "
        f"{int(rounds.max())}; {sum(layout.sizes):,} weights in {len(layout.names)} tensors, "
        f"{learned.latents[0].numel()} latent numbers "
        f"({learned.settings.autoencoder} autoencoder)"
    )
    steps = learned.settings.diffusion_steps
    yield (
        f"  denoiser {learned.settings.denoiser}, strength {learned.strength} of {steps} steps, "
        f"seed {learned.seed}; to start another run from it: {shlex.quote(f'start-from={path}')}"
    )
