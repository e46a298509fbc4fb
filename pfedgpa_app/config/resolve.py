"""Where a run's settings come from.

A value is looked up in three places, the later one winning: its default, the experiment's
``conf/*.yaml``, and ``--run-config``. ``resolve`` says which one won.
"""

from __future__ import annotations

import contextlib
import json
import os
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pfedgpa_app.config import yaml_file
from pfedgpa_app.config.checks import RUN_CONFIG, check
from pfedgpa_app.config.names import (
    defaults,
    is_idle,
    is_read,
    keys,
    known,
    method_named,
    sections,
)
from pfedgpa_app.config.parse import Scalar, fields_of, flat, flatten, parse
from pfedgpa_app.core.paths import APP_DIR, YAML, user_path
from pfedgpa_app.core.sections import PARTITION_FILE, Config, S
from pfedgpa_app.core.settings import ConfigError, near
from pfedgpa_app.methods.own import STUDIED, reference_of


def conf_path(conf: str) -> Path:
    """Return the YAML file that ``conf`` names: in the app's conf/, or a path of the user's.

    Raises:
        ConfigError: there is no such file.
    """
    given, own = user_path(conf), APP_DIR / "conf"
    places = [given] if given.is_absolute() else [given, APP_DIR / given]
    if given.suffix not in YAML:
        places = [own / f"{conf}.yaml"]
    for path in places:
        if os.path.isfile(path):  # also false for a name that is too long
            return path
    if os.path.isdir(given):
        why = "is a folder, not a file"
    elif os.path.isfile(given):
        why = f"is a file, but its name does not end in {' or '.join(YAML)}"
    elif given.suffix not in YAML:
        why = f"no file of that name in {own}"
    else:
        why = "no file there" + ("" if given.is_absolute() else f", nor below {APP_DIR}")
    names = sorted(p.stem for p in own.glob("*.yaml"))
    raise ConfigError(f"conf = {conf!r}: {why}{near(conf, names)} Experiments: {', '.join(names)}")


