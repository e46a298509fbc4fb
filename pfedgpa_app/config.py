"""Every setting once: its type, default, range and meaning.

A value is looked up in three places, the later one winning: the default below, the
experiment's ``conf/*.yaml``, and ``--run-config``. ``resolve`` says which one won.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pfedgpa_app import yaml_file
from pfedgpa_app.attacks import ATTACKS, malicious
from pfedgpa_app.data import DATASET_HELP, DATASETS, NODES, is_known_dataset
from pfedgpa_app.methods import METHODS, federation_of, method_class
from pfedgpa_app.settings import LEARNING_RATES, ConfigError, near, setting, shown, user_path

if TYPE_CHECKING:
    from pfedgpa_app.methods.pfedgpa import PFedGPASettings

# settings that have no part in the results
NO_PART = {"conf", "engine", "workers", "out-dir", "run-name", "data-dir", "download", "timeout"}
NO_PART |= {"save-weights", "save-uploads", "checkpoint-every", "resume"}

PACKAGE = Path(__file__).resolve().parent
# the app's folder: the doors, conf/ and pyproject.toml, inside the package where it is installed
INSTALLED = PACKAGE / "app"
APP_DIR = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
MOST_CLIENTS = 1_000_000
MOST = 2**63 - 1  # as much as NumPy's and Flower's whole numbers hold
Scalar = str | int | float | bool
S = TypeVar("S")


@dataclass(frozen=True)
class Config:
    """One run, fully resolved."""

    conf: str = setting("demo", "experiment: a name in conf/ or the path of a YAML file")
    method: tuple[str, ...] = setting(
        ("pfedgpa",), "methods to run on the same partition and seed, separated by commas"
    )
    seed: int = setting(0, "the run's only seed", low=0)
    out_dir: str = setting("results", "where results/<run>/ is made")
    run_name: str = setting("", "name of the run's folder; empty: made from data set and time")

    dataset: str = setting("digits", DATASET_HELP)
    data_dir: str = setting("", "where data sets lie; empty: $PFEDGPA_DATA, else ./data")
    download: bool = setting(False, "let torchvision download the data set if it is absent")
    image_size: int = setting(0, "imagefolder: resize to this square; 0: as they are", low=0)
    partition: str = setting(
        "dominant",
        "how images are dealt to clients",
        choices=("dominant", "dirichlet", "shards", "iid"),
    )
    num_clients: int = setting(10, "clients of the federation", low=1, high=MOST_CLIENTS)
    train_per_client: int = setting(600, "training images a client, validation included", low=1)
    test_per_client: int = setting(600, "test images a client", low=1)
    uniform_share: float = setting(
        0.2, "dominant: share of a client's images uniform over all classes", low=0, high=1
    )
    group_shares: tuple[float, ...] = setting(
        (), "dominant: relative sizes of the hidden groups; empty: all alike", above=0, high=1e6
    )
    dirichlet_alpha: float = setting(0.5, "dirichlet: concentration", above=0, high=1e6)
    shards_per_client: int = setting(2, "shards: one-class shards a client", low=1)
    validation_share: float = setting(
        0.1, "share of a client's training images that it keeps for validation", low=0, high=0.9
    )

    model: str = setting(
        "auto", "network; auto: by image shape", choices=("auto", "digits", "fashion", "cifar")
    )
    engine: str = setting(
        "auto",
        "what serves the clients under `pfedgpa run`; auto: batched with a GPU, else process",
        choices=("auto", "ray", "process", "batched"),
    )
    workers: int | None = setting(
        None, "clients served at the same time by ray and process; auto: one a core", low=1
    )
    device: str = setting("auto", "auto: a GPU when there is one", choices=("auto", "cpu", "cuda"))
    precision: str = setting(
        "float32",
        "what clients' training computes in; weights, updates and evaluation stay float32",
        choices=("float32", "bfloat16"),
    )
    num_server_rounds: int = setting(200, "rounds", low=1)
    fraction_train: float = setting(1.0, "share of clients sampled each round", above=0, high=1)
    join_clients: int = setting(
        0, "so many clients, the last ones, join after the last round; 0: none", low=0
    )
    join_iterations: int = setting(
        3, "how often one that joins trains, uploads and is sent weights", low=1
    )
    join_rate: float = setting(
        0.1,
        "learning rate of clients that join, in units of the run's, where trained weights await",
        above=0,
    )
    share_label_counts: bool = setting(
        False, "clients tell the server how many images of each class they hold"
    )
    evaluate_every: int = setting(
        5,
        "rounds between evaluations of all clients; the last five are evaluated, too; 0: none is",
        low=0,
    )
    local_epochs: int = setting(2, "epochs a client trains each round", low=1)
    batch_size: int = setting(50, "images a step", low=1)
    learning_rate: float = setting(0.01, "SGD learning rate", above=0, grid=LEARNING_RATES)
    momentum: float = setting(0.5, "SGD momentum", low=0, high=0.999)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)
    augment: bool = setting(False, "random crop and flip of training images")
    fine_tune_epochs: int = setting(1, "epochs of gentle fine-tuning", low=0)
    fine_tune_learning_rate: float = setting(0.002, "gentle fine-tuning's learning rate", above=0)
    fine_tune_grid_epochs: int = setting(
        0, "tuned fine-tuning tries 1..this many epochs; 0: no tuning", low=0, high=1000
    )
    fine_tune_grid_learning_rates: tuple[float, ...] = setting(
        (0.001, 0.002, 0.005, 0.02), "learning rates that tuned fine-tuning tries", above=0
    )
    timeout: float = setting(3600.0, "seconds that a round waits for replies", above=0)
    min_uploads: int = setting(
        1, "usable uploads that a round needs; with fewer the run stops, and can be resumed", low=1
    )
    max_upload_norm: float = setting(
        100.0,
        "an upload so many times as large as the round's median is refused; 0: none is",
        low=0,
    )
    save_weights: bool = setting(
        True, "write what the server makes for each client beside the results"
    )
    start_from: str = setting(
        "", "a run's distribution.safetensors, whose mean methods start from if they share weights"
    )
    save_uploads: bool = setting(False, "keep the buffered uploads beside the results")
    uploads: str = setting(
        "", "make weights from a run's uploads.safetensors instead of running FedAvg's rounds"
    )
    checkpoint_every: int = setting(
        1, "rounds between checkpoints, from which a killed run can go on; 0: none", low=0
    )
    resume: bool = setting(
        False, "go on with the run of this out-dir and run-name where its last checkpoint is"
    )
    max_distance: float = setting(
        0.0,
        "an upload so many times as far from the median as is usual is refused; 0: none is",
        low=0,
    )
    local_dp_epsilon: float = setting(
        0.0, "ε of each upload's local differential privacy (docs/privacy.md); 0: none", low=0
    )
    local_dp_delta: float = setting(1e-5, "its δ", above=0, high=0.5)
    local_dp_clip: float = setting(1.0, "its C: updates are clipped to this norm", above=0)
    attack: str = setting("none", "what malicious clients do, in simulations", choices=ATTACKS)
    malicious_share: float = setting(0.1, "share of the clients that attack", low=0, high=1)
    attack_strength: float = setting(
        4.0, "by how much updates are flipped, scaled or drowned in noise", above=0
    )
    sections: tuple[Any, ...] = ()  # every method's own settings

    @property
    def founders(self) -> int:
        """Clients 0..founders−1 are there from the start; the rest joins after the last round."""
        return self.num_clients - self.join_clients

    @property
    def round_clients(self) -> int:
        """Clients sampled each round."""
        return max(1, round(self.fraction_train * self.founders))

    def of(self, kind: type[S]) -> S:
        """One method's own settings, ``kind`` being their class in the method's file."""
        return next((section for section in self.sections if type(section) is kind), kind())

    @property
    def pfedgpa(self) -> PFedGPASettings:
        """What pFedGPA's server goes by, and how many uploads FedAvg's keeps for it."""
        from pfedgpa_app.methods.pfedgpa import PFedGPASettings

        return self.of(PFedGPASettings)


@dataclass(frozen=True)
class _Key:
    name: str  # as the user writes it
    type: Any
    default: Any
    rules: Mapping[str, Any]


def _fields(kind: type, prefix: str = "") -> Iterator[_Key]:
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        if f.metadata:
            name = prefix + f.name.replace("_", "-")
            yield _Key(name, hints[f.name], f.default, f.metadata)


@lru_cache(maxsize=1)
def sections() -> dict[str, type]:
    """{method: the class of its own settings}, for every method that has some."""
    classes = {name: method_class(name) for name in METHODS}
    return {name: vars(c)["settings"] for name, c in classes.items() if "settings" in vars(c)}


@lru_cache(maxsize=1)
def keys() -> dict[str, _Key]:
    """Every setting by the name that users write; methods' own are ``METHOD.SETTING``."""
    found = list(_fields(Config))
    for section, kind in sections().items():
        found += _fields(kind, section + ".")
    return {key.name: key for key in found}


