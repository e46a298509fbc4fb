"""The paper family's networks; sizes from FedPAC's code, which pFedGPA's authors share.

Max-pooling comes before the leaky ReLU: the two commute, since the activation increases,
and pooling first leaves it a quarter of the work.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

from pfedgpa_app.core.weights import Weights


def _conv(inputs: int, outputs: int, kernel: int, padding: int = 0) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, kernel, padding=padding),
            pool=nn.MaxPool2d(2),
            act=nn.LeakyReLU(),
        )
    )


def _network(convs: list[nn.Sequential], features: int, hidden: int, classes: int) -> nn.Sequential:
    layers = OrderedDict[str, nn.Module](
        (f"block{i}", block) for i, block in enumerate(convs, start=1)
    )
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(features, hidden)
    layers["act"] = nn.LeakyReLU()
    layers["fc2"] = nn.Linear(hidden, classes)
    return nn.Sequential(layers)


def cifar(classes: int = 10) -> nn.Sequential:
    """3×32×32 → classes; 107,690 weights for 10 classes."""
    return _network([_conv(3, 16, 5), _conv(16, 32, 5, 1), _conv(32, 64, 3, 1)], 576, 128, classes)


def fashion(classes: int = 10) -> nn.Sequential:
    """1×28×28 → classes; 117,066 weights for 10 classes, 123,774 for 62."""
    return _network([_conv(1, 16, 5), _conv(16, 32, 5, 1)], 800, 128, classes)


def digits(classes: int = 10) -> nn.Sequential:
    """1×8×8 → classes; 5,510 weights for 10 classes."""
    return _network([_conv(1, 16, 3, 1)], 256, 20, classes)


NETWORKS = {"digits": digits, "fashion": fashion, "cifar": cifar}
SHAPES = {(1, 8, 8): "digits", (1, 28, 28): "fashion", (3, 32, 32): "cifar"}


def network_name(model: str, shape: tuple[int, int, int]) -> str:
    """The network for images of ``shape`` (C, H, W) when ``model`` is "auto", else ``model``.

    Raises:
        ValueError: no network fits images of that shape.
    """
    fitting = SHAPES.get(shape)
    if fitting is None or model not in ("auto", fitting):
        asked = "no network" if model == "auto" else f"model {model} does not"
        shapes = ", ".join("×".join(map(str, s)) for s in SHAPES)
        sizes = [str(s[1]) for s, n in SHAPES.items() if s[0] == shape[0] and model in ("auto", n)]
        resize = f" (imagefolder: set image-size={' or '.join(sizes)})" if sizes else ""
        raise ValueError(
            f"{asked} fit images of {'×'.join(map(str, shape))}; networks take {shapes}{resize}"
        )
    return fitting


def build(name: str, classes: int, seed: int) -> nn.Module:
    """A freshly initialised network, the same for the same seed on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return NETWORKS[name](classes)


def weights_of(model: nn.Module) -> Weights:
    """A detached copy of the model's tensors, on the CPU."""
    return {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}


def load(model: nn.Module, weights: Weights) -> None:
    """Set ``weights`` by name; the network's others stay as they are.

    Raises:
        RuntimeError: a name that the network does not have, or another shape.
    """
    refused = model.load_state_dict(weights, strict=False).unexpected_keys
    if refused:
        raise RuntimeError(f"the network has no weights named {', '.join(refused)}")
