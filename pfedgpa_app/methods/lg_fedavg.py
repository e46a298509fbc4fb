"""LG-FedAvg (Liang et al. 2020, Algorithm 1): local representations under a global head.

"Think Locally, Act Globally: Federated Learning with Local and Global Representations", arXiv
2001.01523.

shared: the last ``global-layers`` layers · kept: the rest, on the client · client: local-epochs of
SGD on both · server: the mean of the shared layers, weighted by training images · evaluated: the
client's own layers under the global ones. Training starts from scratch; the authors' code starts
from a trained FedAvg model.

There are two definitions in the wild. In the text of the paper, clients share the last layers: the
default. The authors' CIFAR-10 script shares the convolutions and keeps the linear layers:
share=first, global-layers=3. With all layers shared the method is FedAvg.
"""

from __future__ import annotations

from dataclasses import dataclass

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.weights import last_layers, layers
from pfedgpa_app.methods.averaging import Averaging, Shared


@dataclass(frozen=True)
class LGFedAvgSettings(MethodSettings):
    """Which layers are global."""

    share: str = setting("last", "which end of the network is shared", choices=("last", "first"))
    global_layers: int = setting(1, "number of layers at that end that are shared", low=1)


class LGFedAvg(Averaging[Shared]):
    """Clients share only the layers at one end of the network."""

    title = "LG-FedAvg"
    settings = LGFedAvgSettings

    @classmethod
    def shared(cls, config: Config, names: list[str]) -> list[str]:
        own = config.of(LGFedAvgSettings)
        if own.share == "last":
            return last_layers(names, own.global_layers)
        return [name for layer in layers(names)[: own.global_layers] for name in layer]
