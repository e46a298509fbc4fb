"""Predicts classes with the network of a run's client."""

from __future__ import annotations

import csv
import json
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.cli.options import add_client

EXAMPLE = "predict results/my-run --client 3 photo.jpg more-photos/"


def add_options(parser: ArgumentParser) -> None:
    add_client(parser)
    parser.set_defaults(words="examples")
    parser.add_argument(
        "examples",
        nargs="+",
        type=Path,
        metavar="IMAGE-OR-FILE",
        help="images, folders of images, or arrays: .npy, .npz with x, .csv",
    )
    parser.add_argument("--resize", action="store_true", help="resize images to the network's size")
    parser.add_argument(
        "--to", choices=("table", "csv", "json"), default="table", help="output format"
    )


def handle(options: Namespace) -> int:
    from pfedgpa_app.core.paths import user_path
    from pfedgpa_app.data.examples import examples
    from pfedgpa_app.runs.personal import load_client
    from pfedgpa_app.runs.prediction import as_records

    model = load_client(options.run, options.client, options.method)
    about = model.about
    resize = options.resize or about.image_size > 0
    places = [user_path(place) for place in options.examples]  # words after options are texts
    names, inputs = examples(places, about.schema, resize)
    rows = as_records(model.probabilities(inputs), model.classes)
    named = [{"example": name, **row} for name, row in zip(names, rows, strict=True)]
    if options.to == "json":
        print(json.dumps(named, indent=2, ensure_ascii=False))
    elif options.to == "csv":
        out = csv.writer(sys.stdout)
        out.writerow(["example", "class", *model.classes])
        for row in named:
            out.writerow([row["example"], row["class"], *row["probabilities"].values()])
    else:
        width = max(len(name) for name in names)
        for row in named:
            others = sorted(row["probabilities"].items(), key=lambda pair: -pair[1])[:3]
            said = ", ".join(f"{name} {100 * p:.1f} %" for name, p in others)
            print(f"{row['example']:<{width}}  {row['class']}  ({said})")
    return 0
