"""Clients that join late, which the paper calls new clients, on every data set.

After the last round, five clients, one of each hidden group, join fifteen others. pFedGPA's weights
for them are denoised and, in runs of their own, also guided as by the paper's eq. 10.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pfedgpa_app.results.log import rows_of
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.study.later import Later, LaterCell
from pfedgpa_app.study.plan import Settings
from pfedgpa_app.study.reproduce import DATA, OURS, Cell, Row

METHODS_OF_JOIN = ("local", "fedavg", "pfedhn", OURS)
MODES = {"tweedie": "", "guided": ", guided"}
ITERATIONS = 5


@dataclass(frozen=True)
class JoinCell(LaterCell):
    """A data set, and how pFedGPA makes weights for the clients that join."""

    mode: str = "tweedie"

    @property
    def settings(self) -> Settings:
        joining = {"join-clients": 5, "join-iterations": ITERATIONS}
        lasting = {"num-server-rounds": 30, "evaluate-every": 0}
        return super().settings | joining | lasting | {"fine-tune-grid-epochs": 5}

    @property
    def methods(self) -> list[str]:
        return [OURS] if self.mode == "guided" else list(METHODS_OF_JOIN)

    @property
    def name(self) -> str:
        return f"{self.data}-{self.mode}"


@dataclass(frozen=True)
class Join(Later):
    """The runs in which clients join, in one folder."""

    name: ClassVar[str] = "join"
    known: ClassVar[tuple[str, ...]] = METHODS_OF_JOIN
    own: ClassVar[frozenset[str]] = Later.own | {"join-clients", "join-iterations"}
    only: tuple[str, ...] = METHODS_OF_JOIN

    @classmethod
    def cells(cls, quick: bool = False) -> list[Cell]:
        return [JoinCell(name, mode=mode) for name in cls.data(quick) for mode in MODES]

    def tables(self, rows: Sequence[Row]) -> str:
        return tables(rows)

    def _search(self, cell: Cell) -> Settings:
        assert isinstance(cell, JoinCell)
        return {"pfedgpa.join-mode": cell.mode}

    def _rows_of(self, folder: Path) -> list[Row]:
        names = ("method", "title", "seed", "rounds", "accuracy_of_joining_clients")
        founders = ("accuracy_before_ft", "accuracy_after_ft_tuned")
        return [{name: row[name] for name in (*names, *founders)} for row in rows_of(folder)]


def tables(rows: Sequence[Row]) -> str:
    """Return a table for each data set, in Markdown: accuracies, ± over seeds.

    They are those of clients that joined, as welcomed and after each upload, and the founders'.
    """
    heads = ["welcomed", *map(str, range(1, ITERATIONS + 1)), "founders", "tuned FT"]
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        lines = []
        for mode, told in MODES.items():
            for method in METHODS_OF_JOIN:
                own = [
                    r for r in rows if (r["data"], r["mode"], r["method"]) == (data, mode, method)
                ]
                if own:
                    joining = zip(*(r["accuracy_of_joining_clients"] for r in own), strict=True)
                    founders = ("accuracy_before_ft", "accuracy_after_ft_tuned")
                    columns = [*joining, *([r[name] for r in own] for name in founders)]
                    cells = [over_seeds(values, digits=1) for values in columns]
                    lines.append([own[0]["title"] + told, str(len(own)), *cells])
        table = markdown(["method", "seeds", *heads], lines)
        parts.append(f"### {DATA[data]}\n\n{table}\n")
    return "\n".join(parts)
