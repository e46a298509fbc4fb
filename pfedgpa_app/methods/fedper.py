"""FedPer (Arivazhagan et al. 2019): a shared body under personal last layers.

"Federated Learning with Personalization Layers", arXiv 1912.00818.

shared: the body · kept: the last ``head-layers`` layers, on the client · client: local-epochs of
SGD on both · server: the body's mean, weighted by training images · evaluated: the global body
under the client's own head. All heads start alike; with head-layers=0 the method is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.weights import body
from pfedgpa_app.methods.averaging import Averaging, Shared


@dataclass(frozen=True)
class FedPerSettings(MethodSettings):
    """Which layers are personal."""

    head_layers: int = setting(1, "K_P, the number of last layers that are personal", low=0)


class FedPer(Averaging[Shared]):
    """Clients share all but their last layers."""

    title = "FedPer"
    settings = FedPerSettings

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        return body(names, config.of(FedPerSettings).head_layers)
