"""The paper's Table 1 again: every data set with 10, 20 and 100 clients, beside its figures.

Beside the paper's nine methods are rivals that it does not have. For each data set settings are
searched on validation images, with 20 clients, fewer rounds and a seed of its own: FedAvg's
learning rate, which is every method's own default, then each method's main settings, by the same
grids as in ``pfedgpa tune``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pfedgpa_app.methods import federation_of
from pfedgpa_app.methods.fine_tuning import FedAvgFTTuned
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.study.compare import PAPER
from pfedgpa_app.study.plan import Settings
from pfedgpa_app.study.reproduce import (
    CLOSE,
    COLUMNS,
    DATA,
    OURS,
    Atlas,
    Cell,
    Grids,
    Row,
    contenders,
    means_of,
    rows_in,
)
from pfedgpa_app.study.tune import main_settings

# {clients, in the order of PAPER's figures: images of each}; CIFAR-10 has no more for 100 clients
SIZES = {10: 600, 20: 600, 100: 380}
TUNED_FT = "fedavg-ft-tuned"
RIVALS = (TUNED_FT, "fedavgm", "client-mean")
METHODS_OF_TABLE = (*PAPER["cifar10"], *RIVALS)
SEARCH_ROUNDS = 60
MERIT = "accuracy_as_its_paper"
TUNED = {
    "fine-tune-grid-epochs": 5,
    "fine-tune-grid-learning-rates": "0.001,0.002,0.005,0.01",
}


@dataclass(frozen=True)
class PaperCell(Cell):
    """A column of the table: one federation; see ``column``."""

    partition: str = "dominant"
    images: int = 600

    @property
    def settings(self) -> Settings:
        """Those of its experiment; it has 200 rounds, or 300 for CIFAR-10, as in the paper."""
        return {"conf": self.name, "train-per-client": self.images, "evaluate-every": 0, **TUNED}

    @property
    def methods(self) -> list[str]:
        return list(METHODS_OF_TABLE)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.clients}"

    @property
    def searched(self) -> tuple[Cell, Cell]:
        return column(self.data, 20), column(self.data, 20)


@dataclass(frozen=True)
class Table1(Atlas):
    """The table's runs, in one folder; quick ones use the experiments' settings."""

    name: ClassVar[str] = "table1"
    thing: ClassVar[str] = "table"
    known: ClassVar[tuple[str, ...]] = METHODS_OF_TABLE
    figures: ClassVar[tuple[str, ...]] = (MERIT, *COLUMNS.values())
    only: tuple[str, ...] = METHODS_OF_TABLE

    @classmethod
    def cells(cls, quick: bool = False) -> list[Cell]:
        """Return all nine federations, the cheapest first; ``quick``: one of them."""
        if quick:
            return [column("fashion-mnist", 10)]
        return [column(data, n) for n in SIZES for data in reversed(DATA)]

    @property
    def grids(self) -> Grids:
        own = [m for m in self.only if m != "fedavg" and federation_of(m) == m]
        return {method: grid for method in own if (grid := main_settings(method))}

    def wants_more_seeds(self, cell: Cell, rows: Sequence[Row]) -> bool:
        """Whether there are 20 clients, or a rival is within a point of pFedGPA."""
        means = means_of(rows, MERIT)
        close = OURS in means and any(
            abs(means[OURS] - other) < CLOSE for other in contenders(means).values()
        )
        return bool(rows) and (cell.clients == 20 or close)

    def tables(self, rows: Sequence[Row]) -> str:
        return table(rows)

    def figure(self, rows: Sequence[Row]) -> str:
        return ""

    def _search(self, cell: Cell) -> Settings:
        return {} if self.quick else super()._search(cell)

    def _searching(self, cell: Cell) -> Settings:
        return self._settings(cell) | {"num-server-rounds": SEARCH_ROUNDS} | self.settings


def column(data: str, clients: int) -> PaperCell:
    """Return the federation of that many clients."""
    return PaperCell(data, clients, images=SIZES[clients])


def table(rows: Sequence[Row]) -> str:
    """Return a row for each method and a column for each federation, in Markdown.

    A cell has the mean ± deviation over seeds, and the paper's figure in brackets. Each method is
    evaluated as its paper does.
    """
    cells = [cell for cell in columns_in(rows) if rows_in(rows, cell)]
    heads = [f"{DATA[cell.data]}, {cell.clients} clients" for cell in cells]
    lines = []
    for method in METHODS_OF_TABLE:
        own = [_of(method, rows_in(rows, cell)) for cell in cells]
        if any(own):
            title = next(found[0]["title"] for found in own if found)
            texts = [
                _in_brief(found, _published(c, method)) for c, found in zip(cells, own, strict=True)
            ]
            lines.append([title, *texts])
    return markdown(["method", *heads], lines) + "\n"


def _of(method: str, rows: Iterable[Row]) -> list[Row]:
    """Return a method's rows; tuned FedAvg-FT without any has FedAvg's, with their tuned figure."""
    of = {name: [row for row in rows if row["method"] == name] for name in (method, "fedavg")}
    if method == TUNED_FT and not of[method]:
        return [
            row | {"title": FedAvgFTTuned.title, MERIT: row["accuracy_after_ft_tuned"]}
            for row in of["fedavg"]
        ]
    return of[method]


def columns_in(rows: Iterable[Row]) -> list[Cell]:
    """Return the federations in ``rows``, in the table's order."""
    there = {(row["data"], row["clients"]) for row in rows}
    order = [column(data, clients) for data in DATA for clients in SIZES]
    return [cell for cell in order if (cell.data, cell.clients) in there]


def _published(cell: Cell, method: str) -> str:
    figures = PAPER[cell.data].get(method)
    return f"{figures[[*SIZES].index(cell.clients)]:.2f}" if figures else "–"


def _in_brief(rows: Sequence[Row], published: str) -> str:
    return f"{over_seeds([row[MERIT] for row in rows])} ({published})"