def _conf_layers(
    conf: str, over: Mapping[str, Any], above: tuple[Path, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """Return (file's name, its values) of ``conf``, after those of the files it builds on.

    A file builds on the one that its own ``conf`` names. A user's file that names none builds on
    what a run without a file would have, so that the same settings mean the same in a file and on
    the command line.

    Args:
        over: settings laid over the file's.
    """
    path = conf_path(conf)
    if path in above:
        raise ConfigError(f"{path}: builds on itself through its `conf`")
    values = flat(yaml_file.read(path), str(path))
    base, over = values.pop("conf", None), {**values, **over}
    if not base and path.resolve().parent != (APP_DIR / "conf").resolve():
        base = _default_conf(over)
    below = _conf_layers(str(base), over, (*above, path)) if base else []
    return [*below, (path.name, values)]


def inherited(conf: str, over: Mapping[str, Any]) -> dict[str, Any]:
    """Return {setting: value} of the files that the file of ``conf`` builds on, without its own.

    Args:
        over: settings laid over the file's.
    """
    return {n: v for _, values in _conf_layers(conf, over)[:-1] for n, v in values.items()}


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each key, where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return ``{key: {"value": …, "from": …}}``, JSON-ready."""
        shown = {}
        for name in keys():
            section, _, field = name.rpartition(".")
            holder = self.config.of(sections()[section]) if section else self.config
            value = getattr(holder, field.replace("-", "_"))
            if name == "method":
                value = tuple(map(reference_of, value))
            shown[name] = {"value": "auto" if value is None else value, "from": self.sources[name]}
        return shown


def values_of(described: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return {setting: value} from ``Resolved.as_dict``, or from what a run's folder holds."""
    return {name: entry["value"] for name, entry in described.items()}


def given(resolved: Resolved) -> dict[str, Any]:
    """Return {setting: value} of all settings that are not defaults.

    A run that is given these needs no conf file to have the same settings.
    """
    return {
        name: entry["value"]
        for name, entry in resolved.as_dict().items()
        if entry["from"] != "default"
        and name != "conf"
        and not is_idle(keys()[name], resolved.config)
    }


def differences(there: Mapping[str, Any], resolved: Resolved) -> list[str]:
    """List the settings that influence results and differ from ``there``, a stored run's."""
    here, before = json.loads(json.dumps(resolved.as_dict())), defaults()
    return [
        f"{name} = {kept!r} there, {entry['value']!r} here"
        for name, entry in here.items()
        if is_read(keys()[name], resolved.config)
        and (kept := there.get(name, {"value": before[name]})["value"]) != entry["value"]
    ]


def files_of(config: Config) -> dict[str, str]:
    """Return {setting: path} of the files, other than data, that influence results."""
    files = {
        "start-from": config.start_from,
        "uploads": config.uploads,
        "model-weights": config.model_weights,
    }
    return {name: path for name, path in files.items() if path}


def with_absolute_files(settings: Mapping[str, Any], config: Config) -> dict[str, Any]:
    """Return ``settings`` with absolute paths of the files that influence results.

    Args:
        config: what ``settings`` resolve to.
    """
    files = files_of(config)
    absolute = {name: str(user_path(path).absolute()) for name, path in files.items()}
    if config.partition.startswith(PARTITION_FILE):
        file = user_path(config.partition.removeprefix(PARTITION_FILE)).absolute()
        absolute["partition"] = f"{PARTITION_FILE}{file}"
    return {**settings, **absolute}


def resolve(run_config: Mapping[str, Any] | None = None) -> Resolved:
    """Return the run's configuration: ``run_config`` over its ``conf`` file over the defaults.

    An empty string in ``run_config`` means "not set here": pyproject.toml lists every key
    that way, because Flower lets ``--run-config`` override listed keys only.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, settings that
            contradict each other, or a missing conf file.
    """
    overrides = {k: v for k, v in flatten(run_config or {}) if v != ""}
    conf = str(overrides.get("conf") or _default_conf(overrides))
    layers = [*_conf_layers(conf, overrides), (RUN_CONFIG, overrides)]
    _know_methods(layers)
    for name in overrides:
        known(name, RUN_CONFIG)

    values: dict[str, Any] = {name: key.default for name, key in keys().items()}
    sources = dict.fromkeys(keys(), "default")
    values["conf"] = conf
    for source, layer in layers:
        for name, value in layer.items():
            values[name] = parse(known(name, source), value, source)
            sources[name] = source
    values["method"] = tuple(method_named(name, values["code-dir"]) for name in values["method"])

    def made(kind: type[S], prefix: str = "", **more: Any) -> S:
        names = {
            key.name: key.name[len(prefix) :].replace("-", "_") for key in fields_of(kind, prefix)
        }
        return kind(**{field: values[name] for name, field in names.items()}, **more)

    own: tuple[Any, ...] = tuple(made(kind, name + ".") for name, kind in sections().items())
    config = made(Config, sections=own)
    check(config, sources)
    return Resolved(config, types.MappingProxyType(sources))


def _default_conf(overrides: Mapping[str, Any]) -> str:
    """Return the experiment of a run that names none.

    It is the demo only for the demo's data set, which the demo's sizes are for; otherwise "own".
    """
    default = keys()["conf"].default
    dataset = overrides.get("dataset", keys()["dataset"].default)
    return str(default if dataset == keys()["dataset"].default else "own")


def know_methods(run_config: Mapping[str, Any], more: Iterable[str] = ()) -> None:
    """Register the methods of ``run_config``, of its ``conf`` file and ``more``.

    From then on the settings of those that were given by import path are known.

    Raises:
        ConfigError: as ``resolve``, of the conf file and methods alone.
    """
    conf = str(run_config.get("conf") or _default_conf(run_config))
    _know_methods([*_conf_layers(conf, run_config), (RUN_CONFIG, run_config)], more)


def _know_methods(
    layers: Iterable[tuple[str, Mapping[str, Any]]], more: Iterable[str] = ()
) -> None:
    """Register methods given by import path before their settings are looked at.

    Args:
        more: methods that no layer names.
    """
    code_dir = ""
    for source, layer in layers:  # all layers: a file may have settings of a method that is not run
        code_dir = str(layer.get("code-dir", code_dir))
        if method := layer.get("method"):
            for name in parse(keys()["method"], method, source):
                method_named(name, code_dir)
    for name in more:
        method_named(name, code_dir)
    for name in filter(None, os.environ.get(STUDIED, "").split(",")):
        with contextlib.suppress(ConfigError):  # another experiment's, whose code is not here
            method_named(name, code_dir)


@lru_cache(maxsize=4)
def _resolve_items(items: tuple[tuple[str, Scalar], ...]) -> Resolved:
    return resolve(dict(items))


def resolve_cached(run_config: Mapping[str, Any]) -> Resolved:
    """Resolve as ``resolve`` does, but remember the result: clients ask at each message."""
    return _resolve_items(tuple(sorted(run_config.items())))
