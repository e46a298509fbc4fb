"""Check what a method's hooks return, and tell the user where a method's own code fails."""

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
from pfedgpa_app.core.weights import Weights, can_be_sent, finite_elsewhere

GUIDE = "docs/add-a-method.md"
_LONGEST = 200  # most characters of an exception's text that are shown


class MethodError(RuntimeError):
    """A method's own code fails or returns what it must not; the text is for the user."""


@dataclass(frozen=True)
class Hook:
    """One call of a method's own code.

    Attributes:
        method: the method's name.
        kind: the method's class.
        name: the name of the function that is called.
        round: the round in which it is called; 0 outside of rounds.
    """

    method: str
    kind: type
    name: str
    round: int = 0

    def wrong(self, did: str, wanted: str) -> MethodError:
        """The error that says what the hook ``did``, and what is ``wanted`` instead."""
        when = f" in round {self.round}" if self.round else ""
        return MethodError(f"method {self.method}: its {self.name} {did}{when}: {wanted}")

    @contextlib.contextmanager
    def errors_named(self) -> Iterator[None]:
        """Turn an exception into a MethodError that names the hook, round, type and line.

        Errors whose text already tells the user what to do pass unchanged.
        """
        try:
            yield
        except (ConfigError, DataError, MethodError):
            raise
        except Exception as error:  # a method's own code may raise anything
            said = " ".join(str(error).split())[:_LONGEST]
            kind = type(error).__name__
            what = f"{kind}: {said}" if said else kind
            raise self.wrong("failed", what + self._place(error)) from error

    def _place(self, error: Exception) -> str:
        """The innermost failing line in the file of the class, or else of a class it extends."""
        frames = traceback.extract_tb(error.__traceback__)
        for kind in self.kind.__mro__:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            lines = [frame.lineno for frame in frames if frame.filename == file]
            if file and lines:
                return f" ({Path(file).name}, line {lines[-1]})"
        return ""


def kind_of(value: Any) -> str:
    """The type of ``value`` with its article, for use in a sentence."""
    if value is None:
        return "None"
    kind = type(value).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"


def check_tensors(hook: Hook, weights: Any, what: str = "") -> None:
    """Refuse ``weights`` that are not a dict of tensors by name that can be sent.

    Args:
        what: the part of the result of ``hook`` that they are; "" for all of it.

    Raises:
        MethodError: they are something else.
    """
    wanted = "expected a dict of torch tensors by name, such as weights_of(task.model) returns"
    if not isinstance(weights, Mapping):
        raise hook.wrong(f"returned {kind_of(weights)}{what and f' as {what}'}", wanted)
    for name, tensor in weights.items():
        entry = f"{what} {name!r}".strip()
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise hook.wrong(f"returned {kind_of(tensor)} as {entry}", wanted)
        if not can_be_sent(tensor):
            kind = str(tensor.dtype if tensor.layout is torch.strided else tensor.layout)
            raise hook.wrong(
                f"returned a tensor of {kind} as {entry}",
                "Flower cannot send such a tensor; .to_dense().float() makes one that it can",
            )


def check_shapes(hook: Hook, weights: Weights, like: Mapping[str, Tensor]) -> None:
    """Refuse ``weights`` that have another shape than the tensor of the same name in ``like``.

    Raises:
        MethodError: it names the first such tensor.
    """
    for name, tensor in weights.items():
        if name in like and tensor.shape != like[name].shape:
            raise hook.wrong(
                f"returned {name} of shape {list(tensor.shape)}",
                f"in the network its shape is {list(like[name].shape)}",
            )


def refuse_not_finite(hook: Hook, weights: Weights, odd: Mapping[str, Tensor]) -> None:
    """Refuse ``weights``, made by the server of finite uploads, that are not finite.

    Args:
        odd: masks, by name, of the places where a tensor need not be finite.

    Raises:
        MethodError: it names some of them.
    """
    if names := [n for n, t in weights.items() if not finite_elsewhere(t, odd.get(n))]:
        raise hook.wrong(
            f"made weights that are not finite ({listed(names, 3)})",
            "clients' uploads were finite, so the fault is in its own server half: look there for "
            "a division by zero or too large a step; what was learned before is kept",
        )


def check_constant(hook: Hook, weights: Any, begun: Weights) -> None:
    """Refuse ``state.global_weights`` of other names, shapes or dtypes than it began with.

    Args:
        begun: tensors of the names, shapes and dtypes that it began with.

    Raises:
        MethodError: it says what has changed.
    """
    always = "what clients share keeps the same names, shapes and dtypes in every round"
    place = "state.global_weights"
    if not isinstance(weights, Mapping):
        raise hook.wrong(
            f"left {place} as {kind_of(weights)}", f"expected a dict of tensors; {always}"
        )
    if missing := [name for name in begun if name not in weights]:
        raise hook.wrong(f"left {place} without {listed(missing, 3)}", always)
    for name, tensor in weights.items():
        like = begun.get(name)
        if like is None or not isinstance(tensor, Tensor):
            what = f"{name!r}, {kind_of(tensor)}," if like is None else kind_of(tensor)
            where = place if like is None else f"{place}[{name!r}]"
            raise hook.wrong(f"put {what} into {where}", f"expected a dict of tensors; {always}")
        if tensor.shape != like.shape or tensor.dtype != like.dtype:
            made, was = (f"{t.dtype} {list(t.shape)}" for t in (tensor, like))
            raise hook.wrong(f"changed {place}[{name!r}] to {made}", f"it was {was}; {always}")
