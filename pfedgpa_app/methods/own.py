"""Methods of the user's own: by import path, or installed with an entry point."""

from __future__ import annotations

import importlib.metadata
import logging

from pfedgpa_app.core.own_code import imported, is_reference
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.base import Personaliser

GROUP = "pfedgpa.methods"  # of entry points: a method's name, and where its class is
_REFERENCES: dict[str, str] = {}  # {name: the import path that it came by}

logger = logging.getLogger("pfedgpa")


def register_installed() -> None:
    """Add to ``METHODS`` what other installed packages offer."""
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            _register(entry.name, entry.load(), f"entry point {entry.value}")
        except Exception as error:  # whatever a foreign package raises must not end ours
            logger.warning("method %s: cannot be used: %s", entry.name, error)


def registered(method: str, code_dir: str) -> tuple[str, bool]:
    """A method's name in ``METHODS``, and whether it is there since now.

    Args:
        method: a name, or an import path, whose class is added under its name in small letters.

    Raises:
        ConfigError: it cannot be imported, is no method, or takes another's name.
    """
    if not is_reference(method):
        return method, False
    kind = imported(method, code_dir, "method")
    name = method.partition(":")[2].lower()
    is_new = METHODS.get(name) is not kind
    if is_new:
        _register(name, kind, f"method = {method!r}")
    _REFERENCES[name] = method
    return name, is_new


def reference_of(name: str) -> str:
    """By what another process can have the method called ``name``."""
    return _REFERENCES.get(name, name)


def _register(name: str, kind: object, source: str) -> None:
    if not isinstance(kind, type) or not issubclass(kind, Personaliser):
        raise ConfigError(
            f"{source}: is no class that extends one of pfedgpa_app.methods (Method, Averaging, …)"
        )
    if name in METHODS:
        raise ConfigError(f"{source}: there is a method {name} already: call the class otherwise")
    if "title" not in vars(kind):
        kind.title = kind.__name__
    METHODS[name] = kind
