"""Tests the network of a run's client, on your own data or as the run did."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_client
from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "evaluate results/my-run --client 3 imagefolder:new-photos"


def add_options(parser: ArgumentParser) -> None:
    add_client(parser)
    parser.set_defaults(words="dataset")
    parser.add_argument(
        "dataset",
        nargs="*",
        help="labelled data, as in dataset=NAME; default: the client's own test data in the run",
    )
    parser.add_argument("--data-dir", default="", help="folder of other data sets")
    parser.add_argument("--to", choices=("table", "json"), default="table", help="output format")


def handle(options: Namespace) -> int:
    from pfedgpa_app.config.names import require_dataset
    from pfedgpa_app.core.paths import user_path
    from pfedgpa_app.data import is_known_dataset
    from pfedgpa_app.runs.prediction import evaluate

    dataset = " ".join(options.dataset).removeprefix("dataset=")
    if dataset.startswith("data-dir="):
        raise ConfigError(f"{dataset}: is an option here, --{dataset.replace('=', ' ', 1)}")
    if dataset and not is_known_dataset(dataset) and user_path(dataset).exists():
        raise ConfigError(f"{dataset}: {_how_given(user_path(dataset))}")
    if dataset:
        require_dataset(dataset, "dataset")
    found = evaluate(options.run, options.client, options.method, dataset, options.data_dir)
    if options.to == "json":
        print(json.dumps(found, indent=2, ensure_ascii=False))
        return 0
    print(f"{found['correct']} of {found['examples']} correct: {found['accuracy']:.2f} %")
    for name, (correct, count) in found["classes"].items():
        print(f"  {name}: {correct} of {count}")
    return 0


def _how_given(path: Path) -> str:
    """Say how the labelled data at ``path``, given by its path alone, are to be given."""
    if path.is_dir():
        return f"labelled images are given as imagefolder:{path}, with a folder for each class"
    if path.suffix.lower() == ".npz":
        return f"labelled arrays are given as npz:{path}, with x and y"
    return (
        "labelled data are given as npz:FILE with the arrays x and y, as imagefolder:FOLDER, or as "
        "MODULE:CALLABLE, your own function, which may read a table (docs/own.md)"
    )
