"""Where the package and the app's own files lie, and paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent
# the app's folder: the doors, conf/ and pyproject.toml, inside the package where it is installed
INSTALLED = PACKAGE / "app"
APP_DIR = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent


def package_of(app: Path) -> Path:
    """The package that the app in ``app`` runs: its own or, if it has none, the one we are in."""
    own = app / PACKAGE.name
    return own if own.is_dir() else PACKAGE


def user_path(text: str | Path) -> Path:
    """A path as users write it, ``~`` for their home; ``~nobody`` stays, for want of a home."""
    return Path(os.path.expanduser(text))
