"""Every setting once: its type, default, range and meaning.

A value is looked up in three places, the later one winning: the default below, the
experiment's ``conf/*.yaml``, and ``--run-config``. ``resolve`` says which one won.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from pfedgpa_app.data import DATASET_HELP, is_known_dataset
from pfedgpa_app.methods import METHODS, method_class

APP_DIR = Path(__file__).resolve().parents[1]
Scalar = str | int | float | bool


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the text is for the user."""


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
) -> Any:
    """A setting; ``low <= value <= high`` and ``value > above``. ``None`` reads "auto"."""
    rules = {"help": help, "choices": choices, "low": low, "high": high, "above": above}
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class PFedGPASettings:
    """Settings that only pFedGPA understands (keys ``pfedgpa.*``)."""

    generate_from: int = setting(
        0, "first round that ends with generation; 0: only the final round", low=0
    )
    buffer_rounds: int = setting(20, "uploads of so many newest rounds are learned from", low=1)
    rank: int | None = setting(None, "latent dimensions, or auto", low=1)
    directions: str = setting(
        "shared",
        "what latents see: what clients with like classifiers share, or principal directions",
        choices=("shared", "principal"),
    )
    inversion: str = setting(
        "tweedie",
        "how an upload is carried through the diffusion model",
        choices=("identity", "sample", "invert", "edit-friendly", "ddim", "sdedit", "tweedie"),
    )
    strength: int | None = setting(
        None, "t0: how far an upload is noised, 0..diffusion-steps, or auto", low=0
    )
    own_weight: float = setting(
        0.5, "auto strength: posterior weight left on a client's own uploads", above=0, high=1
    )
    keep: float = setting(0.0, "share of the stored noise replayed by invert", low=0, high=1)
    draws: int = setting(64, "decodings averaged for each client", low=1)
    residual_keep: float = setting(
        0.0, "share of what the autoencoder cannot express that is added back", low=0, high=1
    )
    denoiser: str = setting(
        "mlp",
        "the trained network, or a closed form",
        choices=("mlp", "gaussian", "finite-set"),
    )
    schedule: str = setting("linear", "noise schedule", choices=("linear", "cosine"))
    diffusion_steps: int = setting(1000, "T, the length of the noise schedule", low=2)
    fit_steps: int = setting(2000, "optimiser steps of the denoiser", low=1)
    fit_batch_size: int = setting(256, "latents a step", low=1)
    fit_learning_rate: float = setting(1e-3, "peak learning rate of the denoiser", above=0)
    width: int = setting(256, "hidden width of the denoiser", low=1)
    blocks: int = setting(3, "residual blocks of the denoiser", low=1)
    ema: float = setting(0.99, "decay of the averaged denoiser", low=0, high=0.999999)
    input_noise: float = setting(
        0.0, "noise on the uploads in training, in units of their spread", low=0
    )
    latent_noise: float = setting(0.1, "noise on the unit-variance latents in training", low=0)


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
    num_clients: int = setting(10, "clients of the federation", low=1)
    train_per_client: int = setting(600, "training images a client, validation included", low=1)
    test_per_client: int = setting(600, "test images a client", low=1)
    uniform_share: float = setting(
        0.2, "dominant: share of a client's images uniform over all classes", low=0, high=1
    )
    dirichlet_alpha: float = setting(0.5, "dirichlet: concentration", above=0)
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
    num_server_rounds: int = setting(200, "rounds", low=1)
    fraction_train: float = setting(1.0, "share of clients sampled each round", above=0, high=1)
    evaluate_every: int = setting(
        5, "rounds between evaluations of all clients; the last five are always evaluated", low=1
    )
    local_epochs: int = setting(2, "epochs a client trains each round", low=1)
    batch_size: int = setting(50, "images a step", low=1)
    learning_rate: float = setting(0.01, "SGD learning rate", above=0)
    momentum: float = setting(0.5, "SGD momentum", low=0, high=0.999)
    weight_decay: float = setting(5e-4, "SGD weight decay", low=0)
    augment: bool = setting(False, "random crop and flip of training images")
    fine_tune_epochs: int = setting(1, "epochs of gentle fine-tuning", low=0)
    fine_tune_learning_rate: float = setting(0.002, "gentle fine-tuning's learning rate", above=0)
    fine_tune_grid_epochs: int = setting(
        0, "tuned fine-tuning tries 1..this many epochs; 0: no tuning", low=0
    )
    fine_tune_grid_learning_rates: tuple[float, ...] = setting(
        (0.001, 0.002, 0.005, 0.02), "learning rates that tuned fine-tuning tries", above=0
    )
    timeout: float = setting(3600.0, "seconds that a round waits for replies", above=0)
    save_uploads: bool = setting(False, "keep the buffered uploads beside the results")
    uploads: str = setting(
        "", "make weights from a run's uploads.safetensors instead of running FedAvg's rounds"
    )
    pfedgpa: PFedGPASettings = field(default_factory=PFedGPASettings)


@dataclass(frozen=True)
class _Key:
    name: str  # as the user writes it
    type: Any
    default: Any
    rules: Mapping[str, Any]


def _keys(cls: type, prefix: str = "") -> Iterator[_Key]:
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        name = prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(hints[f.name]):
            yield from _keys(typing.cast(type, hints[f.name]), name + ".")
        else:
            yield _Key(name, hints[f.name], f.default, f.metadata)


KEYS: dict[str, _Key] = {key.name: key for key in _keys(Config)}


