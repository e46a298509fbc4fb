"""Shows what a run's folder holds and how far the run is, or describes a distribution."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

EXAMPLE = "inspect results/my-run"


def add_options(parser: ArgumentParser) -> None:
    text = "a run's folder, or its distribution.safetensors"
    parser.add_argument("path", type=Path, metavar="PATH", help=text)


def handle(options: Namespace) -> int:
    from pfedgpa_app.runs.inspection import lines_about

    print("\n".join(lines_about(options.path)))
    return 0
