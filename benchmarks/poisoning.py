"""Accuracy of honest clients while others attack, method by method.

    python benchmarks/poisoning.py [--out results/poisoning] [--jobs 2]

20 clients of Fashion-MNIST with 200 images each, 20 rounds, one seed; 10 and 20 % of the clients
attack as ``pfedgpa_app.client.attacks`` says. Runs that are complete are skipped, so it can be
stopped and started again. Prints a table: accuracy in % as sent, mean of the honest
clients; "diverged" where an attack drove every client's weights to infinity.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import ATTACKS
from pfedgpa_app.results.log import is_done, last_event, rows_of
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.study.plan import PlannedRun, expand
from pfedgpa_app.study.sweep import run_sweep

BASE: dict[str, Any] = {
    "conf": "compare-fashion-mnist",
    "train-per-client": 200,
    "num-server-rounds": 20,
    "evaluate-every": 0,
    "fine-tune-grid-epochs": 1,
    "fine-tune-grid-learning-rates": [0.005],
    "save-weights": False,
}
# {row: the settings that make it, apart from the attack}
ROWS: dict[str, dict[str, Any]] = {
    "FedAvg": {"method": "fedavg"},
    "pFedGPA": {"method": "pfedgpa"},
    "pFedGPA, max-distance 2.5": {"method": "pfedgpa", "max-distance": 2.5},
    "Krum": {"method": "krum"},
    "trimmed mean": {"method": "trimmed-mean"},
}
CONDITIONS = [("none", 0.0)] + [(a, s) for a in ATTACKS if a != "none" for s in (0.1, 0.2)]


def planned(out: Path) -> dict[tuple[str, str, float], PlannedRun]:
    """Return {(row, attack, share of malicious clients): its run}."""
    runs = {}
    for row, settings in ROWS.items():
        for attack, share in CONDITIONS:
            over = settings | {"attack": attack, "malicious-share": share}
            if row == "Krum":  # Krum is told how many attack
                over["krum.malicious"] = len(resolve(BASE | over).config.malicious_clients)
            [runs[row, attack, share]] = expand(BASE, {k: [v] for k, v in over.items()}, out)
    return runs


def accuracy(run: PlannedRun) -> str:
    """Return the honest clients' mean before fine-tuning in %, or "diverged"."""
    if not is_done(run.folder):
        last = last_event(run.folder)
        if "min-uploads" not in last["text"]:
            raise SystemExit(f"{run.folder}: {last['text']}")
        return "diverged"
    [row] = rows_of(run.folder)
    return f"{row['accuracy_before_ft']:.1f}"


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/poisoning"))
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    runs = planned(options.out)
    run_sweep(list(runs.values()), options.out, APP_DIR, options.jobs)
    header = ["", *(f"{a}, {s:.0%}" if s else a for a, s in CONDITIONS)]
    rows = [[row, *(accuracy(runs[row, *condition]) for condition in CONDITIONS)] for row in ROWS]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
