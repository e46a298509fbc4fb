"""Runs every combination of settings, as many at once as the machine allows.

Finished runs are skipped, so a stopped sweep continues where it was.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from pfedgpa_app.cli import options as shared
from pfedgpa_app.core.paths import YAML
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "sweep --conf fashion-mnist-20 --over seed=0,1,2 --over learning-rate=0.01,0.02"


def add_options(parser: ArgumentParser) -> None:
    parser.set_defaults(words="settings")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="FILE or KEY=VALUE",
        help="a YAML file with settings: (for all runs) and over: (lists to combine); "
        + shared.SETTINGS_HELP,
    )
    parser.add_argument(
        "--over",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="vary a setting; several --over are combined",
    )
    shared.add_conf(parser)
    shared.add_engine(parser)
    parser.add_argument("--out", type=Path, help="where the runs' folders and the tables go")
    shared.add_jobs(parser)
    shared.add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.study.plan import read
    from pfedgpa_app.study.sweep import sweep

    files = [word for word in options.settings if "=" not in word and word.endswith(YAML)]
    words = [word for word in options.settings if word not in files]
    overrides = shared.overrides(options, words)
    settings: dict[str, Any] = {}
    over: dict[str, list[Any]] = {}
    for file in files:
        base, varied = read(Path(file))
        settings, over = settings | base, over | varied
    over |= _varied(options.over, settings | overrides)
    if not over:
        raise ConfigError("nothing to sweep over: give a file with over:, or --over KEY=V1,V2")
    for key in overrides:
        if key in over:
            raise ConfigError(
                f"{key}={overrides[key]}: the sweep varies it over "
                f"{', '.join(map(str, over[key]))}; for this value alone, give --over "
                f"{key}={overrides[key]}"
            )
    name = Path(files[0]).stem if files else "sweep"
    out = options.out or Path("results") / name
    shared.check_runs(settings | overrides | over, options, out)
    done = sweep(
        settings | overrides, over, out, options.app.absolute(), options.jobs, on=options.on
    )
    return 0 if done else 1


def _varied(texts: list[str], settings: dict[str, Any]) -> dict[str, list[Any]]:
    """Return {setting: its values} of the ``--over`` options; all runs have ``settings``."""
    from pfedgpa_app.config.names import known
    from pfedgpa_app.study.plan import know_varied

    over: dict[str, list[str]] = {}
    for text in texts:
        key, found, values = text.partition("=")
        if not found:
            raise ConfigError(f"--over {text!r}: must be KEY=V1,V2")
        if key in over:
            raise ConfigError(f"--over {key}: is given twice")
        over[key] = shared.items(f"--over {key}", values)
    know_varied(settings, over)
    for key in over:
        known(key, "--over")
    return {key: [shared.value_of(key, v) for v in values] for key, values in over.items()}
