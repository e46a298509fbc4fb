"""What the command lines of several subcommands have in common."""

from __future__ import annotations

import os
import re
import tomllib
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedgpa_app.config.parse import flat
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.settings import ConfigError, shown

SETTINGS_HELP = "settings, as in seed=1 method=local,pfedgpa; see: pfedgpa settings"


def add_settings(parser: ArgumentParser) -> None:
    """Add settings as words of the command line."""
    parser.set_defaults(words="settings")
    words = parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help=SETTINGS_HELP)
    words.completer = _settings_like  # type: ignore[attr-defined]  # argcomplete's


def _settings_like(prefix: str, **more: Any) -> list[str]:
    """Return what a shell may offer for the beginning of a setting."""
    from pfedgpa_app.config.names import keys

    key, _, value = prefix.partition("=")
    if key == prefix:
        return [f"{name}=" for name in keys() if name.startswith(prefix)]
    choices = keys()[key].rules["choices"] if key in keys() else ()
    return [f"{key}={c}" for c in choices or () if str(c).startswith(value)]


def add_conf(parser: ArgumentParser, required: bool = False) -> None:
    """Add the option for the experiment, whose settings the given ones override."""
    text = "experiment in conf/, or a YAML file"
    parser.add_argument("--conf", required=required, help=text)


def add_engine(parser: ArgumentParser) -> None:
    """Add the option for the engine, which is a setting, too."""
    text = "auto, ray, process or batched; the same as engine="
    parser.add_argument("--engine", help=text)


def add_app(parser: ArgumentParser) -> None:
    """Add the option for the folder of the Flower app to run."""
    parser.add_argument("--app", type=Path, default=APP_DIR, help="folder of the Flower app")


def add_client(parser: ArgumentParser) -> None:
    """Add the options that choose a run and a client's network in it."""
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's folder")
    parser.add_argument("--client", required=True, help="its number (0, 1, …) or its user's name")
    parser.add_argument(
        "--method", default="", help="the method whose weights to use; default: the run's last"
    )


def add_jobs(parser: ArgumentParser) -> None:
    """Add the options for how many runs go on at a time, and where."""
    text = "runs at a time; default: as many as the cores allow"
    parser.add_argument("--jobs", type=int, help=text)
    parser.add_argument(
        "--on",
        choices=("here", "ray", "slurm"),
        default="here",
        help="where to run: on this machine, on the Ray cluster at RAY_ADDRESS, or by Slurm",
    )


def overrides(options: Namespace, words: list[str] | None = None) -> dict[str, Any]:
    """Return the settings that a command line has.

    Args:
        words: those that are settings, if not all of ``options.settings`` are.

    Raises:
        ConfigError: a word is no ``KEY=VALUE``, or its key does not exist.
    """
    settings = parse_overrides(options.settings if words is None else words)
    for name in ("conf", "engine"):
        if value := getattr(options, name, None):
            settings[name] = value
    return settings


def parse_overrides(texts: list[str]) -> dict[str, Any]:
    """Parse ``KEY=VALUE`` settings; a value is TOML, or text if it is not valid TOML.

    A setting that takes text gets the value as text in any case. One of ``texts`` may hold several
    settings, as Flower's --run-config does: ``'seed=1 method="local"'``.

    Raises:
        ConfigError: a word is no ``KEY=VALUE``, or has an empty value, which Flower takes for none
            given.
    """
    settings: dict[str, Any] = {}
    for text in texts:
        for part in split(text):
            key, found, value = part.partition("=")
            if not found or not key.strip():
                raise ConfigError(f"{shown(part)}: settings are given as KEY=VALUE")
            settings[key.strip()] = value_of(key.strip(), value)
    every = flat(settings, "command line")
    if empty := [name for name, value in every.items() if value == ""]:
        raise ConfigError(f"{empty[0]}= (command line): has no value: give it one, or leave it out")
    return every


def value_of(key: str, text: str) -> Any:
    """Return what a setting's text means: 7 or 2026-11-26 stays text if the setting takes text."""
    from pfedgpa_app.config.names import keys

    try:
        value = tomllib.loads(f"v = {text}")["v"]
    except (ValueError, RecursionError):  # not TOML, or a number with thousands of digits
        return text
    wants_text = key in keys() and keys()[key].type in (str, tuple[str, ...])
    return text if wants_text and not isinstance(value, (str, list)) else value


def split(text: str) -> list[str]:
    """Split a word of several settings at spaces that precede a KEY=; values may hold spaces."""
    from pfedgpa_app.config.names import keys

    parts: list[str] = []
    for word in text.split(" "):
        if parts and (word.partition("=")[0] not in keys() or _goes_on(parts[-1])):
            parts[-1] += " " + word
        else:
            parts.append(word)
    return [part.strip() for part in parts if part.strip()]


def _goes_on(part: str) -> bool:
    """Whether a value in double quotes is not closed yet."""
    value = part.partition("=")[2]
    if not value.startswith('"'):
        return False
    try:
        tomllib.loads(f"v = {value}")
    except ValueError:
        return True
    return False


def items(option: str, text: str) -> list[str]:
    """Return the values in an option's text, which commas separate."""
    found = [item.strip() for item in text.split(",")]
    if "" in found:
        raise ConfigError(f"{option} {text!r}: must be one or more values, separated by commas")
    return found


def seeds(text: str) -> list[int]:
    """Return the seeds that ``--seeds`` names, each once."""
    words = items("--seeds", text)
    if not all(re.fullmatch("[0-9]{1,19}", word) for word in words):
        raise ConfigError(
            f"--seeds {shown(text)}: must be whole numbers separated by commas, as in 0,1,2"
        )
    return list(dict.fromkeys(map(int, words)))


def methods_named(text: str, overrides: Mapping[str, Any]) -> list[str]:
    """Return the methods that ``--methods`` names; the user's own are found by ``code-dir``."""
    from pfedgpa_app.config.names import method_named

    code_dir = str(overrides.get("code-dir", ""))
    return [method_named(name, code_dir) for name in items("--methods", text)]


def check_number(option: str, value: int, most: int) -> None:
    """Refuse a number that is not from 1 to ``most``."""
    if not 1 <= value <= most:
        raise ConfigError(f"{option} {value}: must be >= 1 and <= {most}")


def check_folder(folder: Path) -> None:
    """Refuse a path at which no folder can be made to write to."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written to: {there} is not a folder of yours")


def check_runs(settings: dict[str, Any], options: Namespace, out: Path) -> None:
    """Refuse settings and options that a command with many runs cannot take."""
    if options.jobs is not None and options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs}: must be >= 1")
    for key in ("out-dir", "run-name"):
        if key in settings:
            raise ConfigError(
                f"{key}: cannot be set: each run's folder gets a name of its own; use --out"
            )
    check_folder(out)


def refuse_as_settings(settings: dict[str, Any], taken: dict[str, str]) -> None:
    """Refuse settings for which the command has options.

    Args:
        taken: {setting: option}.
    """
    for key, option in taken.items():
        if key in settings:
            raise ConfigError(f"{key}: use {option}")
