"""The paper's ablation (its Table 2): generation with and without inversion.

    python benchmarks/inversion.py [benchmarks/results/compare]

From the runs that ``pfedgpa compare`` left: accuracy in %, mean over clients ± standard deviation
over seeds, and how many clients are under 60 % before fine-tuning.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

from pfedgpa_app.results.log import is_done, rows_of
from pfedgpa_app.results.tables import seeds_table

METHODS = ("last-upload", "pfedgpa-sampled", "pfedgpa-inverted", "pfedgpa-once", "pfedgpa")
COLUMNS = {
    "before FT": "accuracy_before_ft",
    "FT as in training": "accuracy_after_ft_as_in_training",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client before FT": "accuracy_worst_client_before_ft",
    "clients under 60 %": "clients_under_60_before_ft",
}


def main() -> None:
    """Print a table a federation."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, nargs="?", default=Path("benchmarks/results/compare"))
    Rows = dict[str, dict[str, Any]]
    found: dict[str, dict[int, Rows]] = defaultdict(lambda: defaultdict(dict))
    for folder in sorted(path.parent for path in parser.parse_args().out.glob("*/summary.json")):
        for row in rows_of(folder) if is_done(folder) else []:
            federation = f"{row['dataset']}, {row['num_clients']} clients"
            found[federation][row["seed"]][row["method"]] = row
    for federation, seeds in found.items():
        there = [name for name in METHODS if all(name in rows for rows in seeds.values())]
        seeded = [[rows[name] for name in there] for rows in seeds.values()]
        print(f"\n{federation}, {len(seeds)} seeds\n\n{seeds_table(seeded, COLUMNS)}")


if __name__ == "__main__":
    main()
