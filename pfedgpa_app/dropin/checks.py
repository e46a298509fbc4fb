"""What `PFedGPA` refuses, what it warns of before and after its first round, and its errors."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any

from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedAvg, Strategy

from pfedgpa_app.config.parse import check_section, fields_of, parse
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, shown
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.pfedgpa import momentum_by_share
from pfedgpa_app.server.screening import NoUploadsError

logger = logging.getLogger("flwr")


def check_bases(kind: type, mine: type) -> None:
    """Refuse a subclass ``kind`` of ``mine`` that aggregates by another strategy, too.

    Raises:
        ConfigError: that strategy or pFedGPA would be left out without a word.
    """
    bases = kind.__mro__
    below = bases[bases.index(mine) + 1 :]
    for base in bases:
        is_flowers = base.__module__.partition(".")[0] == "flwr"
        if base in (mine, FedAvg, Strategy) or not (base in below or is_flowers):
            continue
        if {"aggregate_train", "aggregate_evaluate"} & vars(base).keys():
            raise ConfigError(
                f"{kind.__name__} is a PFedGPA and a {base.__name__}: both aggregate, and only one "
                f"of them would. Derive it from PFedGPA alone, or from {base.__name__} alone"
            )


def checked_settings(settings: Any) -> PFedGPASettings:
    """The server's ``settings``.

    Raises:
        ConfigError: they are none, are out of range or ask for what foreign clients do not share.
    """
    if not isinstance(settings, PFedGPASettings):
        raise ConfigError(
            f"settings = {shown(settings)}: must be a PFedGPASettings of pfedgpa_app, such as "
            "PFedGPASettings(momentum=0)"
        )
    check_section("pfedgpa", settings)
    if settings.descriptor == "labels":
        raise ConfigError("descriptor = 'labels': these clients do not share class counts")
    return settings


def checked(name: str, value: Any) -> Any:
    """The ``value`` of an argument that means what the run's setting of that name means.

    Raises:
        ConfigError: it is of the wrong type or out of range.
    """
    [key] = [key for key in fields_of(Config) if key.name == name.replace("_", "-")]
    return parse(dataclasses.replace(key, name=name), value, "PFedGPA")


def checked_norm(value: Any) -> float:
    """The ``value`` of ``max_upload_norm``; 0, for none, if it is infinite.

    Raises:
        ConfigError: as ``checked``.
    """
    return float(checked("max_upload_norm", 0.0 if value == math.inf else value))


def check_share(share: float) -> None:
    """Refuse a ``fraction_train`` by which no node would train.

    Raises:
        ConfigError: it is 0.
    """
    if not share:
        raise ConfigError(
            "fraction_train = 0: no node would train, so there would be nothing to generate from. "
            "To evaluate only, use Flower's FedAvg"
        )
    checked("fraction_train", share)


def check_going(going: bool) -> None:
    """Refuse to run inside another strategy, which does not call this strategy's ``start``.

    Raises:
        ConfigError: ``going`` says that PFedGPA was not started.
    """
    if not going:
        raise ConfigError(
            "PFedGPA does not work inside another strategy: noise that it adds to the mean, for "
            "central differential privacy, would not reach the weights that PFedGPA generates for "
            "each node. Start PFedGPA itself; for privacy give clients Flower's LocalDpMod"
        )


def momentum_in_words(momentum: float | None, share: float, loss_key: str) -> str:
    """Which server momentum there is, and why.

    Args:
        momentum: the setting; None: automatic.
        share: ``fraction_train``.
    """
    if momentum is not None:
        return f"{momentum:g}, by settings" if momentum else "none, by settings"
    least = momentum_by_share(share)
    said = f"{least:.2g}, by fraction_train = {share:g}, or more" if least else "only"
    return (
        f"{said} where {loss_key!r} falls slowly; "
        "settings=PFedGPASettings(momentum=0) switches it off"
    )


def warn_of_rate(train_config: ConfigRecord | None, key: str) -> None:
    """Warn if clients cannot be sent the last rounds' learning rate."""
    if not isinstance(dict(train_config or {}).get(key), (int, float)):
        logger.warning(
            "PFedGPA: train_config has no number named %r: clients train at their own learning "
            "rate in the last rounds too",
            key,
        )


def warn_of_losses(uploads: Mapping[int, Upload], key: str) -> None:
    """Warn if no client reports the training loss on which the server's momentum depends."""
    if not any(math.isfinite(upload.loss) for upload in uploads.values()):
        logger.warning(
            "PFedGPA: no reply's metrics have a number named %r, the training loss: the server's "
            "momentum cannot depend on it",
            key,
        )


def no_uploads(rounds: int, unusable: Mapping[int, str]) -> NoUploadsError:
    """The error for a run none of whose ``rounds`` brought a usable upload."""
    why = "; ".join(f"node {node} {wrong}" for node, wrong in list(unusable.items())[:3])
    return NoUploadsError(
        f"PFedGPA: none of {rounds} rounds brought a usable upload; in round {rounds}: "
        + (why or "no node was asked")
    )
