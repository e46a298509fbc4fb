"""Where the package and the app's own files lie, and paths as users write them."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import lru_cache, update_wrapper
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE = Path(__file__).resolve().parent.parent
# the app's folder: the doors, conf/ and pyproject.toml, inside the package where it is installed
INSTALLED = PACKAGE / "app"
APP_DIR = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
YAML = (".yaml", ".yml")  # how a settings file's name may end


def package_of(app: Path) -> Path:
    """The package that the app in ``app`` runs: its own or, if it has none, the one we are in."""
    own = app / PACKAGE.name
    return own if own.is_dir() else PACKAGE


def user_path(text: str | Path) -> Path:
    """A path as users write it, ``~`` for their home; ``~nobody`` stays, for want of a home."""
    return Path(os.path.expanduser(text))


class Remembered(Generic[P, R]):
    """As ``lru_cache`` has it, but relative paths are of the folder where they were asked for."""

    def __init__(self, function: Callable[P, R], most: int) -> None:
        """``most``: how many of its newest results are remembered."""
        update_wrapper(self, function)

        def read(where: object, *args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **kwargs)

        self._known: Any = lru_cache(most)(read)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        where = Path.cwd(), os.environ.get("PFEDGPA_DATA")
        known: R = self._known(where, *args, **kwargs)
        return known

    def cache_clear(self) -> None:
        """Forget them: files may have changed."""
        self._known.cache_clear()


def remembered(most: int) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Decorates a function that reads files for all who ask in this process."""
    return lambda function: Remembered(function, most)
