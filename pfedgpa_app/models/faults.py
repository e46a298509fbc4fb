"""Tell the user where a network fails on examples."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

from pfedgpa_app.core.own_code import sources

_LONGEST = 200  # most characters of an exception's text that are shown


class NetworkError(RuntimeError):
    """The run's network fails on examples; the text is for the user."""


def fault_of(error: BaseException, network: nn.Module, model: str) -> str:
    """Say how and where ``network`` failed, as in "KeyError: 3 (nets.py, line 9)".

    It is "" if the network was not at work when ``error`` was raised.

    Args:
        error: what was raised, or an error that was raised from that.
        network: the run's network, or one like it: copies of it may be at work, too.
        model: the setting that names it.
    """
    for cause in filter(None, (error, error.__cause__)):
        frames = list(traceback.walk_tb(cause.__traceback__))
        inside = [i for i, (frame, _) in enumerate(frames) if _is_of(frame.f_locals, network)]
        if inside:
            said = " ".join(str(cause).split())[:_LONGEST]
            what = f"{type(cause).__name__}: {said}".removesuffix(": ")
            return what + _place(frames[inside[0] :], model)
    return ""


def _place(frames: list[tuple[FrameType, int]], model: str) -> str:
    """The innermost line among ``frames`` that is of the code of ``model``, the user's own."""
    files = {str(file) for file in sources(model)}
    lines = [(f.f_code.co_filename, line) for f, line in frames if f.f_code.co_filename in files]
    return f" ({Path(lines[-1][0]).name}, line {lines[-1][1]})" if lines else ""


def token_range(tokens: Iterable[Tensor]) -> str:
    """Say which numbers examples hold, as in "-1 to 199"."""
    held = [each for each in tokens if each.numel()]
    return f"{min(int(t.min()) for t in held)} to {max(int(t.max()) for t in held)}"


def _is_of(names: dict[str, Any], network: nn.Module) -> bool:
    """Whether a function with these local ``names`` is a module's, of the network or a part of it.

    A module is known by the names of its parameters, or by its class if that is not torch's own.
    """
    module = names.get("self")
    if not isinstance(module, nn.Module):
        return False
    kinds = {type(each) for each in network.modules()}
    own = {kind for kind in kinds if not kind.__module__.startswith("torch.")}
    return type(module) in own or _parameters(module) == _parameters(network)


def _parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]
