"""The results of several runs over seeds: a row for each method, and its curve over rounds."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from pfedgpa_app.config.names import keys
from pfedgpa_app.config.parse import argument
from pfedgpa_app.results.figures import Curve
from pfedgpa_app.results.tables import over_seeds, recipes_in_words, without_some
from pfedgpa_app.runs.reading import Row, Run

# {heading: key of an entry of summary.json}
COLUMNS = {
    "kept": "accuracy_kept",
    "as sent": "accuracy_before_ft",
    "after FT": "accuracy_after_ft",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client": "accuracy_worst_client_kept",
}


@dataclass(frozen=True)
class Entry:
    """A row of the table: a method under some settings, over seeds."""

    name: str
    recipes: str
    values: dict[str, list[float]]
    costs: tuple[str, str]
    analysis_only: bool
    only: str  # names the seeds, if other rows have more

    def text(self, column: str) -> str:
        """Return mean ± standard deviation over seeds."""
        known = [value for value in self.values[column] if not math.isnan(value)]
        return over_seeds(known, 1 if len(known) < 2 else 2)

    def cells(self, every: Sequence[Entry]) -> list[dict[str, str]]:
        """Return the row's cells for the page, the best and second best of a column marked."""
        cells = [{"text": self.name + self.only, "kind": ""}]
        for column, values in self.values.items():
            means = sorted(
                {round(mean(e.values[column]), 6) for e in every if _counts(e, column)},
                reverse=True,
            )
            marks = ("best", "second") if len(means) > 2 else ("best",)
            kinds = dict(zip(means, marks, strict=False))
            mine = kinds.get(round(mean(values), 6), "") if _counts(self, column) else ""
            cells.append({"text": self.text(column), "kind": mine})
        return [*cells, *({"text": text, "kind": "text"} for text in (self.recipes, *self.costs))]


def _counts(entry: Entry, column: str) -> bool:
    """Whether an entry can be the best: methods for analysis only know what no server does."""
    return bool(entry.values[column]) and not entry.analysis_only


def table_of(runs: Sequence[Run]) -> tuple[list[str], list[Entry]]:
    """Return the headings, and an entry for each method under each choice of what the runs vary."""
    shown = [
        c for c, k in COLUMNS.items() if any(r.get(k) is not None for x in runs for r in x.rows)
    ]
    varied = _varied(runs)
    alike: dict[tuple[str, str], dict[int, tuple[float, Row]]] = {}
    for run in runs:
        for row in run.rows:
            choice = ", ".join(
                f"{k}={argument(v)}" for k, v in run.choice(row["method"], varied).items()
            )
            seeds = alike.setdefault((row["title"], choice), {})
            if row["seed"] not in seeds or seeds[row["seed"]][0] < run.ended:
                seeds[row["seed"]] = run.ended, row  # the newest of several runs of a seed
    every, entries = sorted({seed for seeds in alike.values() for seed in seeds}), []
    for (title, choice), seeds in alike.items():
        rows = [row for _, row in seeds.values()]
        values = {c: [r[COLUMNS[c]] for r in rows if r.get(COLUMNS[c]) is not None] for c in shown}
        seconds = mean(row.get("server_seconds", 0.0) for row in rows)
        up = mean(row.get("bytes_up", 0) / max(1, row["rounds"]) for row in rows)
        costs = (f"{seconds:.1f} s", f"{up / 1e6:.2f} MB")
        name = f"{title} ({choice})" if choice else title
        only = (
            "" if sorted(seeds) == every else f" [seed {', '.join(map(str, sorted(seeds)))} only]"
        )
        name += without_some(rows)
        recipes = recipes_in_words(rows)
        entries.append(Entry(name, recipes, values, costs, rows[0]["analysis_only"], only))
    return ["method", *shown, "FT", "server", "upload a round"], entries


def _varied(runs: Sequence[Run]) -> list[str]:
    """Return the settings, other than the seed, that differ between runs whose methods use them."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, entry in run.goes_by([row["method"] for row in run.rows]).items():
            if name in keys() and not keys()[name].is_for_launch:
                found.setdefault(name, set()).add(json.dumps(entry["value"]))
    return [n for n, kinds in found.items() if len(kinds) > 1 and n not in ("seed", "method")]


def curves_of(runs: Sequence[Run]) -> tuple[dict[str, Curve], dict[str, float]]:
    """Return {federation: its mean curve over seeds}, {method without rounds: its accuracy}."""
    varied, gathered = _varied(runs), dict[str, dict[int, dict[int, float]]]()
    ends: dict[str, dict[int, float]] = {}
    for run in sorted(runs, key=lambda run: run.ended):  # the newest of a seed comes last and stays
        titles = {row["method"]: row["title"] for row in run.rows}
        seed = run.settings["seed"]["value"]
        for federation, rounds in run.curves.items():
            choice = ", ".join(map(argument, run.choice(federation, varied).values()))
            name = titles.get(federation, federation) + (f" ({choice})" if choice else "")
            for r, accuracy in rounds.items():
                gathered.setdefault(name, {}).setdefault(r, {})[seed] = accuracy
        for row in run.rows:
            if row["method"] not in run.curves and not run.choice(row["method"], varied):
                ends.setdefault(row["title"], {})[seed] = row["accuracy_before_ft"]
    found: dict[str, Curve] = {}
    for name, points in gathered.items():
        by_round = [(r, list(seeds.values())) for r, seeds in sorted(points.items())]
        found[name] = [(r, mean(a), stdev(a) if len(a) > 1 else 0.0) for r, a in by_round]
    return found, {name: mean(seeds.values()) for name, seeds in ends.items()}


def as_csv(entries: Sequence[Entry]) -> str:
    """Return means and standard deviations over seeds as CSV."""
    file = io.StringIO()
    columns = list(entries[0].values)
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["method", *(f"{c}{of}" for c in columns for of in ("", " sd")), "seeds"])
    for entry in entries:
        cells: list[Any] = [entry.name]
        for values in entry.values.values():
            cells += [round(mean(values), 5) if values else ""]
            cells += [round(stdev(values), 5) if len(values) > 1 else ""]
        writer.writerow([*cells, max(len(v) for v in entry.values.values())])
    return file.getvalue()


def as_latex(entries: Sequence[Entry]) -> str:
    """Return the table as a LaTeX tabular, the best of each column in bold."""
    columns = list(entries[0].values)
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule"]
    lines += [" & ".join(["method", *columns]) + r" \\", r"\midrule"]
    for entry in entries:
        cells = [_escaped(entry.name + entry.only)]
        marks = [cell["kind"] for cell in entry.cells(entries)[1 : 1 + len(columns)]]
        for column, mark in zip(columns, marks, strict=True):
            text = entry.text(column).replace("±", r"$\pm$").replace("–", "--")
            cells.append(rf"\textbf{{{text}}}" if mark == "best" else text)
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    for letter in "&%$#_{}":
        text = text.replace(letter, f"\\{letter}")
    return text