def _parse(key: _Key, value: Any, source: str) -> Any:
    """``value`` as the key's type, or a ConfigError that names key, value and what is allowed."""

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
            raise refuse("wants at least one value, separated by commas")
        return tuple(_parse(dataclasses.replace(key, type=item), i, source) for i in items)

    if wanted is bool:
        if not isinstance(value, bool):
            raise refuse("wants true or false")
    elif wanted is str:
        if not isinstance(value, str):
            raise refuse("wants text; put it in quotes")
        if "\0" in value:
            raise refuse("must not hold a NUL character")
    else:
        number = _number(value, wanted)
        if number is None:
            kind = "a whole number" if wanted is int else "a number"
            raise refuse(f"wants {kind}" + (' or "auto"' if auto else ""))
        value = number
        low, high, above = (key.rules[k] for k in ("low", "high", "above"))
        if wanted is int and value > MOST:
            high = min(high, MOST)
        if not low <= value <= high or value <= above:
            bounds = [f"> {above}"] if above > -math.inf else []
            bounds += [f">= {low}"] if low > -math.inf else []
            bounds += [f"<= {high}"] if high < math.inf else []
            raise refuse("must be " + " and ".join(bounds))
    choices = key.rules["choices"]
    if choices and value not in choices:
        raise refuse(f"must be one of {', '.join(choices)}{near(value, choices)}")
    return value


