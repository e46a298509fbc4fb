"""Every setting once: its type, default, range and meaning.

A value is looked up in three places, the later one winning: the default below, the
experiment's ``conf/*.yaml``, and ``--run-config``. ``resolve`` says which one won.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pfedgpa_app.config import yaml_file
from pfedgpa_app.config.parse import Key, Scalar, fields_of, flat, flatten, parse
from pfedgpa_app.core.own_code import is_reference
from pfedgpa_app.core.paths import APP_DIR, YAML, user_path
from pfedgpa_app.core.sections import (
    ATTACKS,
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
    S,
)
from pfedgpa_app.core.settings import LAUNCH, ConfigError, near
from pfedgpa_app.data import DATASETS, HUGGING_FACE, IMAGEFOLDER, is_known_dataset
from pfedgpa_app.methods import METHODS, federation_of, name_of
from pfedgpa_app.methods.baselines import FromUploads
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.own import reference_of, register_installed, registered

RUN_CONFIG = "run-config"  # what is given for this run alone
register_installed()


@lru_cache(maxsize=1)
def sections() -> dict[str, type]:
    """{method: the class of its own settings}, for every method that has some."""
    return {name: vars(c)["settings"] for name, c in METHODS.items() if "settings" in vars(c)}


@lru_cache(maxsize=1)
def keys() -> dict[str, Key]:
    """Every setting by the name that users write; methods' own are ``METHOD.SETTING``."""
    found = list(fields_of(Config))
    for section, kind in sections().items():
        found += fields_of(kind, section + ".")
    return {key.name: key for key in found}


def keys_of(name: str) -> list[Key]:
    """The settings of a method or of a section of the run's, or the one of that name.

    Raises:
        ConfigError: there is none.
    """
    section = SECTIONS.get(name)
    own = {field.replace("_", "-") for field in vars(section)["__annotations__"]} if section else {}
    found = [
        k for k in keys().values() if k.name in own or name in (k.name, k.name.rpartition(".")[0])
    ]
    if not found:
        raise ConfigError(
            f"{name}: no setting, no section ({', '.join(SECTIONS)}), and no method with settings "
            f"of its own{near(name, (*SECTIONS, *sections(), *keys()))}"
        )
    return found


_SHORT = {  # what others call settings, too unlike to be guessed
    "alpha": "dirichlet-alpha",
    "bs": "batch-size",
    "lr": "learning-rate",
    "out": "out-dir",
    "rounds": "num-server-rounds",
}


def in_full(name: str) -> str:
    """A setting's name, if ``name`` is what others call it."""
    return _SHORT.get(name.lower(), name)


def known(name: str, source: str) -> Key:
    """The setting ``name``; refused, by where it stands, if there is none."""
    if name not in keys():
        meant = near(in_full(name), keys())
        raise ConfigError(
            f"{name} ({source}): no such setting{meant} All settings: pfedgpa settings"
        )
    return keys()[name]


def require_dataset(name: str, source: str) -> None:
    """Refuse a ``name`` that no data set has."""
    if not is_known_dataset(name):
        raise ConfigError(
            f"{source}: no data set {name!r}{near(name, (*DATASETS, NODES))} "
            f"There are {DATASET_HELP}"
        )


def _require_model(name: str) -> None:
    """Refuse a ``name`` that no network has."""
    if name not in MODELS and not name.startswith(TORCHVISION) and not is_reference(name):
        raise ConfigError(f"model = {name!r}: no network{near(name, MODELS)} There is {MODEL_HELP}")


def _require_partition(name: str) -> None:
    """Refuse a ``name`` that no partition has."""
    if name not in PARTITIONS and not name.startswith(PARTITION_FILE):
        raise ConfigError(
            f"partition = {name!r}: must be one of {', '.join(PARTITIONS)}, or "
            f"{PARTITION_FILE}PATH{near(name, PARTITIONS)}"
        )


def method_named(method: str, code_dir: str = "") -> str:
    """A method's name; of an import path, after its class has been made known under it."""
    name, is_new = registered(method, code_dir)
    if is_new:
        sections.cache_clear()
        keys.cache_clear()
    return name


def _by_title(title: str) -> str:
    """The name of the method that tables call so; ``title`` itself if there is none."""
    return next((name for name, kind in METHODS.items() if kind.title == title), title)


def require_method(name: str, source: str) -> None:
    """Refuse a ``name`` that no method has."""
    if name not in METHODS:
        meant = near(_by_title(name), METHODS)
        raise ConfigError(f"{source}: no method {name!r}{meant} Methods: {', '.join(METHODS)}")


