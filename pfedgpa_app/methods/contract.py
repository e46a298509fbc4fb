"""What a method's hooks promise, and how it is told that one fails or breaks its promise."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.core.settings import ConfigError, DataError, listed
from pfedgpa_app.core.weights import Weights, all_finite, finite

GUIDE = "docs/add-a-method.md"
_LONGEST = 200  # characters of what an exception says


class MethodError(RuntimeError):
    """A method's own code fails or returns what it must not; the text is for the user."""


@dataclass(frozen=True)
class Hook:
    """One call of a method's own code.

    Attributes:
        method: its name.
        kind: its class.
        name: of the function that is called.
        round: in which it is called; 0: in none.
    """

    method: str
    kind: type
    name: str
    round: int = 0

    def wrong(self, did: str, wanted: str) -> MethodError:
        """It ``did`` something else than is ``wanted``."""
        when = f" in round {self.round}" if self.round else ""
        return MethodError(f"method {self.method}: its {self.name} {did}{when}: {wanted}")

    @contextlib.contextmanager
    def told(self) -> Iterator[None]:
        """Within it, an exception becomes a MethodError that names hook, round, type and line.

        What already tells the user what to do passes.
        """
        try:
            yield
        except (ConfigError, DataError, MethodError):
            raise
        except Exception as error:  # whatever a method's own code raises
            said = " ".join(str(error).split())[:_LONGEST]
            kind = type(error).__name__
            what = f"{kind}: {said}" if said else kind
            raise self.wrong("failed", what + self._place(error)) from error

    def _place(self, error: Exception) -> str:
        """The innermost line of the class's own file, else of what it extends, that failed."""
        frames = traceback.extract_tb(error.__traceback__)
        for kind in self.kind.__mro__:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            lines = [frame.lineno for frame in frames if frame.filename == file]
            if file and lines:
                return f" ({Path(file).name}, line {lines[-1]})"
        return ""


def kind_of(value: Any) -> str:
    """What kind of thing ``value`` is, as a sentence says it."""
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def check_tensors(hook: Hook, weights: Any, what: str = "") -> None:
    """Refuse ``weights`` that are no tensors by name, or none that can be sent.

    Args:
        what: they are of what ``hook`` returned; "" for all of it.

    Raises:
        MethodError: they are something else.
    """
    wanted = "a dict of torch tensors by name is wanted, as weights_of(task.model) makes one"
    if not isinstance(weights, Mapping):
        raise hook.wrong(f"returned {kind_of(weights)}{what and f' as {what}'}", wanted)
    for name, tensor in weights.items():
        entry = f"{what} {name!r}".strip()
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise hook.wrong(f"returned {kind_of(tensor)} as {entry}", wanted)
        if not _can_be_sent(tensor):
            kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
            raise hook.wrong(
                f"returned a tensor of {kind} as {entry}",
                "Flower cannot send such; .to_dense().float() makes one that it can",
            )


def _can_be_sent(tensor: Tensor) -> bool:
    """Whether NumPy, by which tensors are sent, has such."""
    if tensor.layout is not torch.strided or tensor.is_meta:
        return False
    try:
        torch.empty(0, dtype=tensor.dtype).numpy()
    except (TypeError, RuntimeError):
        return False
    return True


def check_shapes(hook: Hook, weights: Weights, like: Mapping[str, Tensor]) -> None:
    """Refuse ``weights`` that are called as one of ``like`` and have another shape.

    Raises:
        MethodError: which.
    """
    for name, tensor in weights.items():
        if name in like and tensor.shape != like[name].shape:
            raise hook.wrong(
                f"returned {name} of shape {list(tensor.shape)}",
                f"the network has it of shape {list(like[name].shape)}",
            )


def not_finite(weights: Weights, odd: Mapping[str, Tensor]) -> list[str]:
    """The names of those that are not finite in other places than ``odd`` has them so."""
    return [
        name
        for name, tensor in weights.items()
        if not all_finite(tensor) and not bool((finite(tensor) | _at(odd, name, tensor)).all())
    ]


def _at(odd: Mapping[str, Tensor], name: str, tensor: Tensor) -> Tensor:
    mask = odd.get(name)
    return mask if mask is not None and mask.shape == tensor.shape else torch.tensor(False)


def odd_places(weights: Weights) -> dict[str, Tensor]:
    """Where those are not finite that are not, as a mask of -inf; {} as a rule."""
    return {name: ~finite(t) for name, t in weights.items() if not all_finite(t)}


def refuse_not_finite(hook: Hook, names: list[str]) -> None:
    """Refuse what the server made of finite uploads.

    Raises:
        MethodError: there are ``names`` of weights that are not finite.
    """
    if names:
        raise hook.wrong(
            f"made weights that are not finite ({listed(names, 3)})",
            "clients' uploads were finite, so the fault is in its own server half: look there for "
            "a division by zero, or too long a step; what was learned before is kept",
        )


def check_constant(hook: Hook, weights: Any, begun: Weights) -> None:
    """Refuse ``state.global_weights`` of other names, shapes or dtypes than it began with.

    Args:
        begun: tensors such as it began with.

    Raises:
        MethodError: what has changed.
    """
    always = "what clients share has the same names, shapes and dtypes in every round"
    place = "state.global_weights"
    if not isinstance(weights, Mapping):
        raise hook.wrong(f"left {place} as {kind_of(weights)}", f"a dict of tensors; {always}")
    if missing := [name for name in begun if name not in weights]:
        raise hook.wrong(f"left {place} without {listed(missing, 3)}", always)
    for name, tensor in weights.items():
        like = begun.get(name)
        if like is None or not isinstance(tensor, Tensor):
            what = f"{name!r}, {kind_of(tensor)}," if like is None else kind_of(tensor)
            where = place if like is None else f"{place}[{name!r}]"
            raise hook.wrong(f"put {what} into {where}", f"a dict of tensors; {always}")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            made, was = (f"{t.dtype} {list(t.shape)}" for t in (tensor, like))
            raise hook.wrong(f"made {place}[{name!r}] {made}", f"it was {was}; {always}")
