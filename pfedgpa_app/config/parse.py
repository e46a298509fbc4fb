"""Turn what users write into typed values, or refuse it by key, value and range."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pfedgpa_app.core.settings import LAUNCH, ConfigError, near, shown

MOST = 2**63 - 1  # the largest whole number that NumPy and Flower hold
Scalar = str | int | float | bool


@dataclass(frozen=True)
class Key:
    """A setting: its name as the user writes it, what it holds, and what it allows."""

    name: str
    type: Any
    default: Any
    rules: Mapping[str, Any]

    @property
    def is_for_launch(self) -> bool:
        """Whether it influences a run's launch only, not its results."""
        return bool(self.rules["part"] == LAUNCH)


def fields_of(kind: type, prefix: str = "") -> Iterator[Key]:
    """Yield the settings that the dataclass ``kind`` declares; ``prefix`` is put before names."""
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.metadata:
            name = prefix + f.name.replace("_", "-")
            yield Key(name, hints[f.name], f.default, f.metadata)


def parse(key: Key, value: Any, source: str) -> Any:
    """Return ``value`` as the key's type, or raise a ConfigError that says what is allowed."""

    def refuse(allowed: str) -> ConfigError:
        return ConfigError(f"{key.name} = {shown(value)} ({source}): {allowed}")

    wanted, auto = key.type, False
    if typing.get_origin(wanted) is types.UnionType:  # int | None: None is "auto"
        wanted, auto = typing.get_args(wanted)[0], True
    if auto and (value is None or value == "auto"):
        return None
    if typing.get_origin(wanted) is tuple:
        item = typing.get_args(wanted)[0]
        items = value.split(",") if isinstance(value, str) else value
        items = items if isinstance(items, (list, tuple)) else [items]
        items = [i.strip() if isinstance(i, str) else i for i in items]
        if not items or "" in items:
            raise refuse("must be one or more values, separated by commas")
        return tuple(parse(dataclasses.replace(key, type=item), i, source) for i in items)

    if wanted is bool:
        if not isinstance(value, bool):
            raise refuse("must be true or false")
    elif wanted is str:
        if not isinstance(value, str):
            raise refuse("must be text; put it in quotes")
        if "\0" in value:
            raise refuse("must not hold a NUL character")
    else:
        number = _number(value, wanted)
        if number is None:
            kind = "a whole number" if wanted is int else "a number"
            several = value.split(",") if isinstance(value, str) else value
            many = isinstance(several, (list, tuple)) and len(several) > 1
            how = f"; for several values, use pfedgpa sweep --over {key.name}={argument(several)}"
            raise refuse(f"must be {kind}" + (' or "auto"' if auto else "") + (how if many else ""))
        if bounds := _bounds_broken(number, key.rules):
            raise refuse(f"must be {bounds}")
        value = number
    choices = key.rules["choices"]
    if choices and value not in choices:
        raise refuse(f"must be one of {', '.join(choices)}{near(value, choices)}")
    return value


def check_section(method: str, values: Any) -> None:
    """Refuse a method's own settings out of range where they were made without ``resolve``."""
    for key in fields_of(type(values), f"{method}."):
        field = key.name.rpartition(".")[2].replace("-", "_")
        parse(key, getattr(values, field), type(values).__name__)


def _bounds_broken(number: int | float, rules: Mapping[str, Any]) -> str:
    """Return the bounds, in words, if a ``number`` lies outside them; "" if it does not."""
    low, high, above = (rules[k] for k in ("low", "high", "above"))
    if isinstance(number, int) and number > MOST:
        high = min(high, MOST)
    if low <= number <= high and number > above:
        return ""
    bounds = [f"> {above}"] if above > -math.inf else []
    bounds += [f">= {low}"] if low > -math.inf else []
    bounds += [f"<= {high}"] if high < math.inf else []
    return " and ".join(bounds)


def _number(value: Any, wanted: type[int] | type[float]) -> int | float | None:
    """Return ``value``, a number or its text, as a finite number of type ``wanted``; else None."""
    if isinstance(value, bool):
        return None
    if wanted is int and isinstance(value, int):
        return value  # it may exceed a float's range
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    whole = wanted is float or number.is_integer()
    return wanted(number) if math.isfinite(number) and whole else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of nested settings, with dots in the names."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flat(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Return ``values`` with ``pfedgpa.rank: 5`` for ``pfedgpa: {rank: 5}``.

    Raises:
        ConfigError: a setting is there in both ways.
    """
    found: dict[str, Any] = {}
    for name, value in flatten(values):
        if name in found:
            raise ConfigError(f"{name} ({source}): is given twice")
        found[name] = value
    return found


def argument(value: Any) -> str:
    """Return a setting's value as it is written in ``KEY=VALUE``."""
    if isinstance(value, (list, tuple)):
        return ",".join(map(argument, value))
    if value is None:
        return "auto"
    return str(value).lower() if isinstance(value, bool) else str(value)


def in_toml(settings: Mapping[str, Any]) -> str:
    """Return settings as Flower's command line takes them; JSON's scalars are TOML's, too."""

    def toml(value: Any) -> str:
        if isinstance(value, (list, tuple)):
            return json.dumps(",".join(map(str, value)))
        return json.dumps(value, ensure_ascii=False)

    return " ".join(f"{key}={toml(value)}" for key, value in settings.items())
