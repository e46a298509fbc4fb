"""Engines: what carries messages between the strategy and the clients of one machine.

ray       Flower's own simulation; also the way to many machines
process   a Grid in one process with a pool of single-threaded worker processes
batched   a Grid in one process that trains a round's clients as one batched model
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

PARENT = "PFEDGPA_PARENT"  # environment: the process that a run must not outlive


class LaunchError(RuntimeError):
    """A run could not be started, or failed; the text is for the user."""


class StoppedError(KeyboardInterrupt):
    """The user stopped what was running; ``folder`` holds the results so far."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"results so far are in {folder}")
        self.folder = folder


class Poll(Protocol):
    """A function that an engine calls while a run goes on."""

    def __call__(self, explain: Callable[[], str] = ...) -> None:
        """Look after the run; ``explain`` says which process waits for what."""


def gpu_for(device: str) -> bool:
    """Whether the ``device`` setting means a GPU on this machine.

    Raises:
        ConfigError: the setting wants a GPU, and there is none.
    """
    import torch

    from pfedgpa_app.core.settings import ConfigError

    if device == "cpu":
        return False
    if torch.cuda.is_available():
        return True
    if device == "cuda":
        raise ConfigError("device = 'cuda': torch sees no GPU on this machine")
    return False


def engine_for(engine: str, device: str) -> str:
    """The engine that the ``engine`` setting means on this machine."""
    if engine != "auto":
        return engine
    return "batched" if gpu_for(device) else "process"


def engine_elsewhere(engine: str, device: str) -> str:
    """The engine that the ``engine`` setting means on a machine of which only that is known."""
    if engine != "auto":
        return engine
    return "batched" if device == "cuda" else "process"
