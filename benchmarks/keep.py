"""Keep the results of comparisons and studies in the repository, and quote them in the docs.

    python benchmarks/keep.py [results/compare …] [results/map …] [results/table1 …] …

``benchmarks/results/compare-*.jsonl``, a file for each experiment, takes in every finished run that
`pfedgpa compare` left in the folders. Its first line has the settings that all its rows share. Then
comes a row for each method and seed: its entry of ``summary.json``, its other settings, and its
clients' accuracies. ``benchmarks/results/map.jsonl`` takes in the rows that `pfedgpa reproduce map`
wrote, ``table1.jsonl`` those of `pfedgpa reproduce table1`, and so on; Table 1 has the comparisons'
federations, too. Results kept before stay unless the folders have newer ones; all tables and
figures are made from everything that is kept.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pfedgpa_app.config.names import defaults, keys, without_idle
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import LAUNCH
from pfedgpa_app.methods import METHODS
from pfedgpa_app.results.log import finished_in, rows_of
from pfedgpa_app.runs.folder import kept_settings
from pfedgpa_app.study import join, reproduce, table1, table2, warm_start
from pfedgpa_app.study.compare import EXPERIMENTS, Finished, report_of

DOCS, RESULTS = APP_DIR / "docs", APP_DIR / "benchmarks" / "results"
PICTURES = DOCS / "pictures"
STUDIES = (reproduce.Atlas, table1.Table1, table2.Table2, join.Join, warm_start.WarmStart)
COMPARED = {  # {experiment whose rows are in Table 1, too: (data set, clients)}
    "compare-cifar10": ("cifar10", 20),
    "compare-cifar10-100": ("cifar10", 100),
    "compare-fashion-mnist": ("fashion-mnist", 20),
    "compare-fashion-mnist-100": ("fashion-mnist", 100),
}
OF_A_ROW = ("method", "seed")  # settings that the entry of summary.json has
END = "<!-- end -->"

Row = dict[str, Any]


def file_of(experiment: str) -> Path:
    """Return the file in which an experiment's rows are kept."""
    return RESULTS / f"{experiment}.jsonl"


