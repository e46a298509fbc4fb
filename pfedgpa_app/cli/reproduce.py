"""Repeats the project's own measurements, and the paper's.

These are the map of where generation helps; the paper's Table 1; its Table 2 and Figure 4, in one
study; clients that join; and federations that start from what another has learned. Runs what is not
done yet, place by place, and rewrites rows (.jsonl), tables (.md) and figures (.svg) after each
place. You can stop and restart it at any time.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from pfedgpa_app.cli import options as shared
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.engine import LaunchError

if TYPE_CHECKING:
    from pfedgpa_app.study.reproduce import Atlas, Cell

EXAMPLE = "reproduce map --quick"
WHAT = ("map", "table1", "table2", "figure4", "join", "warm-start")


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=WHAT,
        help="map: accuracy by images per client; table1, table2, figure4: the paper's; join: "
        "clients that come late; warm-start: a start from what another federation learned",
    )
    shared.add_settings(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only one or two places, 20 rounds and one seed; no search for a table's settings",
    )
    parser.add_argument(
        "--only",
        help="only places with these names or parts of names, separated by commas: cifar10-20",
    )
    parser.add_argument("--methods", help="only these methods, separated by commas; default: all")
    parser.add_argument(
        "--seeds",
        default="",
        help="separated by commas; default: 0; also 1 and 2 for a gain below 1 or a small study",
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=DATASET",
        help="where a data set is, as in cifar10=imagefolder:cifar10; may be repeated",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for the results; default: results/ and the study's name"
    )
    shared.add_jobs(parser)
    shared.add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.study.plan import PlannedRun
    from pfedgpa_app.study.reproduce import DATA, SEEDS
    from pfedgpa_app.study.sweep import run_sweep

    kind = _study(options.what)
    overrides = shared.parse_overrides(options.settings)
    out = options.out or Path(
        f"results/{kind.name}-quick" if options.quick else f"results/{kind.name}"
    )
    shared.check_runs(overrides, options, out)
    shared.refuse_as_settings(overrides, {"dataset": "--data", "seed": "--seeds"})
    if taken := overrides.keys() & kind.own:
        raise ConfigError(f"{', '.join(sorted(taken))}: cannot be set; the {kind.thing} sets it")
    places = dict(_place(text, DATA) for text in options.data)
    cells = _cells(options, kind)
    methods = _methods(options, kind)
    seeds = list(SEEDS[:1] if options.quick else SEEDS)
    if options.seeds:
        seeds = shared.seeds(options.seeds)
    if options.quick:
        overrides = {"num-server-rounds": 20} | overrides
    app = options.app.absolute()

    def run_all(runs: list[PlannedRun]) -> bool:
        return run_sweep(runs, runs[0].folder.parent, app, options.jobs, on=options.on)

    atlas = kind(out, overrides, places, run_all, methods, options.quick)
    cells = atlas.running(cells)
    if unused := places.keys() - {cell.data for cell in cells}:
        warn_once(f"--data {', '.join(sorted(unused))} has no effect: nothing here uses it")
    done = len(atlas.done(cells, seeds[0]))
    print(f"{len(cells)} places with {len(methods)} methods each, {done} of them done, in {out}")
    seconds = atlas.seconds(cells, seeds[0])
    long = (
        f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{math.ceil(seconds / 60)} minutes"
    )
    print(
        f"about {long} of one core for seed {seeds[0]}, plus searches, other seeds and the server"
    )
    print(atlas.fill(cells, seeds))
    if failures := atlas.failures(cells, seeds):
        raise LaunchError("what has no result is in no table:\n" + "\n".join(failures))
    return 0


def _study(what: str) -> type[Atlas]:
    from pfedgpa_app.study.join import Join
    from pfedgpa_app.study.reproduce import Atlas
    from pfedgpa_app.study.table1 import Table1
    from pfedgpa_app.study.table2 import Table2
    from pfedgpa_app.study.warm_start import WarmStart

    kinds: list[type[Atlas]] = [Atlas, Table1, Table2, Join, WarmStart]
    return {kind.name: kind for kind in kinds}["table2" if what == "figure4" else what]


def _cells(options: Namespace, kind: type[Atlas]) -> list[Cell]:
    every = kind.cells(options.quick)
    if options.only is None:
        return every
    names = [cell.name for cell in every]
    meant: set[str] = set()
    for part in shared.items("--only", options.only):
        # a whole name means that place alone: cifar10-10 does not mean cifar10-100
        found = {part} & {*names} or {name for name in names if part in name}
        if not found:
            small = " with --quick" if options.quick else ""
            raise ConfigError(
                f"--only {part}: no place of the {kind.thing}{small} matches; there are "
                f"{', '.join(names)}"
            )
        meant |= found
    return [cell for cell in every if cell.name in meant]


def _methods(options: Namespace, kind: type[Atlas]) -> tuple[str, ...]:
    if options.methods is None:
        return kind.known
    asked = shared.items("--methods", options.methods)
    if unknown := set(asked) - set(kind.known):
        what = f"not in the {kind.thing}, which has {', '.join(kind.known)}"
        raise ConfigError(f"--methods: {', '.join(sorted(unknown))}: {what}")
    return tuple(method for method in kind.known if method in asked)


def _place(text: str, known: dict[str, str]) -> tuple[str, str]:
    name, _, place = text.partition("=")
    if name not in known or not place:
        raise ConfigError(f"--data {text}: must be NAME=DATASET, NAME one of {', '.join(known)}")
    return name, place
