"""Makes the project's own measurements again: the map of where generation helps.

Runs what is not done yet, cell by cell, and writes map.jsonl, map.md and map.svg anew after each.
Stop it and start it again whenever you like.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli import options as shared
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.engine import LaunchError

EXAMPLE = "reproduce map --quick"
WHAT = ("map",)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT, help="map: accuracy over images a client")
    shared.add_settings(parser)
    parser.add_argument("--quick", action="store_true", help="two of its places, 20 rounds")
    parser.add_argument(
        "--only", help="places whose name has one of these, by commas, as in cifar10-20"
    )
    parser.add_argument("--methods", help="these alone, by commas; default: all ten of the map")
    parser.add_argument(
        "--seeds", default="", help="by commas; default: 0, and 1 and 2 where a gain is below 1"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=DATASET",
        help="where a data set lies, as in cifar10=imagefolder:cifar10; may be repeated",
    )
    parser.add_argument("--out", type=Path, help="where to; default: results/map")
    shared.add_jobs(parser)
    shared.add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.study.reproduce import DATA, METHODS_OF_MAP, SEEDS, Atlas, cells_of
    from pfedgpa_app.study.sweep import Run, run_sweep

    overrides = shared.parse_overrides(options.settings)
    out = options.out or Path("results/map-quick" if options.quick else "results/map")
    shared.check_runs(overrides, options, out)
    shared.refuse_as_settings(overrides, {"dataset": "--data", "seed": "--seeds"})
    if taken := overrides.keys() & {"conf", "method", "num-clients", "train-per-client"}:
        raise ConfigError(f"{', '.join(sorted(taken))}: is the map's own to say")
    places = dict(_place(text, DATA) for text in options.data)
    cells = cells_of(options.quick)
    if options.only is not None:
        wanted = shared.items("--only", options.only)
        cells = [cell for cell in cells if any(part in cell.name for part in wanted)]
        if not cells:
            names = ", ".join(cell.name for cell in cells_of(options.quick))
            raise ConfigError(f"--only {options.only}: no place of the map has it: {names}")
    seeds = _seeds(options.seeds) if options.seeds else SEEDS
    methods = METHODS_OF_MAP
    if options.methods is not None:
        methods = tuple(shared.items("--methods", options.methods))
        if unknown := set(methods) - set(METHODS_OF_MAP):
            known = ", ".join(METHODS_OF_MAP)
            raise ConfigError(f"--methods: {', '.join(sorted(unknown))}: the map has {known}")
    if options.quick:
        overrides = {"num-server-rounds": 20} | overrides
    app = options.app.absolute()

    def run_all(runs: list[Run]) -> None:
        if not run_sweep(runs, runs[0].folder.parent, app, options.jobs, on=options.on):
            raise LaunchError(f"a run failed; see {runs[0].folder.parent}")

    print(Atlas(out, overrides, places, run_all, methods).fill(cells, seeds))
    return 0


def _seeds(text: str) -> list[int]:
    words = shared.items("--seeds", text)
    if not all(word.isdecimal() for word in words):
        raise ConfigError(f"--seeds {text}: wants whole numbers by commas, as in 0,1,2")
    return list(dict.fromkeys(map(int, words)))


def _place(text: str, known: dict[str, str]) -> tuple[str, str]:
    name, _, place = text.partition("=")
    if name not in known or not place:
        raise ConfigError(f"--data {text}: wants NAME=DATASET, NAME one of {', '.join(known)}")
    return name, place
