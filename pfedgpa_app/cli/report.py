"""Writes one page with the results of runs: report.html, with table.csv and table.tex beside it."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path

from pfedgpa_app.core.settings import ConfigError

EXAMPLE = "report results/table --out results/table/all.html"


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="FOLDER",
        help="folder of a run, a sweep or a comparison; the runs of several are compared",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the page; default: report.html in the first folder, comparison.html beside a run's",
    )


def handle(options: Namespace) -> int:
    from pfedgpa_app.runs.report import tables_beside, write

    out: Path | None = options.out
    if out is not None and not out.absolute().parent.is_dir():
        raise ConfigError(f"--out {out}: there is no folder {out.parent}")
    if out is not None and (out.suffix.lower() not in (".html", ".htm") or out.is_dir()):
        raise ConfigError(f"--out {out}: name a file that ends in .html")
    page = write(options.folders, out).absolute()
    print(f"wrote {', '.join(map(str, (page, *tables_beside(page))))}")
    return 0
