"""Makes the project's own measurements again: the map of where generation helps, the paper's table.

Runs what is not done yet, place by place, and writes map.jsonl, map.md and map.svg, or table1.jsonl
and table1.md, anew after each. Stop it and start it again whenever you like.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli import options as shared
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.engine import LaunchError

EXAMPLE = "reproduce map --quick"
_THING = {"map": "map", "table1": "table"}
WHAT = tuple(_THING)


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "what", choices=WHAT, help="map: accuracy over images a client; table1: the paper's"
    )
    shared.add_settings(parser)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two of its places, 20 rounds; of table1 nothing is searched",
    )
    parser.add_argument(
        "--only", help="places whose name has one of these, by commas, as in cifar10-20"
    )
    parser.add_argument(
        "--methods", help="these alone, by commas; default: all of the map's, or the table's"
    )
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
    from pfedgpa_app.study import reproduce, table1
    from pfedgpa_app.study.sweep import Run, run_sweep

    overrides = shared.parse_overrides(options.settings)
    folder = f"results/{options.what}-quick" if options.quick else f"results/{options.what}"
    out = options.out or Path(folder)
    shared.check_runs(overrides, options, out)
    shared.refuse_as_settings(overrides, {"dataset": "--data", "seed": "--seeds"})
    if taken := overrides.keys() & {"conf", "method", "num-clients", "train-per-client"}:
        raise ConfigError(f"{', '.join(sorted(taken))}: is the {_THING[options.what]}'s own to say")
    places = dict(_place(text, reproduce.DATA) for text in options.data)
    of_map = options.what == "map"
    every = reproduce.cells_of(options.quick) if of_map else table1.columns(options.quick)
    cells = every
    if options.only is not None:
        wanted = shared.items("--only", options.only)
        cells = [cell for cell in every if any(part in cell.name for part in wanted)]
        if not cells:
            names = ", ".join(cell.name for cell in every)
            raise ConfigError(
                f"--only {options.only}: no place of the {_THING[options.what]} has it: {names}"
            )
    known = reproduce.METHODS_OF_MAP if of_map else table1.METHODS_OF_TABLE
    methods = _methods(options, known)
    seeds = _seeds(options.seeds) if options.seeds else reproduce.SEEDS
    if options.quick:
        overrides = {"num-server-rounds": 20} | overrides
    app = options.app.absolute()

    def run_all(runs: list[Run]) -> None:
        if not run_sweep(runs, runs[0].folder.parent, app, options.jobs, on=options.on):
            raise LaunchError(f"a run failed; see {runs[0].folder.parent}")

    if of_map:
        atlas = reproduce.Atlas(out, overrides, places, run_all, methods)
    else:
        atlas = table1.Table1(out, overrides, places, run_all, methods, search=not options.quick)
    done = atlas.done(cells, seeds[0])
    print(
        f"{len(cells)} places with {len(methods)} methods each, {len(done)} of them done, in {out}"
    )
    print(atlas.fill(cells, seeds))
    return 0


def _methods(options: Namespace, known: tuple[str, ...]) -> tuple[str, ...]:
    if options.methods is None:
        return known
    asked = shared.items("--methods", options.methods)
    if unknown := set(asked) - set(known):
        what = f"the {_THING[options.what]} has {', '.join(known)}"
        raise ConfigError(f"--methods: {', '.join(sorted(unknown))}: {what}")
    return tuple(method for method in known if method in asked)


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