def check_section(method: str, values: Any) -> None:
    """Refuse settings of a method's own, made without ``resolve``, that are out of range."""
    for key in _fields(type(values), f"{method}."):
        field = key.name.rpartition(".")[2].replace("-", "_")
        _parse(key, getattr(values, field), type(values).__name__)


def _number(value: Any, wanted: type[int] | type[float]) -> int | float | None:
    """``value`` as the finite number that is wanted, if it is one or, in a list, its text."""
    if isinstance(value, bool):
        return None
    if wanted is int and isinstance(value, int):
        return value  # it may be longer than a float's range
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    whole = wanted is float or number.is_integer()
    return wanted(number) if math.isfinite(number) and whole else None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def flat(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """``values`` with ``pfedgpa.rank: 5`` for ``pfedgpa: {rank: 5}``.

    Raises:
        ConfigError: a setting is there in both ways.
    """
    found: dict[str, Any] = {}
    for name, value in _flatten(values):
        if name in found:
            raise ConfigError(f"{name} ({source}): is given twice")
        found[name] = value
    return found


def known(name: str, source: str) -> _Key:
    if name not in keys():
        raise ConfigError(
            f"{name} ({source}): no such setting{near(name, keys())} All settings: pfedgpa settings"
        )
    return keys()[name]


def package_of(app: Path) -> Path:
    """The package that the app in ``app`` runs: its own or, if it has none, the one we are in."""
    own = app / PACKAGE.name
    return own if own.is_dir() else PACKAGE


def require_dataset(name: str, source: str) -> None:
    """Refuse a ``name`` that no data set has."""
    if not is_known_dataset(name):
        raise ConfigError(
            f"{source}: no data set {name!r}{near(name, (*DATASETS, NODES))} "
            f"There are {DATASET_HELP}"
        )


def require_method(name: str, source: str) -> None:
    """Refuse a ``name`` that no method has."""
    if name not in METHODS:
        raise ConfigError(
            f"{source}: no method {name!r}{near(name, METHODS)} Methods: {', '.join(METHODS)}"
        )


def conf_path(conf: str) -> Path:
    """The YAML file that ``conf`` names: in the app's conf/ or a path of the user's."""
    path = user_path(conf)
    if path.suffix not in (".yaml", ".yml"):
        path = APP_DIR / "conf" / f"{conf}.yaml"
    elif not path.is_absolute() and not os.path.exists(path):
        path = APP_DIR / path
    if not os.path.isfile(path):  # a name that is too long is no file, either
        names = sorted(p.stem for p in (APP_DIR / "conf").glob("*.yaml"))
        raise ConfigError(
            f"conf = {conf!r}: no file {path}{near(conf, names)} Experiments: {', '.join(names)}"
        )
    return path


def _conf_layers(conf: str, above: tuple[Path, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """(file's name, its values) of ``conf``, after that of the file it builds on, its ``conf``."""
    path = conf_path(conf)
    if path in above:
        raise ConfigError(f"{path}: builds on itself by its `conf`")
    values = flat(yaml_file.read(path), str(path))
    base = values.pop("conf", None)
    below = _conf_layers(str(base), (*above, path)) if base else []
    return [*below, (path.name, values)]


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
            shown[name] = {"value": "auto" if value is None else value, "from": self.sources[name]}
        return shown


def sections_read(methods: Iterable[str]) -> set[str]:
    """The methods whose own settings any of ``methods`` goes by."""
    return {section for name in methods for section in method_class(name).reads()}


def differences(there: Mapping[str, Any], resolved: Resolved) -> list[str]:
    """Settings that have a part in the results and differ from those that a run has kept."""
    first = {name: "auto" if k.default is None else k.default for name, k in keys().items()}
    here, defaults = json.loads(json.dumps([resolved.as_dict(), first]))
    methods = resolved.config.method
    read = {"", *sections_read(methods)}
    no_part = NO_PART | set.intersection(*(method_class(m).overlooks() for m in methods))
    return [
        f"{key} = {there.get(key, {}).get('value')!r} there, {entry['value']!r} here"
        for key, entry in here.items()
        if key not in no_part
        and key.rpartition(".")[0] in read
        # a setting that was not there yet was what is now its default
        and there.get(key, {"value": defaults[key]})["value"] != entry["value"]
    ]


def resolve(run_config: Mapping[str, Any] | None = None) -> Resolved:
    """The run's configuration from ``run_config`` over its ``conf`` file over the defaults.

    An empty string in ``run_config`` means "not set here": pyproject.toml lists every key
    that way, because Flower lets ``--run-config`` override listed keys only.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range, settings that
            contradict each other, or a missing conf file.
    """
    overrides = {k: v for k, v in _flatten(run_config or {}) if v != ""}
    for name in overrides:
        known(name, "run-config")
    files = _conf_layers(str(overrides.get("conf", keys()["conf"].default)))

    values: dict[str, Any] = {name: key.default for name, key in keys().items()}
    sources = dict.fromkeys(keys(), "default")
    for source, layer in (*files, ("run-config", overrides)):
        for name, value in layer.items():
            values[name] = _parse(known(name, source), value, source)
            sources[name] = source

    def made(kind: type[S], prefix: str = "", **more: Any) -> S:
        names = {
            key.name: key.name[len(prefix) :].replace("-", "_") for key in _fields(kind, prefix)
        }
        return kind(**{field: values[name] for name, field in names.items()}, **more)

    own: tuple[Any, ...] = tuple(made(kind, name + ".") for name, kind in sections().items())
    config = made(Config, sections=own)
    _refuse_idle(config, overrides)
    _check(config)
    return Resolved(config, types.MappingProxyType(sources))


@lru_cache(maxsize=4)
def _resolve_items(items: tuple[tuple[str, Scalar], ...]) -> Resolved:
    return resolve(dict(items))


def resolve_cached(run_config: Mapping[str, Any]) -> Resolved:
    """``resolve``, remembered: a client asks again at each message."""
    return _resolve_items(tuple(sorted(run_config.items())))


def _refuse_idle(config: Config, overrides: Mapping[str, Any]) -> None:
    """Refuse a method's own settings, given for this run, that no method of it reads."""
    read = {"", *sections_read(method for method in config.method if method in METHODS)}
    for name in overrides:
        section = name.rpartition(".")[0]
        if section not in read:
            raise ConfigError(
                f"{name} (run-config): none of this run's methods ({', '.join(config.method)}) "
                f"reads the settings of {section}"
            )


def _check(config: Config) -> None:
    """Refuse what each value alone cannot show."""
    for name in config.method:
        require_method(name, "method")
    if len(set(config.method)) < len(config.method):
        raise ConfigError(f"method = {','.join(config.method)}: names a method twice")
    require_dataset(config.dataset, "dataset")
    others = {m: f for m in config.method if (f := federation_of(m, config)) != "fedavg"}
    if config.uploads and others:
        raise ConfigError(
            f"uploads: holds FedAvg's rounds, but {', '.join(others)} has rounds of its own"
        )
    if config.join_clients >= config.num_clients:
        raise ConfigError(
            f"join-clients = {config.join_clients}: must be less than num-clients = "
            f"{config.num_clients}"
        )
    if config.min_uploads > config.round_clients:
        raise ConfigError(
            f"min-uploads = {config.min_uploads}: no round has so many; by fraction-train, "
            f"{config.round_clients} of {config.founders} clients take part in one"
        )
    if len(malicious(config)) == config.founders:
        raise ConfigError(
            f"malicious-share = {config.malicious_share:g}: leaves no honest client of "
            f"{config.founders} to evaluate"
        )
    for name in config.method:
        method_class(name).check(config)
    if config.fine_tune_grid_epochs and not config.validation_share:
        raise ConfigError(
            "fine-tune-grid-epochs > 0 chooses by validation: validation-share must be > 0"
        )
    if config.train_per_client - round(config.train_per_client * config.validation_share) < 1:
        raise ConfigError("validation-share leaves no image to train on")
