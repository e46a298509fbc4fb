"""Keep comparisons' and the map's results in the repository, and quote them in the documentation.

    python benchmarks/keep.py [results/compare …] [results/map …]

A file an experiment, ``benchmarks/results/compare-*.jsonl``, takes in every finished run that
`pfedgpa compare` left in the folders. Its first line has the settings that all its rows share; then
comes a row a method and seed: its entry of ``summary.json``, its other settings, and its clients'
accuracies. ``benchmarks/results/map.jsonl`` takes in the rows that `pfedgpa reproduce map` wrote.
What is kept already stays where the folders have nothing newer; all tables and the map's figure
are made of all that is kept.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from pfedgpa_app.config.resolve import keys, without_idle
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import LAUNCH
from pfedgpa_app.methods import METHODS
from pfedgpa_app.results.log import is_done, rows_of
from pfedgpa_app.runs.folder import kept_settings
from pfedgpa_app.study import reproduce
from pfedgpa_app.study.compare import EXPERIMENTS, Finished, report_of

DOCS, RESULTS = APP_DIR / "docs", APP_DIR / "benchmarks" / "results"
MAP, PICTURE = RESULTS / reproduce.KEPT, DOCS / "pictures" / reproduce.FIGURE
OF_A_ROW = ("method", "seed")  # settings that its entry of summary.json tells
BEGIN, END = "<!-- compare -->\n", "<!-- end -->"

Row = dict[str, Any]


def file_of(experiment: str) -> Path:
    """Where its rows are kept."""
    return RESULTS / f"{experiment}.jsonl"


def of_run(folder: Path) -> list[Row]:
    """A finished run's rows: ``settings`` by name, ``clients`` as lists in the clients' order."""
    clients: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in (folder / "clients.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        method = record.pop("method")
        for name, value in record.items():
            clients[method][name].append(value)
    there = kept_settings(folder)
    settings = {}
    for name, key in keys().items():
        if name not in OF_A_ROW and key.rules["part"] != LAUNCH:
            # a setting that was not there yet was what is now its default
            default = {"value": "auto" if key.default is None else key.default}
            settings[name] = there.get(name, default)["value"]
    settings = json.loads(json.dumps(settings))  # as they will be read
    return [
        row
        | {"settings": without_idle(settings, [row["method"]]), "clients": clients[row["method"]]}
        for row in rows_of(folder)
    ]


def read(file: Path) -> list[Row]:
    """The rows kept in ``file``, each with all of its settings."""
    if not file.exists():
        return []
    shared, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row | {"settings": shared["settings"] | row["settings"]} for row in rows]


def write(file: Path, rows: list[Row]) -> None:
    """Keep ``rows`` in ``file``, in the methods' order and that of their seeds."""
    order = list(METHODS)
    rows = sorted(rows, key=lambda row: (order.index(row["method"]), row["seed"]))
    first, *others = (row["settings"] for row in rows)
    shared = {
        name: value
        for name, value in first.items()
        if all(name in other and other[name] == value for other in others)
    }
    own = [
        row | {"settings": {k: v for k, v in row["settings"].items() if k not in shared}}
        for row in rows
    ]
    lines = [{"experiment": file.stem, "settings": shared}, *own]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def add(folder: Path) -> None:
    """Keep every finished run in ``folder``, in the place of what is kept of the same seed."""
    new: dict[str, list[Row]] = defaultdict(list)
    for run in sorted(path.parent for path in folder.glob("*/summary.json")):
        experiment = Path(kept_settings(run)["conf"]["value"]).stem
        if is_done(run) and experiment in EXPERIMENTS:
            new[experiment] += of_run(run)
    for experiment, rows in new.items():
        file = file_of(experiment)
        both = {(row["method"], row["seed"]): row for row in read(file) + rows}
        write(file, list(both.values()))


def kept() -> Finished:
    """All rows that are kept."""
    found: Finished = {}
    for experiment in sorted(EXPERIMENTS):
        for row in read(file_of(experiment)):
            found.setdefault(experiment, {}).setdefault(row["method"], []).append(row)
    return found


def quote(file: Path, text: str) -> None:
    """Put ``text`` between the two marks of ``file``."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_text(file, f"{before}{BEGIN}\n{text.strip()}\n\n{END}{after}")


def place(row: Row) -> tuple[int, int, int]:
    """Where a row of the map stands among others."""
    cells = reproduce.cells_of()
    cell = next(i for i, cell in enumerate(cells) if reproduce.rows_in([row], cell))
    return cell, reproduce.METHODS_OF_MAP.index(row["method"]), row["seed"]


def map_rows(file: Path = MAP) -> list[Row]:
    """The map's rows in ``file``."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def add_map(folder: Path) -> None:
    """Keep what `pfedgpa reproduce map` wrote to ``folder``."""
    both = {place(row): row for row in map_rows() + map_rows(folder / MAP.name)}
    write_text(MAP, "".join(json.dumps(both[key]) + "\n" for key in sorted(both)))


def main() -> None:
    """Keep what is asked for and renew the tables and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="that the commands wrote to")
    for folder in parser.parse_args().folders:
        (add_map if (folder / MAP.name).exists() else add)(folder)
    rows = map_rows()
    quote(DOCS / "results.md", report_of(kept()))
    quote(DOCS / "map.md", reproduce.tables(rows))
    quote(APP_DIR / "README.md", reproduce.overview(rows))
    write_text(PICTURE, reproduce.figure(rows))
    write_text(PICTURE.with_name("methods.svg"), reproduce.methods_figure(rows))


if __name__ == "__main__":
    main()
