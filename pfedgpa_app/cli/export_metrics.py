"""Sends a run's figures so far to a dashboard, as track= does during a run."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.core.settings import TRACKERS, ConfigError
from pfedgpa_app.engine import LaunchError

EXAMPLE = "export-metrics results/my-run --to tensorboard"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--to", choices=TRACKERS, required=True, help="the dashboard")


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.resolve import values_of
    from pfedgpa_app.results.log import SUMMARY, is_done, rounds_of
    from pfedgpa_app.results.tracking import Tracking, require_installed
    from pfedgpa_app.runs.folder import kept_settings

    folder = options.run
    require_installed([options.to])
    settings = values_of(kept_settings(folder))
    if not (rounds := rounds_of(folder)):
        raise ConfigError(f"{folder} has no round in its log yet")
    wrong: list[str] = []
    tracking = Tracking(folder, [options.to], settings, lambda _, why: wrong.append(why))
    if (folder / SUMMARY).exists():
        tracking.results()
    tracking.close(is_done(folder))
    if wrong:
        raise LaunchError(f"{options.to}: {wrong[0]}")
    for federation, numbers in rounds.items():
        print(f"sent {len(numbers)} rounds of {federation} to {options.to}")
    return 0
