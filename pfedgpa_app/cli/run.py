"""Runs an experiment: all its methods, on the same partition and seed."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from argparse import ArgumentParser, Namespace

from pfedgpa_app.cli.options import add_app, add_conf, add_engine, add_settings, overrides
from pfedgpa_app.engine import PARENT

EXAMPLE = "run --conf fashion-mnist-20 method=fedavg,pfedgpa seed=1"


def add_options(parser: ArgumentParser) -> None:
    add_settings(parser)
    parser.add_argument("-c", "--run-config", action="append", default=[], help="more settings")
    add_conf(parser)
    add_engine(parser)
    add_app(parser)


def handle(options: Namespace) -> int:
    settings = overrides(options, options.settings + options.run_config)
    _end_with_parent()
    with contextlib.ExitStack() as stack:
        flower = None
        if settings.get("engine") == "ray":  # it starts while we import and check
            from pfedgpa_app.engine.ray import Simulation

            flower = stack.enter_context(Simulation())
        from pfedgpa_app.runs.launcher import launch

        launch(settings, options.app.absolute(), flower=flower)
    return 0


def _end_with_parent() -> None:
    """Stop a run that a sweep started when the sweep's process is gone for any reason."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return

    def watch() -> None:
        while os.getppid() == int(parent):
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
