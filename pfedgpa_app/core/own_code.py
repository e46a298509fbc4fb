"""Users' own code by its import path, as in ``my_package.nets:build``."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from pfedgpa_app.core.settings import ConfigError

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def is_reference(name: str) -> bool:
    """Whether ``name`` is an import path, ``MODULE:NAME``."""
    return _REFERENCE.fullmatch(name) is not None


def imported(reference: str, folder: str, setting: str) -> Any:
    """What ``reference`` names in a module of ``folder`` (empty: the current one) or installed.

    Args:
        setting: whose value it is, for messages.

    Raises:
        ConfigError: there is no such module or name, or importing it fails.
    """
    module_name, _, name = reference.partition(":")
    place = str(Path(folder or ".").absolute())
    # first while it is imported, last from then on: what else it imports later must be found,
    # and a file of the user's must not stand in for a library's
    sys.path.insert(0, place)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a foreign module raises
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{setting} = {reference!r}: the module {module_name} cannot be imported from "
            f"{place}: {why}"
        ) from error
    finally:
        sys.path.remove(place)
        if place not in sys.path:
            sys.path.append(place)
    if not hasattr(module, name):
        raise ConfigError(
            f"{setting} = {reference!r}: {module.__file__ or module_name} has nothing called {name}"
        )
    return getattr(module, name)
