"""pFedGPA: a Flower app whose server generates each client its own weights.

``run`` runs an experiment, ``load_client`` loads a client's model from one; ``PFedGPA`` is the
strategy for other people's Flower apps, and ``PFedGPASettings`` its server's settings.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pfedgpa_app.core.settings import ConfigError, DataError
    from pfedgpa_app.dropin.strategy import PFedGPA
    from pfedgpa_app.engine import LaunchError
    from pfedgpa_app.methods.generation import PFedGPASettings
    from pfedgpa_app.runs.api import Result, run
    from pfedgpa_app.runs.personal import ClientModel, load_client

__version__ = "0.1.0"
__all__ = [
    "ClientModel",
    "ConfigError",
    "DataError",
    "LaunchError",
    "PFedGPA",
    "PFedGPASettings",
    "Result",
    "load_client",
    "run",
]
_PLACES = {
    "ClientModel": "runs.personal",
    "ConfigError": "core.settings",
    "DataError": "core.settings",
    "LaunchError": "engine",
    "PFedGPA": "dropin.strategy",
    "PFedGPASettings": "methods.generation",
    "Result": "runs.api",
    "load_client": "runs.personal",
    "run": "runs.api",
}


def __getattr__(name: str) -> Any:
    """Import public names at first use only, because Flower and torch take seconds to import."""
    if name in _PLACES:
        return getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
