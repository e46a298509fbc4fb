"""A network's weights by name: their layers, and their layout as one vector."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
NOT_FINITE = "numbers that are not finite"  # in messages
_LARGEST = torch.finfo(torch.float32).max


def finite(tensor: Tensor) -> Tensor:
    """Return which numbers of a tensor are finite, also as the float32 of a layout's vectors."""
    return (tensor.float() if tensor.is_floating_point() else tensor).isfinite()


def all_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor are finite, also as float32; takes one pass over them."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    least, most = tensor.aminmax()  # both are NaN if any number is, and fail the comparison
    return float(least) >= -_LARGEST and float(most) <= _LARGEST


def odd_places(weights: Mapping[str, Tensor]) -> Weights:
    """For each tensor with numbers that are not finite (a mask of -inf, say), a mask of them."""
    return {name: ~finite(t) for name, t in weights.items() if not all_finite(t)}


def finite_elsewhere(tensor: Tensor, odd: Tensor | None) -> bool:
    """Whether all numbers of a tensor are finite but those that ``odd`` marks, if it fits."""
    if all_finite(tensor):
        return True
    good = finite(tensor)
    if odd is not None and odd.shape == good.shape:
        good |= odd
    return bool(good.all())


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector, in the order of the names."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, weights: Weights) -> Layout:
        """The layout of ``weights``."""
        tensors = weights.values()
        return cls(tuple(weights), tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors))

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [shape.numel() for shape in self.shapes]

    def flatten(self, weights: Weights) -> Tensor:
        """Return ``weights`` as one float32 vector [P].

        Raises:
            ValueError: their names, shapes or dtypes are not the layout's.
        """
        if Layout.of(weights) != self:
            raise ValueError("weights of another layout")
        return torch.cat([weights[name].detach().reshape(-1).float() for name in self.names])

    def unflatten(self, vector: Tensor) -> Weights:
        """The named tensors of ``vector`` [P], as copies."""
        parts = vector.split(self.sizes)
        return {
            name: part.reshape(shape).to(dtype).clone()
            for name, part, shape, dtype in zip(
                self.names, parts, self.shapes, self.dtypes, strict=True
            )
        }

    def last(self, names: Sequence[str]) -> tuple[Layout, slice]:
        """Return the layout of the last tensors, called ``names``, and their slice of a vector.

        Raises:
            ValueError: ``names`` are not the last ones in their order, or there are none.
        """
        first = len(self.names) - len(names)
        if not names or self.names[first:] != tuple(names):
            raise ValueError(f"not the last tensors of {', '.join(self.names)}: {', '.join(names)}")
        part = Layout(self.names[first:], self.shapes[first:], self.dtypes[first:])
        return part, slice(sum(self.sizes[:first]), None)

    def layers(self) -> list[slice]:
        """Return each layer's slice of a vector.

        A layer is a row of neighbouring tensors of one module; a tensor of the network itself is
        a layer of its own.
        """
        found: list[slice] = []
        end, before = 0, None
        for name, size in zip(self.names, self.sizes, strict=True):
            layer = module_of(name) or name
            start = found.pop().start if layer == before else end
            end, before = end + size, layer
            found.append(slice(start, end))
        return found

    def classifier(self) -> slice:
        """Return the slice of the last non-empty matrix: a feed-forward network's classifier.

        Without any matrix, it is the slice of the whole vector.
        """
        end = 0
        found = slice(0, sum(self.sizes))
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            if len(shape) == 2 and size:
                found = slice(end, end + size)
            end += size
        return found


def is_statistic(name: str) -> bool:
    """Whether ``name`` is a normalisation layer's statistic, as BatchNorm's ``running_var``."""
    return name.rpartition(".")[2].startswith("running_")


def own_statistics(names: Collection[str], made: Container[str]) -> list[str]:
    """Return the statistics that are a client's own, where ``made`` weights are made for it.

    If all trained weights are made, these are all statistics. Otherwise they are those above the
    first layer with a made weight: lower layers see the mean's weights alone.

    Args:
        names: the network's weights, in the order of their use.
        made: the names of the weights that are made for each client.
    """
    found: list[str] = []
    above = all(name in made for name in names if not is_statistic(name))
    for layer in layers(names):
        if above:
            found += [name for name in layer if is_statistic(name)]
        above = above or any(name in made for name in layer if not is_statistic(name))
    return found


def layers(names: Iterable[str]) -> list[list[str]]:
    """Group the names of weights by the layer they belong to, in the network's order."""
    of: dict[str, list[str]] = {}
    for name in names:
        of.setdefault(module_of(name), []).append(name)
    return list(of.values())


def module_of(name: str) -> str:
    """Return the module that a weight belongs to, even if it is composed by parametrizations.

    It is called as in ``named_modules``: "" is the network itself.
    """
    return f".{name}".rpartition(".")[0].partition(".parametrizations.")[0].removeprefix(".")


def last_layers(names: Iterable[str], count: int) -> list[str]:
    """Return the names of the weights of the last ``count`` layers; the last one is the head."""
    every = layers(names)
    return [name for layer in every[max(0, len(every) - count) :] for name in layer]


def body(names: Sequence[str], head_layers: int = 1) -> list[str]:
    """Return the names of the weights below the last ``head_layers`` layers."""
    head = last_layers(names, head_layers)
    return [name for name in names if name not in head]


def can_be_sent(tensor: Tensor) -> bool:
    """Whether NumPy, through which tensors are sent, can hold the tensor."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    try:
        torch.empty(0, dtype=tensor.dtype).numpy()
    except (TypeError, RuntimeError):
        return False
    return True
