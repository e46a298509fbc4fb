"""Writes the network that a client of a run was given as one file for other programs."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_client

EXAMPLE = "export results/my-run --client 3 --to onnx"


def add_options(parser: ArgumentParser) -> None:
    add_client(parser)
    parser.add_argument(
        "--to",
        choices=("onnx", "torch"),
        required=True,
        help="onnx, which wants pip install 'pfedgpa-app[onnx]', or torch.export's .pt2",
    )
    parser.add_argument("--out", type=Path, help="the file; default: client-N.onnx or .pt2 here")


def handle(options: Namespace) -> int:
    from pfedgpa_app.runs.personal import load_client
    from pfedgpa_app.runs.prediction import export

    model = load_client(options.run, options.client, options.method)
    ending = {"onnx": "onnx", "torch": "pt2"}[options.to]
    out = options.out or Path(f"client-{options.client}.{ending}")
    print(f"wrote {export(model, options.to, out).absolute()}")
    return 0
