"""A federation that starts from what another one learned, and one that does not.

The other federation, which ran before, has other clients (another seed). A federation that starts
from trained weights need not wait before it generates. The tables have the mean accuracy after some
of the rounds, without fine-tuning, and the rounds that each method took to come near its own best,
as the paper counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pfedgpa_app.diffusion import saved
from pfedgpa_app.engine import LaunchError
from pfedgpa_app.results.log import rows_of
from pfedgpa_app.results.tables import markdown, over_seeds
from pfedgpa_app.runs.reading import Run
from pfedgpa_app.study.later import Later, LaterCell
from pfedgpa_app.study.plan import Settings, expand
from pfedgpa_app.study.reproduce import DATA, OURS, Cell, Row

METHODS_OF_START = ("local", "fedavg", OURS)
STARTS = ("cold", "warm")
SOURCE_SEED, SOURCE_ROUNDS = 100, 100
TOLD = ("1", "2", "3", "5", "10", "20")  # rounds that the table shows
SOON = "rounds_to_95_percent_of_peak"


@dataclass(frozen=True)
class StartCell(LaterCell):
    """A data set, and whether its federation starts from another one's distribution."""

    start: str = "cold"

    @property
    def settings(self) -> Settings:
        lasting = {"num-server-rounds": 20, "evaluate-every": 1}
        return super().settings | lasting | {"fine-tune-grid-epochs": 0}

    @property
    def methods(self) -> list[str]:
        warm = self.start == "warm"  # a method that shares no weights has nothing to start from
        return [method for method in METHODS_OF_START if not (warm and method == "local")]

    @property
    def name(self) -> str:
        return f"{self.data}-{self.start}"


@dataclass(frozen=True)
class WarmStart(Later):
    """The runs of both kinds of federation, in one folder."""

    name: ClassVar[str] = "warm-start"
    known: ClassVar[tuple[str, ...]] = METHODS_OF_START
    own: ClassVar[frozenset[str]] = Later.own | {"evaluate-every", "start-from"}
    only: tuple[str, ...] = METHODS_OF_START

    @classmethod
    def cells(cls, quick: bool = False) -> list[Cell]:
        return [StartCell(name, start=start) for name in cls.data(quick) for start in STARTS]

    def tables(self, rows: Sequence[Row]) -> str:
        return tables(rows)

    def _search(self, cell: Cell) -> Settings:
        """Run the federation that a warm one starts from, and return the settings to start from it.

        No setting is searched.
        """
        assert isinstance(cell, StartCell)
        if cell.start == "cold":
            return {}
        rounds = {"num-server-rounds": SOURCE_ROUNDS} | self.settings
        own = rounds | {"evaluate-every": 0, "save-weights": True, "seed": SOURCE_SEED}
        base, folder = self._settings(cell) | own, self.out / cell.name / "source"
        [source] = expand(base, {"method": [[OURS]]}, folder)
        if not self.run_all([source]):
            raise LaunchError(f"the federation to start from failed; see {source.folder}")
        learned = source.folder / saved.FILE
        return {"start-from": str(learned), "pfedgpa.generate-from": 2}

    def _rows_of(self, folder: Path) -> list[Row]:
        curves = Run(folder).curves
        return [
            {name: row[name] for name in ("method", "title", "seed", "rounds", SOON)}
            | {"curve": {str(r): value for r, value in curves[row["method"]].items()}}
            for row in rows_of(folder)
        ]


def tables(rows: Sequence[Row]) -> str:
    """Return accuracy after some of the rounds, ± over seeds, and rounds to 95 % of the peak."""
    parts = []
    for data in dict.fromkeys(row["data"] for row in rows):
        here = [row for row in rows if row["data"] == data]
        told = [r for r in TOLD if all(r in row["curve"] for row in here)]
        lines = []
        for start in STARTS:
            for method in METHODS_OF_START:
                own = [row for row in here if (row["start"], row["method"]) == (start, method)]
                if own:
                    cells = [over_seeds([row["curve"][r] for row in own], digits=1) for r in told]
                    soon = over_seeds([row[SOON] for row in own], digits=1)
                    lines.append([own[0]["title"], start, str(len(own)), *cells, soon])
        heads = ["method", "start", "seeds", *(f"round {r}" for r in told), "rounds to 95 %"]
        parts.append(f"### {DATA[data]}\n\n{markdown(heads, lines)}\n")
    return "\n".join(parts)
