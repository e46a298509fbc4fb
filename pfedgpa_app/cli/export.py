"""Exports the network of a run's client as one file for other programs."""

from __future__ import annotations

import re
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_client
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "export results/my-run --client 3 --to onnx"


def add_options(parser: ArgumentParser) -> None:
    add_client(parser)
    parser.add_argument(
        "--to",
        choices=("onnx", "torch"),
        required=True,
        help="onnx (needs pip install 'pfedgpa-app[onnx]') or torch (torch.export's .pt2)",
    )
    parser.add_argument(
        "--out", type=Path, help="the new file; default: RUN-METHOD-client-N.onnx or .pt2, here"
    )


def handle(options: Namespace) -> int:
    from pfedgpa_app.core.paths import user_path
    from pfedgpa_app.runs.folder import client_called
    from pfedgpa_app.runs.personal import load_client, the_method
    from pfedgpa_app.runs.prediction import export

    model = load_client(options.run, options.client, options.method)
    folder = user_path(options.run).absolute()
    method = the_method(folder, options.method)
    ending = {"onnx": "onnx", "torch": "pt2"}[options.to]
    client = options.client
    if not re.fullmatch(r"\w[\w.-]{,99}", client):  # a user's name that is not one for a file
        client = str(client_called(folder, client))
    out = options.out or Path(f"{folder.name}-{method}-client-{client}.{ending}")
    if out.exists():
        raise ConfigError(f"{out}: already exists: give --out another name, or remove it")
    print(f"wrote {export(model, options.to, out).absolute()}")
    return 0
