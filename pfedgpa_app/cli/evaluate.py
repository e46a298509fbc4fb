"""Tests the network of a run's client, on your own data or as the run did."""

from __future__ import annotations

import json
from argparse import ArgumentParser, Namespace

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
    from pfedgpa_app.runs.prediction import evaluate

    dataset = " ".join(options.dataset).removeprefix("dataset=")
    if dataset.startswith("data-dir="):
        raise ConfigError(f"{dataset}: is an option here, --{dataset.replace('=', ' ', 1)}")
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
