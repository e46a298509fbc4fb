"""The weights that every method starts from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import NODES, Config
from pfedgpa_app.core.settings import ConfigError, listed
from pfedgpa_app.core.weights import Weights, layers, own_statistics
from pfedgpa_app.data.client import load_dataset, load_partition, load_schema
from pfedgpa_app.diffusion import saved
from pfedgpa_app.methods import METHODS, federations, rounds_class
from pfedgpa_app.methods.base import NOTHING
from pfedgpa_app.methods.halves import shared_names
from pfedgpa_app.models.build import classifier_bias, network_of, try_tokens
from pfedgpa_app.models.networks import fixed_of, weight_names, weights_of
from pfedgpa_app.training.sgd import no_step_on_one


def initial_weights(config: Config, schema: Schema) -> Weights:
    """Return the weights that every method starts from: the seed's, or a saved distribution's mean.

    Raises:
        ConfigError: no network fits the data, a setting does not fit the network or the data, or
            ``start-from`` cannot be read or is of another network.
        MethodError: a method shares weights that the network does not have.
    """
    network = network_of(config, schema)
    for name in config.method:
        METHODS[name].check_network(config, network)
        shared_names(name, rounds_class(name), config, weight_names(network))
    if config.logit_adjustment:
        classifier_bias(config, schema)
    if config.augment and (len(schema.shape) != 3 or schema.tokens):
        raise ConfigError(
            f"augment = true: crops and flips images, but the data have shape {list(schema.shape)}"
        )
    if config.batch_size == 1 and (why := no_step_on_one(network)):
        raise ConfigError(
            f"batch-size = 1: the network's {why}: set 2 or more, or use nn.GroupNorm in its place"
        )
    if schema.tokens and config.dataset != NODES:
        try_tokens(config, schema, _extreme_examples(config))
    initial = weights_of(network)
    if not config.start_from:
        return initial
    begun = warm_start(Path(config.start_from), initial)
    _check_fixed(config, origin(config, schema)["fixed"])
    return begun


def _extreme_examples(config: Config) -> Tensor:
    """Return the data's examples that hold the smallest and the largest number, [2, …]."""
    data = load_dataset(config)
    splits = [split for split in (data.train_images, data.test_images) if split.size]
    lows = [split[np.unravel_index(split.argmin(), split.shape)[0]] for split in splits]
    highs = [split[np.unravel_index(split.argmax(), split.shape)[0]] for split in splits]
    low, high = min(lows, key=np.min), max(highs, key=np.max)
    return torch.from_numpy(np.stack([low, high]))


def origin(config: Config, schema: Schema) -> dict[str, Any]:
    """Return what a run that starts from this one's distribution must know of it, for JSON."""
    network = network_of(config, schema)
    shared = weight_names(network)
    fixed = fixed_of(network) | {n: b for n, b in network.named_buffers() if n not in shared}
    seen = {n: _some_numbers(t) for n, t in fixed.items() if t.layout is torch.strided}
    return {"classes": schema.classes, "fixed": seen}


def _some_numbers(tensor: Tensor) -> list[float]:
    every = tensor.detach().cpu().flatten()
    places = torch.linspace(0, max(0, len(every) - 1), min(8, len(every))).long()
    return every[places].double().tolist()


def _close(one: list[float], other: list[float]) -> bool:
    # CPUs draw normal numbers a little differently
    return len(one) == len(other) and np.allclose(one, other, 1e-3, 1e-6, equal_nan=True)


def _check_fixed(config: Config, now: dict[str, list[float]]) -> None:
    """Refuse a start from weights that were trained around other frozen ones.

    Raises:
        ConfigError: says which.
    """
    before = saved.origin_of(saved.file_at(config.start_from)).get("fixed", {})
    known = [name for name in now if name in before]
    if other := [name for name in known if not _close(before[name], now[name])]:
        raise ConfigError(
            f"start-from = {config.start_from!r}: was learned around another {listed(other, 3)}, "
            "which no client trains: set seed and model-weights as in that run"
        )


def other_classes(config: Config, schema: Schema) -> Iterator[str]:
    """Say if the run begins with the classifier of other classes."""
    before = saved.origin_of(saved.file_at(config.start_from)).get("classes", schema.classes)
    if tuple(before) != schema.classes:
        yield (
            f"start-from = {config.start_from!r}: was learned from the classes "
            f"{listed(before, 5)}, so the classifier begins as theirs; this run's are, in order, "
            f"{listed(schema.classes, 5)}"
        )


def learn_nothing(config: Config) -> Iterator[str]:
    """Name the clients that have too few examples for a training step, and say what to do."""
    alone = [str(i) for i, split in enumerate(load_partition(config)) if len(split.train) == 1]
    if alone and (why := no_step_on_one(network_of(config, load_schema(config)))):
        yield (
            f"only one training example each: clients {listed(alone)}; the network's {why}, so "
            "they learn nothing: give them more, or use nn.GroupNorm in its place"
        )


def share_little(config: Config, schema: Schema, initial: Weights) -> Iterator[str]:
    """Say which federations share no weights, or no classifier that could be adjusted."""
    bias = classifier_bias(config, schema) if config.logit_adjustment else ""
    for name in federations(config.method):
        kind = rounds_class(name)
        shared = shared_names(name, kind, config, list(initial))
        if shared == [] and kind.sends != NOTHING:
            of = f"none of the network's {len(layers(initial))} layers"
            yield f"{METHODS[name].title}: clients share {of}, so each learns alone"
        if bias and not (kind.adjustable and (shared is None or bias in shared)):
            what = "its clients are sent no classifier to add their class frequencies to"
            yield f"logit-adjustment has no effect on {METHODS[name].title}: {what}"


def warm_start(path: Path, initial: Weights) -> Weights:
    """Return ``initial``, its weights replaced by the mean of a saved distribution.

    The distribution may hold the last layers only; the other weights stay as they are.

    Raises:
        ConfigError: it cannot be read, or was learned from another network's weights.
    """
    file = saved.file_at(path)
    try:
        start = saved.load(file)
        seen = saved.statistics(file)
    except ValueError as error:
        raise ConfigError(f"start-from = {str(path)!r}: {error}") from error
    if lacks := [n for n in own_statistics(initial, start.layout.names) if n not in seen]:
        raise ConfigError(
            f"start-from = {str(path)!r}: lacks what normalisation layers have seen "
            f"({listed(lacks, 3)}), as files of earlier versions do: learn it again"
        )
    mean = start.layout.unflatten(start.anchor) | seen
    for name, tensor in mean.items():
        if name not in initial or tensor.shape != initial[name].shape:
            raise ConfigError(
                f"start-from = {str(path)!r}: has {name} of shape {list(tensor.shape)}, which this "
                "run's network does not have"
            )
    return initial | mean
