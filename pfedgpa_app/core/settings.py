"""How a setting is declared: its default, range and meaning, in one line; and what refuses."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

RESULTS, LAUNCH = "results", "launch"  # what settings have a part in
LEARNING_RATES = (0.02, 0.05, 0.1)  # that `pfedgpa tune` tries
TRACKERS = ("tensorboard", "wandb", "mlflow")  # dashboards


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the text is for the user."""


class DataError(RuntimeError):
    """The data are absent or unusable; the text tells the user what to do."""


def near(name: str, names: Iterable[str]) -> str:
    """The end of a sentence that refuses ``name``: the one of ``names`` that may be meant."""
    found = closest(name, names)
    return f"; did you mean {found}?" if found else "."


def closest(name: str, names: Iterable[str]) -> str:
    """The one of ``names`` that a user may mean by ``name``; "" if it is like none."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1)
    return found[0] if found else ""


def listed(names: Sequence[str], most: int = 9) -> str:
    """Names as a sentence lists them, so many of them."""
    return ", ".join(names if len(names) <= most else (*names[:most], "…"))


def shown(value: Any) -> str:
    """A user's value as a sentence repeats it, not at any length."""
    try:
        text = repr(value)
    except ValueError:  # Python writes out no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 200 else f"{text[:200]}…"


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    grid: tuple[Any, ...] = (),
    part: str = RESULTS,
) -> Any:
    """A setting; ``low <= value <= high`` and ``value > above``. ``None`` reads "auto".

    Args:
        grid: the values that `pfedgpa tune` tries.
        part: what it has a part in: a run's results, only its ``launch``, or a part of a method
            that some of those that share the method's settings do without.
    """
    rules = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    rules |= {"grid": grid, "part": part}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class MethodSettings:
    """Settings of one method (keys ``METHOD.*``); each method's file adds its own."""

    learning_rate: float | None = setting(
        None, "SGD learning rate of its rounds; auto: the run's", above=0, grid=LEARNING_RATES
    )
