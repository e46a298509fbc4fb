"""What the studies of late clients and of later federations have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from pfedgpa_app.study.plan import Settings
from pfedgpa_app.study.reproduce import DATA, Atlas, Cell, Row

EXPERIMENT = {
    "cifar10": "compare-cifar10",
    "fashion-mnist": "compare-fashion-mnist",
    "emnist": "emnist-20",
}


@dataclass(frozen=True)
class LaterCell(Cell):
    """A data set with 20 clients; its settings are the experiment's, and none is searched."""

    clients: int = 20
    partition: str = "dominant"
    images: int = 600

    @property
    def settings(self) -> Settings:
        conf = EXPERIMENT[self.data]
        return {"conf": conf, "train-per-client": self.images, "precision": "float32"}

    @property
    def searched(self) -> tuple[Cell, Cell]:
        return self, self


@dataclass(frozen=True)
class Later(Atlas):
    """The runs of such a study, always with all seeds; it has no figure."""

    thing: ClassVar[str] = "study"

    @classmethod
    def data(cls, quick: bool) -> list[str]:
        """Return the data sets, the cheapest first."""
        return ["fashion-mnist"] if quick else list(reversed(DATA))

    def wants_more_seeds(self, cell: Cell, rows: Sequence[Row]) -> bool:
        return bool(rows)

    def figure(self, rows: Sequence[Row]) -> str:
        return ""
