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
# the folder of the doors (server_app.py, client_app.py), conf/ and pyproject.toml; an installed
# package has it inside
INSTALLED = PACKAGE / "app"
APP_DIR = INSTALLED if INSTALLED.is_dir() else PACKAGE.parent
YAML = (".yaml", ".yml")  # how a settings file's name may end


def package_of(app: Path) -> Path:
    """Return the package that the app in ``app`` runs: its own or, if it has none, this one."""
    own = app / PACKAGE.name
    return own if own.is_dir() else PACKAGE


def user_path(text: str | Path) -> Path:
    """Expand ``~`` in a path as users write it; ``~nobody`` stays if there is no such home."""
    return Path(os.path.expanduser(text))


class Remembered(Generic[P, R]):
    """A function whose results are remembered, as by ``lru_cache``.

    Results also depend on the current folder and $PFEDGPA_DATA, which relative paths depend on.
    """

    def __init__(self, function: Callable[P, R], most: int) -> None:
        """Remember the ``most`` results of ``function`` that were asked for last."""
        update_wrapper(self, function)

        def read(where: object, *args: P.args, **kwargs: P.kwargs) -> R:
            return function(*args, **kwargs)

        self._known: Any = lru_cache(most)(read)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        where = Path.cwd(), os.environ.get("PFEDGPA_DATA")
        known: R = self._known(where, *args, **kwargs)
        return known

    def cache_clear(self) -> None:
        """Forget all results, since files may have changed."""
        self._known.cache_clear()


def remembered(most: int) -> Callable[[Callable[P, R]], Remembered[P, R]]:
    """Return a decorator that remembers ``most`` results of a function that reads files."""
    return lambda function: Remembered(function, most)
