"""Tell the user where a network fails on examples."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from pathlib import Path
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
    cause = error.__cause__ or error
    frames = list(traceback.walk_tb(cause.__traceback__))
    inside = [i for i, (frame, _) in enumerate(frames) if _is_of(frame.f_locals, network)]
    if not inside:
        return ""
    files = {str(file) for file in sources(model)}
    places = [
        f" ({Path(frame.f_code.co_filename).name}, line {line})"
        for frame, line in frames[inside[0] :]
        if frame.f_code.co_filename in files
    ]
    said = " ".join(str(cause).split())[:_LONGEST]
    what = f"{type(cause).__name__}: {said}".removesuffix(": ")
    return f"{what}{places[-1] if places else ''}"


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
