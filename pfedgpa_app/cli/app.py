"""Writes an app folder for ``flwr run``, with a run's settings in it.

``flwr run FOLDER SUPERLINK --stream`` then starts the run on a deployment.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_app, add_settings, check_folder, overrides
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "app hospitals-app dataset=nodes num-clients=2 num-server-rounds=50 out-dir=/srv/results"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="the new folder to write")
    add_settings(parser)
    add_app(parser)


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.resolve import given, resolve
    from pfedgpa_app.core.paths import user_path
    from pfedgpa_app.engine.flower import stage

    settings = given(resolve(overrides(options)))
    folder = user_path(options.folder)
    check_folder(folder)
    if folder.exists():
        raise ConfigError(f"{folder} already exists: name another folder, or move it away")
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(stage(options.app, folder, settings))
    return 0
