"""The methods: one file each, its server half beside its client half.

``METHODS`` is the registry: a method's name and where its class is.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pfedgpa_app.config import Config
    from pfedgpa_app.methods.base import Method

METHODS = {
    "local": "local:Local",
    "fedavg": "fedavg:FedAvg",
    "fedavg-ft": "fedavg:FedAvgFT",
    "fedavg-ft-tuned": "fedavg:FedAvgFTTuned",
    "fedavgm": "fedavgm:FedAvgM",
    "fedprox": "fedprox:FedProx",
    "scaffold": "scaffold:Scaffold",
    "fedper": "fedper:FedPer",
    "fedrep": "fedrep:FedRep",
    "lg-fedavg": "lg_fedavg:LGFedAvg",
    "fedbabu": "fedbabu:FedBABU",
    "fedala": "fedala:FedALA",
    "fedproto": "fedproto:FedProto",
    "ditto": "ditto:Ditto",
    "pfedme": "pfedme:PFedMe",
    "per-fedavg": "per_fedavg:PerFedAvg",
    "cfl": "cfl:ClusteredFL",
    "fedfomo": "fedfomo:FedFomo",
    "pfedhn": "pfedhn:PFedHN",
    "krum": "krum:Krum",
    "trimmed-mean": "trimmed_mean:TrimmedMean",
    "last-upload": "controls:LastUpload",
    "client-mean": "controls:ClientMean",
    "group-mean": "controls:GroupMean",
    "pfedgpa": "pfedgpa:PFedGPA",
    "pfedgpa-once": "pfedgpa:PFedGPAOnce",
    "pfedgpa-inverted": "pfedgpa:PFedGPAInverted",
    "pfedgpa-sampled": "pfedgpa:PFedGPASampled",
}


def method_class(name: str) -> type[Method[Any]]:
    """The class of the method called ``name``, a key of ``METHODS``."""
    module, attribute = METHODS[name].split(":")
    return cast("type[Method[Any]]", getattr(import_module(f"{__name__}.{module}"), attribute))


def federation_of(name: str, config: Config) -> str:
    """The name of the federation whose rounds the method called ``name`` uses."""
    return method_class(name).federation(config) or name
