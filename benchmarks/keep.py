"""Keep a comparison's results in the repository, and quote them in README.md and docs/results.md.

    python benchmarks/keep.py [results/compare …]

Of every finished run that `pfedgpa compare` left there: a line a method and seed in
benchmarks/results/compare/EXPERIMENT.jsonl, with its figures, its clients' accuracies and the
settings that were not defaults. Tables are made of all that is kept.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.methods import METHODS
from pfedgpa_app.results.log import is_done, rows_of
from pfedgpa_app.run.folder import kept_settings
from pfedgpa_app.study.compare import Finished, overview, report_of, table

KEPT = APP_DIR / "benchmarks" / "results" / "compare"
OF_THIS_MACHINE = ("out-dir", "data-dir", "code-dir", "run-name")
ACCURACIES = ("before_ft", "after_ft", "kept")
BEGIN, END = "<!-- compare -->\n", "<!-- end -->"


def rows_to_keep(run: Path) -> list[dict[str, Any]]:
    """A finished run's rows, a method each, with its clients' accuracies and its settings."""
    lines = (run / "clients.jsonl").read_text(encoding="utf-8").splitlines()
    clients = [json.loads(line) for line in lines]
    settings = {
        name: entry["value"]
        for name, entry in kept_settings(run).items()
        if entry["from"] != "default" and name not in OF_THIS_MACHINE
    }
    rows = []
    for row in rows_of(run):
        mine = [line for line in clients if line["method"] == row["method"]]
        accuracies = {kind: [round(line[kind], 4) for line in mine] for kind in ACCURACIES}
        rows.append(row | {"clients": accuracies, "settings": settings})
    return rows


def kept() -> Finished:
    """{experiment: {method: what is kept of it, a seed each}}."""
    found: Finished = {}
    for file in sorted(KEPT.glob("*.jsonl"), key=lambda file: file.stem):
        methods = found.setdefault(file.stem, {})
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            methods.setdefault(row["method"], []).append(row)
    return found


def keep(runs: list[Path], found: Finished) -> None:
    """Add ``runs`` to what is kept; one of the same method and seed takes another's place."""
    for run in runs:
        experiment = found.setdefault(Path(kept_settings(run)["conf"]["value"]).stem, {})
        for row in rows_to_keep(run):
            others = [r for r in experiment.get(row["method"], []) if r["seed"] != row["seed"]]
            experiment[row["method"]] = sorted([*others, row], key=lambda r: int(r["seed"]))
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, methods in found.items():
        rows = [row for method in METHODS for row in methods.get(method, [])]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(KEPT / f"{name}.jsonl", text)


def quoted(file: Path, text: str) -> str:
    """``file``'s text with ``text`` between its two marks."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{text.strip()}\n\n{END}{after}"


def quotes(found: Finished) -> dict[Path, str]:
    """{file that quotes the tables: its text as it must be}."""
    texts = {"README.md": overview(found), "docs/results.md": table(found)}
    files = {APP_DIR / name: quoted(APP_DIR / name, text) for name, text in texts.items()}
    return files | {KEPT / "compare.md": report_of(found)}


def main() -> None:
    """Keep what is asked for and renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparisons", type=Path, nargs="*", help="folders that `compare` wrote to")
    folders = [folder.absolute() for folder in parser.parse_args().comparisons]
    runs = sorted(path.parent for folder in folders for path in folder.glob("*/summary.json"))
    found = kept()
    keep([run for run in runs if is_done(run)], found)
    for file, text in quotes(kept()).items():
        write_text(file, text)


if __name__ == "__main__":
    main()
