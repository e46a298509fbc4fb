"""How a setting is declared: its default, range and meaning, in one line; and what refuses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

LEARNING_RATES = (0.02, 0.05, 0.1)  # that `pfedgpa tune` tries


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the text is for the user."""


class DataError(RuntimeError):
    """The data are absent or unusable; the text tells the user what to do."""


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    grid: tuple[Any, ...] = (),
) -> Any:
    """A setting; ``low <= value <= high`` and ``value > above``. ``None`` reads "auto".

    ``grid``: the values that `pfedgpa tune` tries.
    """
    rules = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    rules |= {"grid": grid}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class MethodSettings:
    """Settings of one method (keys ``METHOD.*``); each method's file adds its own."""

    learning_rate: float | None = setting(
        None, "SGD learning rate of its rounds; auto: the run's", above=0, grid=LEARNING_RATES
    )