def conf_path(conf: str) -> Path:
    """The YAML file that ``conf`` names: in the app's conf/ or a path of the user's."""
    given, own = user_path(conf), APP_DIR / "conf"
    places = [given] if given.is_absolute() else [given, APP_DIR / given]
    if given.suffix not in YAML:
        places = [own / f"{conf}.yaml"]
    for path in places:
        if os.path.isfile(path):  # a name that is too long is no file, either
            return path
    if os.path.isdir(given):
        why = "no file but a folder"
    elif os.path.isfile(given):
        why = f"no file whose name ends in {' or '.join(YAML)}"
    elif given.suffix not in YAML:
        why = f"no file of that name in {own}"
    else:
        why = "no file there" + ("" if given.is_absolute() else f", nor below {APP_DIR}")
    names = sorted(p.stem for p in own.glob("*.yaml"))
    raise ConfigError(f"conf = {conf!r}: {why}{near(conf, names)} Experiments: {', '.join(names)}")


def _conf_layers(
    conf: str, over: Mapping[str, Any], above: tuple[Path, ...] = ()
) -> list[tuple[str, dict[str, Any]]]:
    """(file's name, its values) of ``conf``, after that of the file it builds on, its ``conf``.

    A user's file that names none builds on what a run without a file would have, so that the same
    settings mean the same in a file and on the command line.

    Args:
        over: settings laid over the file's.
    """
    path = conf_path(conf)
    if path in above:
        raise ConfigError(f"{path}: builds on itself by its `conf`")
    values = flat(yaml_file.read(path), str(path))
    base, over = values.pop("conf", None), {**values, **over}
    if not base and path.resolve().parent != (APP_DIR / "conf").resolve():
        base = _default_conf(over)
    below = _conf_layers(str(base), over, (*above, path)) if base else []
    return [*below, (path.name, values)]


def inherited(conf: str, over: Mapping[str, Any]) -> dict[str, Any]:
    """{setting: value} of the files that the one of ``conf`` builds on, without its own.

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
        """``{key: {"value": …, "from": …}}``, JSON-ready."""
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
    """{setting: value} of what ``Resolved.as_dict`` or a run's folder says."""
    return {name: entry["value"] for name, entry in described.items()}


def is_read(key: Key, config: Config) -> bool:
    """Whether the results of a run go by a setting."""
    return bool(key.rules["part"] != LAUNCH) and not is_idle(key, config)


def is_idle(key: Key, config: Config) -> bool:
    """Whether a setting is of another partition, or of other methods, than a run has."""
    if key.name in OF_PARTITION:
        return config.partition != OF_PARTITION[key.name]
    section, part = key.name.rpartition(".")[0], key.rules["part"]
    if not section:
        return False
    readers: list[Any] = [METHODS[name] for name in config.method if name in METHODS]
    if config.save_uploads or config.uploads:
        readers.append(FromUploads)  # goes by which of them are kept, too
    kind = sections()[section]
    return not any(reader.settings is kind and part in reader.parts for reader in readers)


def given(resolved: Resolved) -> dict[str, Any]:
    """{setting: value} of all that is not the default: what needs no file to come to the same."""
    return {
        name: entry["value"]
        for name, entry in resolved.as_dict().items()
        if entry["from"] != "default"
        and name != "conf"
        and not is_idle(keys()[name], resolved.config)
    }


def without_idle(settings: Mapping[str, Any], methods: Iterable[str]) -> dict[str, Any]:
    """``settings`` without methods' own that none of ``methods`` goes by."""
    config, every = Config(method=tuple(methods)), keys()
    return {
        name: value
        for name, value in settings.items()
        if "." not in name or name not in every or not is_idle(every[name], config)
    }


def defaults() -> dict[str, Any]:
    """{setting: value}, JSON-ready: what a run of a version that had no such setting went by."""
    values = {name: "auto" if k.default is None else k.default for name, k in keys().items()}
    plain: dict[str, Any] = json.loads(json.dumps(values))
    return plain


def differences(there: Mapping[str, Any], resolved: Resolved) -> list[str]:
    """Settings that have a part in the results and differ from those that a run has kept."""
    here, before = json.loads(json.dumps(resolved.as_dict())), defaults()
    return [
        f"{name} = {there.get(name, {}).get('value')!r} there, {entry['value']!r} here"
        for name, entry in here.items()
        if is_read(keys()[name], resolved.config)
        and there.get(name, {"value": before[name]})["value"] != entry["value"]
    ]


