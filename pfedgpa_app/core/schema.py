"""What a network must know of a data set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schema:
    """A data set's classes, and what one example is.

    Attributes:
        shape: of one example: (C, H, W) of an image, (features,) of a row of a table, ….
        tokens: examples are whole numbers that a network looks up, as words of a text are;
            else they are float32.
    """

    name: str
    classes: tuple[str, ...]
    shape: tuple[int, ...]
    tokens: bool = False
