"""How settings are declared, with default, range and meaning; and what refuses wrong ones."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

RESULTS, LAUNCH = "results", "launch"  # what a setting influences
LEARNING_RATES = (0.02, 0.05, 0.1)  # the values that `pfedgpa tune` tries
TRACKERS = ("tensorboard", "wandb", "mlflow")  # dashboards


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the text is for the user."""


class DataError(RuntimeError):
    """The data are absent or unusable; the text tells the user what to do."""


def near(name: str, names: Iterable[str]) -> str:
    """Return the end of a message that refuses ``name``: what of ``names`` may be meant, or "."."""
    found = closest(name, names)
    return f"; did you mean {found}?" if found else "."


def closest(name: str, names: Iterable[str]) -> str:
    """Return the one of ``names`` that a user may mean by ``name``; "" if none is close."""
    found = difflib.get_close_matches(name.lower(), list(names), n=1)
    return found[0] if found else ""


def listed(names: Sequence[str], most: int = 9) -> str:
    """Join ``names`` by commas, at most ``most`` of them; an ellipsis stands for the rest."""
    return ", ".join(names if len(names) <= most else (*names[:most], "…"))


def shown(value: Any) -> str:
    """Return a user's value as text for messages, cut at 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print a number of thousands of digits
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
    """Declare a setting with ``low <= value <= high`` and ``value > above``.

    The value ``None`` is written "auto".

    Args:
        grid: the values that `pfedgpa tune` tries.
        part: what it influences: a run's ``RESULTS``, only its ``LAUNCH``, or a named part of a
            method, which some of the methods that share these settings lack.
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
