"""The paper's ablation (its Table 2): generation with and without inversion.

    python benchmarks/inversion.py

From what is kept of ``pfedgpa compare``: accuracy in %, mean over clients ± standard deviation
over seeds, and how many clients are under 60 % before fine-tuning.
"""

from __future__ import annotations

from keep import kept

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
    """Print a table an experiment."""
    for experiment, methods in kept().items():
        there = [name for name in METHODS if name in methods]
        if "pfedgpa-inverted" in there:
            seeds = list(zip(*(methods[name] for name in there), strict=True))
            print(f"\n{experiment}, {len(seeds)} seeds\n\n{seeds_table(seeds, COLUMNS)}")


if __name__ == "__main__":
    main()
