"""Compares every method on the same partitions and seeds, in one table with the paper's figures.

Runs what is not done yet, then writes compare.md. You can stop and restart it at any time.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli import options as shared

EXAMPLE = "compare --conf compare-fashion-mnist --methods fedavg,fedbabu,pfedgpa --seeds 0"


def add_options(parser: ArgumentParser) -> None:
    shared.add_settings(parser)
    parser.add_argument("--conf", help="experiments, separated by commas; default: all compare-*")
    parser.add_argument("--methods", help="separated by commas; default: all")
    parser.add_argument(
        "--seeds", help="separated by commas; default: 0,1,2 for the main methods, else 0"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results/compare"), help="folder for the results"
    )
    shared.add_jobs(parser)
    shared.add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.core.files import write_text
    from pfedgpa_app.study.compare import EXPERIMENTS, finished, plan, report_of
    from pfedgpa_app.study.sweep import run_sweep

    overrides = shared.parse_overrides(options.settings)
    shared.check_runs(overrides, options, options.out)
    varied = {"conf": "--conf", "method": "--methods", "seed": "--seeds"}
    shared.refuse_as_settings(overrides, varied)
    experiments = EXPERIMENTS if options.conf is None else shared.items("--conf", options.conf)
    methods = None
    if options.methods is not None:
        methods = shared.methods_named(options.methods, overrides)
    seeds = None if options.seeds is None else shared.seeds(options.seeds)
    runs = plan(experiments, methods, seeds, overrides, options.out)
    try:
        done = run_sweep(runs, options.out, options.app.absolute(), options.jobs, on=options.on)
    finally:
        if text := report_of(finished(options.out)):
            write_text(options.out / "compare.md", text)
    print(text)
    return 0 if done else 1
