"""The paper's Table 2 and Figure 4 again: generation with and without inversion, 20 clients.

Beside the paper's two rows are each client's last upload, and pFedGPA as it is by default here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pfedgpa_app.results.log import CLIENTS, Records
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.study import pictures
from pfedgpa_app.study.reproduce import DATA, Cell, Row, rows_in
from pfedgpa_app.study.table1 import PaperCell, Table1, columns_in

METHODS_OF_TABLE = ("last-upload", "pfedgpa-sampled", "pfedgpa-inverted", "pfedgpa-once", "pfedgpa")
WITHOUT, WITH = "pfedgpa-sampled", "pfedgpa-inverted"
COLUMNS = {
    "as sent": "accuracy_before_ft",
    "FT as in training": "accuracy_after_ft_as_in_training",
    "tuned FT": "accuracy_after_ft_tuned",
    "worst client as sent": "accuracy_worst_client_before_ft",
    "clients under 60 % as sent": "clients_under_60_before_ft",
}
# Lai et al., AAAI 2025, Table 2: {data set: {method: accuracy in % before, after fine-tuning}}
PUBLISHED = {
    "emnist": {WITHOUT: (69.38, 81.09), WITH: (83.54, 84.70)},
    "fashion-mnist": {WITHOUT: (68.48, 87.24), WITH: (83.82, 89.37)},
    "cifar10": {WITHOUT: (68.9, 74.77), WITH: (76.28, 75.72)},
}


@dataclass(frozen=True)
class AblationCell(PaperCell):
    """One data set's part of the table."""

    clients: int = 20

    @property
    def methods(self) -> list[str]:
        return list(METHODS_OF_TABLE)


@dataclass(frozen=True)
class Table2(Table1):
    """The runs of the ablation, in one folder."""

    name: ClassVar[str] = "table2"
    picture: ClassVar[str] = "figure4"
    known: ClassVar[tuple[str, ...]] = METHODS_OF_TABLE
    figures: ClassVar[tuple[str, ...]] = tuple(COLUMNS.values())
    only: tuple[str, ...] = METHODS_OF_TABLE

    @classmethod
    def cells(cls, quick: bool = False) -> list[Cell]:
        return [AblationCell(data) for data in (["fashion-mnist"] if quick else reversed(DATA))]

    def wants_more_seeds(self, cell: Cell, rows: Sequence[Row]) -> bool:
        return bool(rows)

    def tables(self, rows: Sequence[Row]) -> str:
        return tables(rows)

    def figure(self, rows: Sequence[Row]) -> str:
        return figure(rows)

    def _rows_of(self, folder: Path) -> list[Row]:
        clients = list(Records(folder / CLIENTS).new())
        return [
            row
            | {
                name: [record[name] for record in clients if record["method"] == row["method"]]
                for name in ("before_ft", "after_ft")
            }
            for row in super()._rows_of(folder)
        ]


def tables(rows: Sequence[Row]) -> str:
    """Return a table for each data set: means ± deviations over seeds, the paper's in brackets."""
    parts = []
    for cell in columns_in(rows):
        lines = []
        for method in METHODS_OF_TABLE:
            if own := [row for row in rows_in(rows, cell) if row["method"] == method]:
                cells = [over_seeds([row[key] for row in own]) for key in COLUMNS.values()]
                published = PUBLISHED[cell.data].get(method, ())
                for i, figure_of_paper in enumerate(published):
                    cells[i] += f" ({figure_of_paper:.2f})"
                lines.append([own[0]["title"], str(len(own)), *cells])
        parts.append(f"### {DATA[cell.data]}\n\n{markdown(['method', 'seeds', *COLUMNS], lines)}\n")
    return "\n".join(parts)


def figure(rows: Sequence[Row]) -> str:
    """Draw every client's accuracy with and without inversion, with the first seed; SVG."""
    panels = {}
    for cell in columns_in(rows):
        lines = {}
        for method, name in ((WITHOUT, "without inversion"), (WITH, "with inversion")):
            own = [row for row in rows_in(rows, cell) if row["method"] == method]
            if own:
                lines[name] = (own[0]["before_ft"], own[0]["after_ft"])
        panels[DATA[cell.data]] = lines
    return pictures.by_client(panels)
