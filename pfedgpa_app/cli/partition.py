"""Prints and draws how many examples of each class every client holds, and which users it is."""

from __future__ import annotations

import csv
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from pfedgpa_app.cli.options import add_conf, add_settings, overrides
from pfedgpa_app.core.settings import ConfigError, listed

CSV, WIDEST = ".csv", 21  # how many columns a terminal has room for
EXAMPLE = "partition --conf fashion-mnist-20 partition=dirichlet --out who-holds-what.png"


def add_options(parser: ArgumentParser) -> None:
    add_settings(parser)
    add_conf(parser)
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("partition.png"),
        help="file for the picture, or for the table as .csv",
    )


def handle(options: Namespace) -> int:
    import numpy as np

    from pfedgpa_app.config.resolve import resolve
    from pfedgpa_app.data.client import class_counts, data_in_words, load_dataset, users_of_clients
    from pfedgpa_app.results.plots import partition
    from pfedgpa_app.results.tables import markdown

    config, out = resolve(overrides(options)).config, options.out
    _check_picture(out)
    try:
        data, counts = load_dataset(config), class_counts(config)
        users = users_of_clients(config)
    except ValueError as error:  # a partition that the data do not allow
        raise ConfigError(str(error)) from error
    header = ["client", *(["users"] if users else []), *data.classes]
    if out.suffix.lower() == CSV:
        with out.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([header, *_rows(counts, users, sys.maxsize)])
    else:
        partition(out, np.array(counts), data.classes)
    print(data_in_words(config))
    if len(header) <= WIDEST:
        print(markdown(header, _rows(counts, users)))
    else:
        print(f"{len(data.classes)} classes: for all counts, --out {out.with_suffix(CSV).name}")
    print(f"wrote {out.absolute()}")
    return 0


def _rows(
    counts: Sequence[Sequence[int]], users: Sequence[Sequence[str]], most: int = 3
) -> list[list[str]]:
    """Return the table's cells; of one client's users, if clients are users, ``most`` are named."""
    named = [[listed(names, most)] for names in users] or [[] for _ in counts]
    each = zip(named, counts, strict=True)
    return [[str(i), *who, *map(str, mine)] for i, (who, mine) in enumerate(each)]


def _check_picture(out: Path) -> None:
    """Refuse a path to which no picture or table can be written."""
    from matplotlib.backend_bases import FigureCanvasBase

    known_formats = FigureCanvasBase.get_supported_filetypes()
    if out.suffix.lower() != CSV and out.suffix.lower().removeprefix(".") not in known_formats:
        raise ConfigError(
            f"--out {out}: its ending must be one of .{', .'.join(sorted({*known_formats, 'csv'}))}"
        )
    if os.path.isdir(out):
        raise ConfigError(f"--out {out}: is a folder; name a file")
    if not os.path.isdir(out.parent):
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if not os.access(out if os.path.exists(out) else out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: cannot be written")
