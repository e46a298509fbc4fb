"""What every method starts from."""

from __future__ import annotations

from pathlib import Path

from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, listed
from pfedgpa_app.core.weights import Weights, own_statistics
from pfedgpa_app.diffusion import saved
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.halves import check_shared
from pfedgpa_app.models.build import classifier_bias, network_of
from pfedgpa_app.models.networks import weight_names, weights_of


def initial_weights(config: Config, schema: Schema) -> Weights:
    """What every method starts from: by the seed, or a saved distribution's mean.

    Raises:
        ConfigError: no network fits the data, or ``start-from`` cannot be read, or is of another
            network.
        MethodError: a method shares what the network has not.
    """
    network = network_of(config, schema)
    for name in config.method:
        METHODS[name].check_network(config, network)
        check_shared(name, METHODS[name].rounds_class(), config, weight_names(network))
    if config.logit_adjustment:
        classifier_bias(config, schema)
    if config.augment and (len(schema.shape) != 3 or schema.tokens):
        raise ConfigError(
            f"augment = true: crops and flips images; these data are of shape {list(schema.shape)}"
        )
    initial = weights_of(network)
    return warm_start(Path(config.start_from), initial) if config.start_from else initial


def warm_start(path: Path, initial: Weights) -> Weights:
    """The mean of a saved distribution, in place of ``initial``; it may hold the last layers only.

    Raises:
        ConfigError: it cannot be read, or was learned from another network's weights.
    """
    try:
        start = saved.load(user_path(path).absolute())
        seen = saved.statistics(user_path(path).absolute())
    except ValueError as error:
        raise ConfigError(f"start-from = {str(path)!r}: {error}") from error
    if lacks := [n for n in own_statistics(initial, start.layout.names) if n not in seen]:
        raise ConfigError(
            f"start-from = {str(path)!r}: does not say what normalisation layers have seen "
            f"({listed(lacks, 3)}), as files of earlier versions do not: learn it again"
        )
    mean = start.layout.unflatten(start.anchor) | seen
    for name, tensor in mean.items():
        if name not in initial or tensor.shape != initial[name].shape:
            raise ConfigError(
                f"start-from = {str(path)!r}: has {name} of shape {list(tensor.shape)}, which this "
                "run's network has not"
            )
    return initial | mean
