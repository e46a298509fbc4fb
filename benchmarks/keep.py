"""Keep a comparison's results in the repository, and quote them in README.md and docs/results.md.

    python benchmarks/keep.py results/compare [MORE …]

Of every finished run that `pfedgpa compare` left there: its settings and events, without paths of
this machine, and its figures. Tables are made of all that is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.results.log import EVENTS, is_done
from pfedgpa_app.study.compare import finished, overview, report, table

KEPT = APP_DIR / "benchmarks" / "results" / "compare"
FIGURES = ("summary.json", "clients.jsonl")
OF_THIS_MACHINE = ("out-dir", "data-dir")
BEGIN, END = "<!-- compare -->\n", "<!-- end -->"


def keep(run: Path) -> None:
    """Copy a finished run's small files to where results are kept."""
    kept = KEPT / run.name
    kept.mkdir(parents=True, exist_ok=True)
    settings = json.loads((run / "config.json").read_text(encoding="utf-8"))
    settings = {name: value for name, value in settings.items() if name not in OF_THIS_MACHINE}
    events = [json.loads(line) for line in (run / EVENTS).read_text(encoding="utf-8").splitlines()]
    events = [event | {"text": event["text"].replace(f"{run.parent}/", "")} for event in events]
    for figures in FIGURES:
        if run != kept:
            shutil.copyfile(run / figures, kept / figures)
    (kept / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    (kept / EVENTS).write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )


def quote(file: Path, text: str) -> None:
    """Put ``text`` between the two marks of ``file``."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    file.write_text(f"{before}{BEGIN}\n{text.strip()}\n\n{END}{after}", encoding="utf-8")


def main() -> None:
    """Keep what is asked for and renew the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("comparisons", type=Path, nargs="*", help="folders that `compare` wrote to")
    for folder in parser.parse_args().comparisons:
        for run in sorted(path.parent for path in folder.absolute().glob("*/summary.json")):
            if is_done(run):
                keep(run)
    (KEPT / "compare.md").write_text(report(KEPT), encoding="utf-8")
    found = finished(KEPT)
    quote(APP_DIR / "README.md", overview(found))
    quote(APP_DIR / "docs" / "results.md", table(found))


if __name__ == "__main__":
    main()
