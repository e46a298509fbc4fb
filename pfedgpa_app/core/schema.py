"""What a network must know about a data set."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pfedgpa_app.core.settings import DataError, listed, near

WHOLE_NUMBERS = (
    "whole numbers other than uint8 pixels are tokens, which networks look up: convert "
    "measurements to floats"
)


@dataclass(frozen=True)
class Schema:
    """A data set's classes, and the form of its examples.

    Attributes:
        shape: one example's: (C, H, W) for an image, (features,) for a row of a table, ….
        tokens: whether examples are whole numbers that a network looks up, such as words of a text.
        pixels: whether examples are images of 0 to 255, uint8, that are normalised. Examples that
            are neither are float32.
        columns: a table's column names, in order; empty where they have none.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: bool = False
    pixels: bool = False
    columns: tuple[str, ...] = ()

    def examples(self, most: int = 12) -> str:
        """Say in words what examples are, with at most ``most`` columns and classes by name."""
        kind = "images" if len(self.shape) == 3 and not self.tokens else "examples"
        columns = f" ({listed(self.columns, most)})" if self.columns else ""
        return (
            f"{kind} of {'×'.join(map(str, self.shape))}{columns} in {len(self.classes)} classes "
            f"({listed(self.classes, most)})"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return all but the name, in types that JSON and messages carry."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in asdict(self).items()
            if key != "name"
        }

    def checksum(self) -> int:
        """Return a number by which another process recognises all but the name."""
        return zlib.crc32(json.dumps(self.as_dict(), sort_keys=True).encode())

    @classmethod
    def of(cls, name: str, found: Mapping[str, Any]) -> Schema:
        """Make a schema from a dict that ``as_dict`` has made.

        Raises:
            KeyError, TypeError, ValueError: it is no such dict, or an example would hold nothing.
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
            tuple(map(str, found.get("columns", ()))),  # runs of earlier versions have none
        )


def column_places(source: str, there: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Return where each of ``columns`` stands among those ``there``.

    Args:
        source: what has the columns, for messages.

    Raises:
        DataError: one is missing or there twice.
    """
    if odd := [name for name in columns if there.count(name) != 1]:
        lacks = "has no column" if odd[0] not in there else "has more than one column"
        raise DataError(f"{source}: {lacks} {odd[0]!r}{near(odd[0], there)}")
    return [there.index(name) for name in columns]
