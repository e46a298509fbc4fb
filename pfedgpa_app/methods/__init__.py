"""The methods: one file each, which holds both the server half and the client half.

``METHODS`` is the registry: a method's name and its class.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods.base import Personaliser, Rounds
from pfedgpa_app.methods.baselines import ClientMean, GroupMean, LastUpload
from pfedgpa_app.methods.cfl import ClusteredFL
from pfedgpa_app.methods.ditto import Ditto
from pfedgpa_app.methods.fedala import FedALA
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.methods.fedavgm import FedAvgM
from pfedgpa_app.methods.fedbabu import FedBABU
from pfedgpa_app.methods.fedfomo import FedFomo
from pfedgpa_app.methods.fedper import FedPer
from pfedgpa_app.methods.fedproto import FedProto
from pfedgpa_app.methods.fedprox import FedProx
from pfedgpa_app.methods.fedrep import FedRep
from pfedgpa_app.methods.fine_tuning import FedAvgFT, FedAvgFTTuned
from pfedgpa_app.methods.generation import (
    PFedGPAInverted,
    PFedGPAOnce,
    PFedGPASampled,
    RememberingFedAvg,
)
from pfedgpa_app.methods.krum import Krum
from pfedgpa_app.methods.lg_fedavg import LGFedAvg
from pfedgpa_app.methods.local import Local
from pfedgpa_app.methods.per_fedavg import PerFedAvg
from pfedgpa_app.methods.pfedgpa import PFedGPA
from pfedgpa_app.methods.pfedhn import PFedHN
from pfedgpa_app.methods.pfedme import PFedMe
from pfedgpa_app.methods.scaffold import Scaffold
from pfedgpa_app.methods.trimmed_mean import TrimmedMean

METHODS: dict[str, type[Personaliser[Any]]] = {
    "local": Local,
    "fedavg": FedAvg,
    "fedavg-ft": FedAvgFT,
    "fedavg-ft-tuned": FedAvgFTTuned,
    "fedavgm": FedAvgM,
    "fedprox": FedProx,
    "scaffold": Scaffold,
    "fedper": FedPer,
    "fedrep": FedRep,
    "lg-fedavg": LGFedAvg,
    "fedbabu": FedBABU,
    "fedala": FedALA,
    "fedproto": FedProto,
    "ditto": Ditto,
    "pfedme": PFedMe,
    "per-fedavg": PerFedAvg,
    "cfl": ClusteredFL,
    "fedfomo": FedFomo,
    "pfedhn": PFedHN,
    "krum": Krum,
    "trimmed-mean": TrimmedMean,
    "last-upload": LastUpload,
    "client-mean": ClientMean,
    "group-mean": GroupMean,
    "pfedgpa": PFedGPA,
    "pfedgpa-once": PFedGPAOnce,
    "pfedgpa-inverted": PFedGPAInverted,
    "pfedgpa-sampled": PFedGPASampled,
}


def name_of(kind: type[Any]) -> str:
    """The name of a method's class, or of the method that a class of rounds extends."""
    names = {method: name for name, method in METHODS.items()}
    return next(names[base] for base in kind.__mro__ if base in names)


def federation_of(name: str) -> str:
    """The name of the federation whose rounds the method called ``name`` uses.

    Raises:
        ConfigError: these rounds belong to no method, so that clients could not find them.
    """
    rounds = METHODS[name].rounds_class()
    if rounds is not RememberingFedAvg and rounds not in set[Any](METHODS.values()):
        own = rounds.__name__
        raise ConfigError(
            f"method {name}: its rounds, {own}, belong to no method: let {own} extend Method, too, "
            f"and name it before {name}, as in method={rounds.__module__}:{own},…"
        )
    return name_of(rounds)


def federations(methods: Iterable[str]) -> dict[str, list[str]]:
    """{federation: its methods}; methods with the same rounds share one federation."""
    shared: dict[str, list[str]] = {}
    for name in methods:
        shared.setdefault(federation_of(name), []).append(name)
    return shared


def rounds_of(classes: Iterable[type[Rounds[Any]]]) -> type[Rounds[Any]]:
    """The rounds that serve all methods of a federation: the class that extends the others."""
    return max(classes, key=lambda kind: len(kind.__mro__))


def rounds_class(name: str) -> type[Rounds[Any]]:
    """The class of the rounds of the method or federation called ``name``."""
    return METHODS[name].rounds_class()