def _parse(key: _Key, value: Any, source: str) -> Any:
    """``value`` as the key's type, or a ConfigError that names key, value and what is allowed."""

    def refuse(allowed: str) -> ConfigError:
        return ConfigError(f"{key.name} = {value!r} ({source}): {allowed}")

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

    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted is bool:
        if not isinstance(value, bool):
            raise refuse("wants true or false")
    elif wanted is str:
        if not isinstance(value, str):
            raise refuse("wants text")
    else:
        if isinstance(value, str):  # an item of a comma-separated list
            try:
                value, number = float(value), True
            except ValueError:
                pass
        whole = number and float(value).is_integer()
        if not number or not math.isfinite(value) or (wanted is int and not whole):
            kind = "a whole number" if wanted is int else "a number"
            raise refuse(f"wants {kind}" + (' or "auto"' if auto else ""))
        value = wanted(value)
        low, high, above = (key.rules[k] for k in ("low", "high", "above"))
        if not low <= value <= high or value <= above:
            bounds = [f"> {above:g}"] if above > -math.inf else []
            bounds += [f">= {low:g}"] if low > -math.inf else []
            bounds += [f"<= {high:g}"] if high < math.inf else []
            raise refuse("must be " + " and ".join(bounds))
    if key.rules["choices"] and value not in key.rules["choices"]:
        raise refuse("must be one of " + ", ".join(key.rules["choices"]))
    return value


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _known(name: str, source: str) -> _Key:
    if name not in KEYS:
        near = difflib.get_close_matches(name, KEYS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{name} ({source}): no such setting{hint} All settings: pfedgpa settings"
        )
    return KEYS[name]


def conf_path(conf: str) -> Path:
    """The YAML file that ``conf`` names: in the app's conf/ or a path of the user's."""
    path = Path(conf).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        path = APP_DIR / "conf" / f"{conf}.yaml"
    elif not path.is_absolute() and not path.exists():
        path = APP_DIR / path
    if not path.is_file():
        names = ", ".join(sorted(p.stem for p in (APP_DIR / "conf").glob("*.yaml")))
        raise ConfigError(f"conf = {conf!r}: no file {path}; experiments here: {names}")
    return path


@dataclass(frozen=True)
class Resolved:
    """A configuration and, for each key, where its value came from."""

    config: Config
    sources: Mapping[str, str]

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """``{key: {"value": …, "from": …}}``, JSON-ready."""
        values = dict(_flatten(dataclasses.asdict(self.config)))
        return {
            name: {
                "value": "auto" if (v := values[name.replace("-", "_")]) is None else v,
                "from": self.sources[name],
            }
            for name in KEYS
        }


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
        _known(name, "run-config")
    path = conf_path(str(overrides.get("conf", KEYS["conf"].default)))
    try:
        loaded = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must map settings to values")

    values: dict[str, Any] = {name: key.default for name, key in KEYS.items()}
    sources = dict.fromkeys(KEYS, "default")
    for source, layer in ((path.name, dict(_flatten(loaded))), ("run-config", overrides)):
        for name, value in layer.items():
            values[name] = _parse(_known(name, source), value, source)
            sources[name] = source
    prefix = "pfedgpa."
    nested = {n[len(prefix) :]: v for n, v in values.items() if n.startswith(prefix)}
    flat = {n: v for n, v in values.items() if "." not in n}

    def fields(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {n.replace("-", "_"): v for n, v in mapping.items()}

    config = Config(**fields(flat), pfedgpa=PFedGPASettings(**fields(nested)))
    _check(config)
    return Resolved(config, types.MappingProxyType(sources))


@lru_cache(maxsize=4)
def _resolve_items(items: tuple[tuple[str, Scalar], ...]) -> Resolved:
    return resolve(dict(items))


def resolve_cached(run_config: Mapping[str, Any]) -> Resolved:
    """``resolve``, remembered: a client asks again at each message."""
    return _resolve_items(tuple(sorted(run_config.items())))


def _check(config: Config) -> None:
    """Refuse what each value alone cannot show."""
    for name in config.method:
        if name not in METHODS:
            raise ConfigError(f"method = {name!r}: must be one of {', '.join(METHODS)}")
    if len(set(config.method)) < len(config.method):
        raise ConfigError(f"method = {','.join(config.method)}: names a method twice")
    if not is_known_dataset(config.dataset):
        raise ConfigError(f"dataset = {config.dataset!r}: must be {DATASET_HELP}")
    others = {m: f for m in config.method if (f := method_class(m).federation(config)) != "fedavg"}
    if config.uploads and others:
        raise ConfigError(
            f"uploads: holds FedAvg's rounds, but {', '.join(others)} has rounds of its own"
        )
    strength, steps = config.pfedgpa.strength, config.pfedgpa.diffusion_steps
    if strength is not None and strength > steps:
        raise ConfigError(
            f"pfedgpa.strength = {strength}: must be at most pfedgpa.diffusion-steps = {steps}"
        )
    if config.pfedgpa.generate_from > config.num_server_rounds:
        raise ConfigError(
            f"pfedgpa.generate-from = {config.pfedgpa.generate_from}: must be at most "
            f"num-server-rounds = {config.num_server_rounds}"
        )
    if config.fine_tune_grid_epochs and not config.validation_share:
        raise ConfigError(
            "fine-tune-grid-epochs > 0 chooses by validation: validation-share must be > 0"
        )
    if config.train_per_client - round(config.train_per_client * config.validation_share) < 1:
        raise ConfigError("validation-share leaves no image to train on")