def resolve(run_config: Mapping[str, Any] | None = None) -> Resolved:
    """The run's configuration from ``run_config`` over its ``conf`` file over the defaults.

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
    _refuse_idle(config, overrides)
    _check(config)
    _check_attack(config, sources)
    return Resolved(config, types.MappingProxyType(sources))


def _default_conf(overrides: Mapping[str, Any]) -> str:
    """The experiment of a run that names none: the demo's sizes are for its data alone."""
    default = keys()["conf"].default
    dataset = overrides.get("dataset", keys()["dataset"].default)
    return str(default if dataset == keys()["dataset"].default else "own")


def _know_methods(layers: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Make methods by import path known, before their settings are looked at."""
    code_dir = ""
    for source, layer in layers:  # of all: a file may have settings of a method that is not run
        code_dir = str(layer.get("code-dir", code_dir))
        if method := layer.get("method"):
            for name in parse(keys()["method"], method, source):
                method_named(name, code_dir)


@lru_cache(maxsize=4)
def _resolve_items(items: tuple[tuple[str, Scalar], ...]) -> Resolved:
    return resolve(dict(items))


def resolve_cached(run_config: Mapping[str, Any]) -> Resolved:
    """``resolve``, remembered: a client asks again at each message."""
    return _resolve_items(tuple(sorted(run_config.items())))


def without_effect(resolved: Resolved, own_test: bool) -> Iterator[str]:
    """What was given for this run, but nothing goes by, because of others or the data; in words.

    Args:
        own_test: whether the run's data set has a test split.
    """
    config = resolved.config
    why: dict[str, str] = {}
    if config.partition == "natural" or config.partition.startswith(PARTITION_FILE):
        own = f"with partition = {config.partition} clients have what is theirs, all of it"
        why |= dict.fromkeys(("train-per-client", "test-per-client"), own)
    if not config.local_dp_epsilon:
        none = "without local-dp-epsilon nothing is clipped and no noise is added"
        why |= dict.fromkeys(("local-dp-clip", "local-dp-delta"), none)
    if not config.join_clients:
        joining = ("join-rate", "join-iterations", "pfedgpa.join-mode")
        why |= dict.fromkeys(joining, "join-clients = 0: nobody joins")
    if not config.fine_tune_grid_epochs:
        why["fine-tune-grid-learning-rates"] = "fine-tune-grid-epochs = 0: no fine-tuning is tuned"
    if config.share_label_counts and not _reads_label_counts(config):
        why["share-label-counts"] = "pfedgpa.descriptor=labels alone goes by them"
    kept = name_of(FromUploads.of)
    if not any(federation_of(method) == kept for method in config.method):
        why["save-uploads"] = f"{METHODS[kept].title}'s are kept, and no method goes by its rounds"
    left = f"min-uploads = {config.min_uploads} of a round's {config.round_clients} are left"
    if config.dropout_share and not config.dropped_clients:
        why["dropout-share"] = left
    if config.straggler_share and not config.late_clients:
        why["straggler-share"] = left
    uploads = config.round_clients - config.dropped_clients - config.late_clients
    if config.max_distance and uploads < 3:
        why["max-distance"] = f"a round has {uploads} uploads, and it compares three or more"
    if own_test:
        why["test-share"] = f"{config.dataset} has a test split"
    for name, reason in why.items():
        if resolved.sources[name] == RUN_CONFIG:
            yield f"{name} is without effect: {reason}"


def _reads_label_counts(config: Config) -> bool:
    """Whether a method goes by what clients share of their classes; one's own may."""
    if any(reference_of(name) != name for name in config.method):
        return True
    descriptor = keys()["pfedgpa.descriptor"]
    return config.of(PFedGPASettings).descriptor == "labels" and not is_idle(descriptor, config)


def _refuse_idle(config: Config, overrides: Mapping[str, Any]) -> None:
    """Refuse settings, given for this run, that none of its methods or its partition goes by."""
    for name in overrides:
        if name == "partition" and config.dataset == NODES:
            raise ConfigError(
                f"partition = {config.partition} (run-config): deals out one data set; with "
                "dataset = nodes every node has its own"
            )
        if not is_idle(keys()[name], config):
            continue
        if name in OF_PARTITION:
            raise ConfigError(
                f"{name} (run-config): partition = {config.partition} does not go by it, but "
                f"partition={OF_PARTITION[name]} does"
            )
        raise ConfigError(
            f"{name} (run-config): none of this run's methods ({', '.join(config.method)}) "
            "goes by it"
        )


def _check_data(config: Config) -> None:
    """Refuse what a run's data cannot be."""
    require_dataset(config.dataset, "dataset")
    _require_partition(config.partition)
    resized = config.dataset.startswith((IMAGEFOLDER, HUGGING_FACE)) or config.dataset == NODES
    if config.image_size and not resized:
        raise ConfigError(
            f"image-size = {config.image_size}: resizes the images of imagefolder: and hf:, and "
            f"dataset = {config.dataset} is none of them"
        )
    if config.classes and config.dataset != NODES:
        raise ConfigError(
            f"classes: are named for dataset = nodes; those of {config.dataset} are its own"
        )
    if len(config.classes) == 1 or len(set(config.classes)) < len(config.classes):
        raise ConfigError(
            f"classes = {','.join(config.classes)}: wants two or more, of different names"
        )


def _check_attack(config: Config, sources: Mapping[str, str]) -> None:
    """Refuse an attack that nobody makes, for a federation without one looks robust to it."""
    share, clients = config.malicious_share, config.initial_clients
    if config.attack == "none":
        there = sources["attack"]  # a "none" that is said at least as late is meant
        given = {"malicious-share": share, "attack-strength": config.attack_strength}
        for name, value in given.items() if share else ():
            here = sources[name]
            if here != "default" and (there == "default" or here == RUN_CONFIG != there):
                raise ConfigError(
                    f"{name} = {value:g} ({here}): without an attack nobody is malicious; "
                    f"set attack, too: {', '.join(ATTACKS)}"
                )
        return
    count = len(config.malicious_clients)
    if clients == 1:
        raise ConfigError(
            f"attack = {config.attack}: wants an honest client beside a malicious one, and only 1 "
            "is there from the start"
        )
    if count == clients:
        raise ConfigError(
            f"malicious-share = {share:g}: leaves no honest client of {clients} to evaluate"
        )
    if not count:
        raise ConfigError(
            f"attack = {config.attack}: malicious-share = {share:g} of {clients} clients is "
            f"nobody; malicious-share={1 / clients:.2g} makes one of them malicious"
        )


def _check_missing(config: Config) -> None:
    """Refuse clients that drop out or are late where that cannot be, or is nobody."""
    if config.dataset == NODES and config.dropout_share + config.straggler_share:
        raise ConfigError("dropout-share, straggler-share: are for simulations; real nodes fail so")
    shares = {"dropout-share": config.dropout_share, "straggler-share": config.straggler_share}
    for name, share in shares.items():
        if share and not round(share * config.round_clients):
            raise ConfigError(
                f"{name} = {share:g}: of a round's {config.round_clients} clients that is nobody; "
                f"{name}={1 / config.round_clients:.2g} is one of them"
            )


def _check(config: Config) -> None:
    """Refuse what each value alone cannot show."""
    for name in config.method:
        require_method(name, "method")
    if len(set(config.method)) < len(config.method):
        raise ConfigError(f"method = {','.join(config.method)}: names a method twice")
    _require_model(config.model)
    _check_data(config)
    kept = name_of(FromUploads.of)  # whose uploads are kept
    others = [method for method in config.method if federation_of(method) != kept]
    if config.uploads and others:
        raise ConfigError(
            f"uploads: holds {METHODS[kept].title}'s rounds, but {', '.join(others)} has rounds of "
            "its own"
        )
    if config.join_clients >= config.num_clients:
        raise ConfigError(
            f"join-clients = {config.join_clients}: must be less than num-clients = "
            f"{config.num_clients}"
        )
    if config.min_uploads > config.round_clients:
        raise ConfigError(
            f"min-uploads = {config.min_uploads}: no round has so many; by fraction-train, "
            f"{config.round_clients} of {config.initial_clients} clients take part in one"
        )
    _check_missing(config)
    if config.dataset == NODES and config.attack != "none":
        raise ConfigError(f"attack = {config.attack}: is for simulations; real nodes would attack")
    for name in config.method:
        METHODS[name].check(config)
    if config.fine_tune_grid_epochs and not config.validation_share:
        raise ConfigError(
            "fine-tune-grid-epochs > 0 chooses by validation: validation-share must be > 0"
        )
    if (size := config.train_per_client) is None:
        return
    aside = round(size * config.validation_share)
    if config.fine_tune_grid_epochs and not aside:
        raise ConfigError(
            "fine-tune-grid-epochs > 0 chooses by validation, and of train-per-client = "
            f"{size} validation-share = {config.validation_share:g} puts nothing aside"
        )
    if size - aside < 1:
        raise ConfigError("validation-share leaves no image to train on")
