"""What a network must know of a data set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pfedgpa_app.core.settings import listed


@dataclass(frozen=True)
class Schema:
    """A data set's classes, and what one example is.

    Attributes:
        shape: of one example: (C, H, W) of an image, (features,) of a row of a table, ….
        tokens: examples are whole numbers that a network looks up, as words of a text are;
            else they are float32.
        pixels: examples are images of 0 to 255, uint8, that are normalised.
        columns: of a table, by name and in order; empty where nobody named them.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: bool = False
    pixels: bool = False
    columns: tuple[str, ...] = ()

    def examples(self, most: int = 12) -> str:
        """What examples are, in words; of columns and classes so many by name."""
        kind = "images" if len(self.shape) == 3 and not self.tokens else "examples"
        columns = f" ({listed(self.columns, most)})" if self.columns else ""
        return (
            f"{kind} of {'×'.join(map(str, self.shape))}{columns} in {len(self.classes)} classes "
            f"({listed(self.classes, most)})"
        )

    def as_dict(self) -> dict[str, Any]:
        """All but the name, of kinds that JSON and messages carry."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key != "name"
        }

    @classmethod
    def of(cls, name: str, found: Mapping[str, Any]) -> Schema:
        """What ``as_dict`` made a dict of.

        Raises:
            KeyError, TypeError, ValueError: it did not, or an example would hold nothing.
        """
        shape = tuple(map(int, found["shape"]))
        if not shape or min(shape) < 1:
            raise ValueError(f"examples are of shape {list(shape)}")
        return cls(
            name,
            tuple(map(str, found["classes"])),
            shape,
            bool(found["tokens"]),
            bool(found["pixels"]),
            tuple(map(str, found.get("columns", ()))),  # none in a run of an earlier version
        )
