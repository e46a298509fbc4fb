"""The figures that README.md and docs/results.md quote are made of what is kept."""

from __future__ import annotations

import sys

from pfedgpa_app.core.paths import APP_DIR

sys.path.append(str(APP_DIR / "benchmarks"))

from keep import kept, quotes


def test_tables_are_those_of_what_is_kept() -> None:
    found = kept()
    assert len(found) >= 4
    for file, text in quotes(found).items():
        assert file.read_text(encoding="utf-8") == text, f"python benchmarks/keep.py renews {file}"


def test_a_row_agrees_with_its_clients() -> None:
    for methods in kept().values():
        for rows in methods.values():
            for row in rows:
                before = row["clients"]["before_ft"]
                assert abs(sum(before) / len(before) - row["accuracy_before_ft"]) < 0.01
