"""The paper's ablation (its Table 2): generation with and without inversion.

    python benchmarks/inversion.py [results/compare]

From the runs that ``pfedgpa compare`` left in that folder, or by default from the results kept in
the repository: accuracy in %, mean over clients ± standard deviation over seeds, and how many
clients are under 60 % as sent.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from keep import kept

from pfedgpa_app.results.tables import seeds_table
from pfedgpa_app.study.compare import finished

METHODS = ("last-upload", "pfedgpa-sampled", "pfedgpa-inverted", "pfedgpa-once", "pfedgpa")
COLUMNS = {
    "as sent": "accuracy_before_ft",
    "FT as in training": "accuracy_after_ft_as_in_training",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client as sent": "accuracy_worst_client_before_ft",
    "clients under 60 %": "clients_under_60_before_ft",
}


def main() -> None:
    """Print a table for each federation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", help="default: the results that are kept")
    out = parser.parse_args().out
    for methods in (finished(out) if out else kept()).values():
        seeds = max(len(rows) for rows in methods.values())
        there = [methods[name] for name in METHODS if len(methods.get(name, [])) == seeds]
        if there:
            row, seeded = there[0][0], list(zip(*there, strict=True))
            title = f"{row['dataset']}, {row['num_clients']} clients, {seeds} seeds"
            print(f"\n{title}\n\n{seeds_table(seeded, COLUMNS)}")


if __name__ == "__main__":
    main()