def of_run(folder: Path) -> list[Row]:
    """Return a finished run's rows: ``settings`` by name, ``clients`` as lists in their order."""
    clients: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for line in (folder / "clients.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        method = record.pop("method")
        for name, value in record.items():
            clients[method][name].append(value)
    there, before = kept_settings(folder), defaults()
    settings = {}
    for name, key in keys().items():
        if name not in OF_A_ROW and key.rules["part"] != LAUNCH:
            # before a setting existed, runs did what is now its default
            settings[name] = there.get(name, {"value": before[name]})["value"]
    settings = json.loads(json.dumps(settings))  # as they will be when read again
    return [
        row
        | {"settings": without_idle(settings, [row["method"]]), "clients": clients[row["method"]]}
        for row in rows_of(folder)
    ]


def read(file: Path) -> list[Row]:
    """Return the rows kept in ``file``, each with all of its settings."""
    if not file.exists():
        return []
    shared, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return [row | {"settings": shared["settings"] | row["settings"]} for row in rows]


def write(file: Path, rows: list[Row]) -> None:
    """Keep ``rows`` in ``file``, ordered by method and seed."""
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
    """Keep every finished run in ``folder``, instead of what is kept of its method and seed."""
    new: dict[str, list[Row]] = defaultdict(list)
    for run in finished_in(folder):  # the newest of a method and seed comes last
        experiment = Path(kept_settings(run)["conf"]["value"]).stem
        if experiment in EXPERIMENTS:
            new[experiment] += of_run(run)
    for experiment, rows in new.items():
        file = file_of(experiment)
        both = {(row["method"], row["seed"]): row for row in read(file) + rows}
        write(file, list(both.values()))


def kept() -> Finished:
    """Return all rows that are kept of comparisons."""
    found: Finished = {}
    for experiment in sorted(EXPERIMENTS):
        for row in read(file_of(experiment)):
            found.setdefault(experiment, {}).setdefault(row["method"], []).append(row)
    return found


def quotes() -> dict[tuple[Path, str], str]:
    """Return {(file, the mark before its table): table}, from everything that is kept."""
    on_map = rows_of_study(reproduce.Atlas)
    every = {
        (DOCS / "results.md", "compare"): report_of(kept()),
        (DOCS / "results.md", "table1"): table1.table(all_of_table1()),
        (DOCS / "results.md", "table2"): table2.tables(rows_of_study(table2.Table2)),
        (DOCS / "join.md", "join"): join.tables(rows_of_study(join.Join)),
        (DOCS / "algorithm.md", "warm-start"): warm_start.tables(
            rows_of_study(warm_start.WarmStart)
        ),
        (DOCS / "map.md", "map"): reproduce.tables(on_map),
        (APP_DIR / "README.md", "map"): reproduce.overview(on_map),
    }
    return {where: table for where, table in every.items() if table}


def figures() -> dict[Path, str]:
    """Return {file: SVG}, from everything that is kept."""
    on_map, of_table2 = (rows_of_study(study) for study in (reproduce.Atlas, table2.Table2))
    drawn = {
        PICTURES / "map.svg": reproduce.figure(on_map),
        PICTURES / "methods.svg": reproduce.methods_figure(on_map),
    }
    return drawn | ({PICTURES / "figure4.svg": table2.figure(of_table2)} if of_table2 else {})


def around(file: Path, mark: str) -> tuple[str, str, str]:
    """Split ``file`` into what precedes the table after ``mark``, the table, and what follows."""
    begin = f"<!-- {mark} -->\n"
    before, rest = file.read_text(encoding="utf-8").split(begin)
    table, after = rest.split(END, 1)
    return before + begin, table, END + after


def place(study: type[reproduce.Atlas], row: Row) -> tuple[int, int, int]:
    """Return a sort key: where a row stands among others of its study."""
    cell = next(i for i, cell in enumerate(study.cells()) if reproduce.rows_in([row], cell))
    return cell, study.known.index(row["method"]), row["seed"]


def rows_of_study(study: type[reproduce.Atlas]) -> list[Row]:
    """Return the rows that are kept of a study."""
    return written(study, RESULTS)


def written(study: type[reproduce.Atlas], folder: Path) -> list[Row]:
    """Return the study's rows that `pfedgpa reproduce` wrote to ``folder``."""
    file = folder / f"{study.name}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [json.loads(line) for line in lines]


def add_rows(study: type[reproduce.Atlas], folder: Path) -> None:
    """Keep the study's rows that `pfedgpa reproduce` wrote to ``folder``, if there are any."""
    new = written(study, folder)
    if not new:
        return
    both = {place(study, row): row for row in rows_of_study(study) + new}
    lines = "".join(json.dumps(both[key]) + "\n" for key in sorted(both))
    write_text(RESULTS / f"{study.name}.jsonl", lines)


def all_of_table1() -> list[Row]:
    """Return the rows of `pfedgpa reproduce table1`, and the comparisons' with the same methods."""
    found = rows_of_study(table1.Table1)
    for experiment, (data, clients) in COMPARED.items():
        rows = [r for r in read(file_of(experiment)) if r["method"] in table1.METHODS_OF_TABLE]
        found += [row | asdict(table1.column(data, clients)) for row in rows]
    return found


def main() -> None:
    """Keep the given folders' results, and renew the tables and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="that the commands wrote to")
    for folder in parser.parse_args().folders:
        add(folder)
        for study in STUDIES:
            add_rows(study, folder)
    for (file, mark), text in quotes().items():
        before, _, after = around(file, mark)
        write_text(file, f"{before}\n{text.strip()}\n\n{after}")
    for file, drawn in figures().items():
        write_text(file, drawn)


if __name__ == "__main__":
    main()
