"""The names that users may write: settings, methods, data sets, networks and partitions.

Every setting is listed once, with its type, default, range and meaning.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from pfedgpa_app.config.parse import Key, fields_of
from pfedgpa_app.core.own_code import is_reference
from pfedgpa_app.core.sections import (
    DATASET_HELP,
    MODEL_HELP,
    MODELS,
    NODES,
    OF_PARTITION,
    PARTITION_FILE,
    PARTITIONS,
    SECTIONS,
    TORCHVISION,
    Config,
)
from pfedgpa_app.core.settings import ConfigError, near
from pfedgpa_app.data import DATASETS, is_known_dataset
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.baselines import FromUploads
from pfedgpa_app.methods.own import reference_in, register_installed, registered

register_installed()


@lru_cache(maxsize=1)
def sections() -> dict[str, type]:
    """{method: the class of its own settings}, for every method that has some."""
    return {name: vars(c)["settings"] for name, c in METHODS.items() if "settings" in vars(c)}


@lru_cache(maxsize=1)
def keys() -> dict[str, Key]:
    """Return every setting by the name that users write; methods' own are ``METHOD.SETTING``."""
    found = list(fields_of(Config))
    for section, kind in sections().items():
        found += fields_of(kind, section + ".")
    return {key.name: key for key in found}


def keys_of(name: str) -> list[Key]:
    """Return the settings of a method or of a section, or the one setting called ``name``.

    Raises:
        ConfigError: there is none.
    """
    section = SECTIONS.get(name)
    own = {field.replace("_", "-") for field in vars(section)["__annotations__"]} if section else {}
    found = [
        k for k in keys().values() if k.name in own or name in (k.name, k.name.rpartition(".")[0])
    ]
    if not found and name in METHODS:  # it may use another method's
        goes_by = without_idle({k: None for k in keys() if "." in k}, [name])
        found = [keys()[each] for each in goes_by]
        if not found:
            raise ConfigError(f"{name}: has no settings of its own; see: pfedgpa settings training")
    if not found:
        raise ConfigError(
            f"{name}: is neither a setting, a section ({', '.join(SECTIONS)}) nor a method with "
            f"settings of its own{near(name, (*SECTIONS, *sections(), *keys()))}"
        )
    return found


_SHORT = {  # other usual names, too different to be guessed
    "alpha": "dirichlet-alpha",
    "bs": "batch-size",
    "lr": "learning-rate",
    "out": "out-dir",
    "rounds": "num-server-rounds",
}


def in_full(name: str) -> str:
    """Return the setting that others call ``name``; ``name`` itself if there is none."""
    return _SHORT.get(name.lower(), name)


def known(name: str, source: str) -> Key:
    """Return the setting called ``name``, or raise a ConfigError that says where it stands."""
    if name not in keys():
        meant, own = near(in_full(name), keys()), ""
        if name.rpartition(".")[0] not in ("", *METHODS):
            own = "; those of a method of your own are there where method= names it"
        raise ConfigError(
            f"{name} ({source}): no such setting{meant} All settings: pfedgpa settings{own}"
        )
    return keys()[name]


def require_dataset(name: str, source: str) -> None:
    """Refuse a ``name`` that no data set has."""
    if not is_known_dataset(name):
        raise ConfigError(
            f"{source}: no data set {name!r}{near(name, (*DATASETS, NODES))} "
            f"There are {DATASET_HELP}"
        )


def require_model(name: str) -> None:
    """Refuse a ``name`` that no network has."""
    if name not in MODELS and not name.startswith(TORCHVISION) and not is_reference(name):
        raise ConfigError(
            f"model = {name!r}: no such network{near(name, MODELS)} There are {MODEL_HELP}"
        )


def require_partition(name: str) -> None:
    """Refuse a ``name`` that no partition has."""
    if name not in PARTITIONS and not name.startswith(PARTITION_FILE):
        raise ConfigError(
            f"partition = {name!r}: must be one of {', '.join(PARTITIONS)}, or "
            f"{PARTITION_FILE}PATH{near(name, PARTITIONS)}"
        )


def method_named(method: str, code_dir: str = "") -> str:
    """Return a method's name; one given by its import path is registered first."""
    name, is_new = registered(method, code_dir)
    if is_new:
        sections.cache_clear()
        keys.cache_clear()
    return name


def _by_title(title: str) -> str:
    """Return the name of the method with this ``title`` in tables; else ``title`` itself."""
    return next((name for name, kind in METHODS.items() if kind.title == title), title)


def require_method(name: str, source: str, code_dir: str = "") -> None:
    """Refuse a ``name`` that no method has; the user may mean one of their own in ``code_dir``."""
    if name not in METHODS:
        own = reference_in(name, code_dir)
        meant = f"; did you mean {own}?" if own else near(_by_title(name), METHODS)
        raise ConfigError(f"{source}: no method {name!r}{meant} Methods: {', '.join(METHODS)}")


def is_read(key: Key, config: Config) -> bool:
    """Whether a setting influences the results of a run."""
    return not key.is_for_launch and not is_idle(key, config)


def is_idle(key: Key, config: Config) -> bool:
    """Whether a setting belongs to a partition or to methods that a run does not have."""
    if key.name in OF_PARTITION:
        return config.partition != OF_PARTITION[key.name]
    section, part = key.name.rpartition(".")[0], key.rules["part"]
    if not section:
        return False
    readers: list[Any] = [METHODS[name] for name in config.method if name in METHODS]
    if config.save_uploads or config.uploads:
        readers.append(FromUploads)  # its settings decide which uploads are kept, too
    kind = sections()[section]
    return not any(reader.settings is kind and part in reader.parts for reader in readers)


def without_idle(
    settings: Mapping[str, Any], methods: Iterable[str], partition: str = ""
) -> dict[str, Any]:
    """Return ``settings`` without methods' own that none of ``methods`` uses.

    Args:
        partition: settings of other partitions are left out, too; "": they all stay.
    """
    every, config = keys(), Config(method=tuple(methods))
    if partition:
        config = replace(config, partition=partition)
    kept = () if partition else OF_PARTITION
    return {
        name: value
        for name, value in settings.items()
        if name not in every or name in kept or not is_idle(every[name], config)
    }


def defaults() -> dict[str, Any]:
    """Return {setting: default}, JSON-ready.

    A run of an earlier version, which lacked a setting, counts as having its default.
    """
    values = {name: "auto" if k.default is None else k.default for name, k in keys().items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain
