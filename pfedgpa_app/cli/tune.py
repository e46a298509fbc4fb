"""Chooses methods' main settings on validation images, and keeps them in the experiment.

Runs a small grid for each method, or a given number of trials by Optuna, then writes the chosen
values into the experiment's YAML file and the search's results beside it.
"""

from __future__ import annotations

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli import options as shared
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "tune --conf my-experiment.yaml --methods fedavg,pfedgpa"


def add_options(parser: ArgumentParser) -> None:
    shared.add_settings(parser)
    shared.add_conf(parser, required=True)
    parser.add_argument(
        "--methods",
        help="separated by commas; default: the experiment's; all: any with settings to choose",
    )
    parser.add_argument(
        "--trials",
        type=int,
        metavar="N",
        help="N trials per method, proposed by Optuna, instead of a grid",
    )
    parser.add_argument("--out", type=Path, help="where the runs go; default: results/tune-CONF")
    shared.add_jobs(parser)
    shared.add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.parse import argument
    from pfedgpa_app.config.resolve import resolve
    from pfedgpa_app.methods import federation_of
    from pfedgpa_app.methods.own import reference_of
    from pfedgpa_app.study.tune import report_of, tunable, tune

    overrides = shared.parse_overrides(options.settings)
    out = options.out or Path("results") / f"tune-{Path(options.conf).stem}"
    shared.check_runs(overrides, options, out)
    if options.trials is not None and options.trials < 1:
        raise ConfigError(f"--trials {options.trials}: must be at least 1")
    shared.refuse_as_settings(overrides, {"conf": "--conf", "method": "--methods"})
    named = options.methods not in (None, "all")
    methods = shared.methods_named(options.methods, overrides) if named else []
    config = resolve({"conf": options.conf}).config
    every = tunable()
    if options.methods == "all":
        methods = every
    elif options.methods is None:
        methods = [m for m in every if m in {federation_of(name) for name in config.method}]
    if not methods:
        raise ConfigError(
            f"--conf {options.conf}: none of its methods ({', '.join(config.method)}) has settings "
            "to choose: name others with --methods"
        )
    # the command can be repeated elsewhere: it has no paths of this machine
    conf = Path(options.conf).name if Path(options.conf).is_absolute() else options.conf
    words = ["--conf", conf, "--methods", ",".join(map(reference_of, methods))]
    words += ["--trials", str(options.trials)] if options.trials else []
    words += [f"{key}={argument(v)}" for key, v in overrides.items() if key != "data-dir"]
    command = shlex.join(["pfedgpa", "tune", *words]).replace("\n", " ")  # it becomes a comment
    app = options.app.absolute()
    chosen = tune(
        *(options.conf, methods, overrides, out, app, options.jobs, command),
        on=options.on,
        number=options.trials,
    )
    print(f"chosen on validation images, as {report_of(options.conf)} shows:")
    for key, value in chosen.items():
        print(f"{key} = {value}")
    return 0
