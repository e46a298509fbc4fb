"""The paper family's networks, two for data of any size, and what clients share of a network.

The paper's sizes are from FedPAC's code, which pFedGPA's authors share. In these networks
max-pooling comes before the leaky ReLU: the two commute, since the activation increases, and
pooling first leaves the activation a quarter of the work.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection

from torch import nn

from pfedgpa_app.core.randomness import seeded
from pfedgpa_app.core.settings import ConfigError, near
from pfedgpa_app.core.weights import Weights, is_statistic, layers, module_of


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


def conv(classes: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Images [C, H, W] of any size → classes: three convolutions, pooled to at most 4×4."""
    side = [max(1, min(4, size // 8)) for size in shape[1:]]
    layers = OrderedDict[str, nn.Module]()
    inputs = shape[0]
    for i, outputs in enumerate((32, 64, 64), start=1):
        layers[f"conv{i}"] = nn.Conv2d(inputs, outputs, 3, padding=1)
        layers[f"act{i}"] = nn.LeakyReLU()
        halves = min(shape[1:]) >> i  # a side of one cannot be halved
        layers[f"pool{i}"] = nn.MaxPool2d(2) if halves else nn.Identity()
        inputs = outputs
    layers["pool"] = nn.AdaptiveAvgPool2d((side[0], side[1]))
    layers["flatten"] = nn.Flatten()
    layers["fc1"] = nn.Linear(inputs * side[0] * side[1], 128)
    layers["act"] = nn.LeakyReLU()
    layers["fc2"] = nn.Linear(128, classes)
    return nn.Sequential(layers)


def mlp(classes: int, shape: tuple[int, ...]) -> nn.Sequential:
    """Rows of a table [F] → classes, with two hidden layers."""
    return nn.Sequential(
        OrderedDict[str, nn.Module](
            fc1=nn.Linear(shape[0], 64),
            act1=nn.LeakyReLU(),
            fc2=nn.Linear(64, 64),
            act2=nn.LeakyReLU(),
            fc3=nn.Linear(64, classes),
        )
    )


NETWORKS = {"digits": digits, "fashion": fashion, "cifar": cifar}
SHAPES: dict[tuple[int, ...], str] = {
    (1, 8, 8): "digits",
    (1, 28, 28): "fashion",
    (3, 32, 32): "cifar",
}
MADE_FOR_ANY = {"conv": conv, "mlp": mlp}
_ORDER = "_pfedgpa_weights"  # the attribute with the ordered names of a network's weights
_USED = "_pfedgpa_used"  # the attribute with the names of its modules that have weights, by use


def build(name: str, classes: int, seed: int) -> nn.Module:
    """Make one of the paper's networks from ``seed``; the same on every machine."""
    with seeded(seed):
        return NETWORKS[name](classes)


def weight_names(network: nn.Module) -> list[str]:
    """Return the names of the tensors that clients share of a network, from the first layer on.

    These are the trained weights, tied tensors only once, and running statistics. Frozen weights,
    counters and other buffers are not shared: they are the same everywhere, as the network is made.
    """
    if order := getattr(network, _ORDER, None):
        return list(order)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    return [n for n in network.state_dict() if n in trained or is_statistic(n)]


def order_weights(
    network: nn.Module, used: list[str], head: str, outputs: Collection[str] = ()
) -> None:
    """Order ``weight_names`` by use, with ``head`` last, whatever order they were declared in.

    Args:
        used: the names of the modules, in the order of use.
        head: the module whose weights come last; "" for the one that is used last.
        outputs: the names of the modules whose output is the network's.

    Raises:
        ConfigError: there is no such module, nothing of it is trained, or it is several layers.
    """
    place = {name: i for i, name in enumerate(used)}

    def place_of(name: str) -> int:
        module = name.rpartition(".")[0]
        while module and module not in place:  # then a parent uses its weights
            module = module.rpartition(".")[0]
        return place.get(module, -1)

    names = sorted(weight_names(network), key=place_of)
    if head:
        modules = dict(network.named_modules())
        if head not in modules:
            raise ConfigError(
                f"head = {head!r}: the network has no such module{near(head, modules)}"
            )
        last = [name for name in names if name.startswith(f"{head}.")]
        if not last:
            raise ConfigError(f"head = {head!r}: nothing of that module is trained")
        if len(several := [module_of(layer[0]) for layer in layers(last)]) > 1:
            raise ConfigError(
                f"head = {head!r}: the head must be one layer, but that module has {len(several)}: "
                f"{', '.join(several)}; name one: head={several[-1]}"
            )
        names = [name for name in names if name not in last] + last
    setattr(network, _ORDER, tuple(names))
    owners = {module_of(name) for name, _ in network.named_parameters(remove_duplicate=False)}
    # what is used after the head does not matter if the head makes the output
    after = [] if module_of(names[-1]) in outputs else [name for name in used if name in owners]
    setattr(network, _USED, tuple(after))


def used_after(network: nn.Module, module: str) -> str:
    """Return the name of a module with weights, trained or frozen, used after ``module``; or ""."""
    used: tuple[str, ...] = getattr(network, _USED, ())
    return used[-1] if module in used and used[-1] != module else ""


def head_of(network: nn.Module) -> nn.Module:
    """Return the module that holds the last layer's weights."""
    return network.get_submodule(module_of(weight_names(network)[-1]))


def weights_of(network: nn.Module) -> Weights:
    """Return a detached copy, on the CPU, of what clients share of a network."""
    tensors = network.state_dict()
    return {n: tensors[n].detach().cpu().clone() for n in weight_names(network)}


def fixed_of(network: nn.Module) -> Weights:
    """Return what clients do not share of a network: frozen weights, counters, other buffers."""
    tensors = network.state_dict()
    # by address, as tied tensors have several names
    shared = {tensors[name].data_ptr() for name in weight_names(network)}
    return {name: t for name, t in tensors.items() if t.data_ptr() not in shared}


def load(network: nn.Module, weights: Weights) -> None:
    """Set ``weights`` by name; the network's other tensors stay as they are.

    Raises:
        RuntimeError: the network has no tensor of a name, or one of another shape.
    """
    refused = network.load_state_dict(weights, strict=False).unexpected_keys
    if refused:
        raise RuntimeError(f"the network has no weights named {', '.join(refused)}")
