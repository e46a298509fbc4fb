"""Import users' own code by its path, as in ``my_package.nets:build``."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib.machinery
import os
import re
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pfedgpa_app.core.randomness import seeded
from pfedgpa_app.core.settings import ConfigError

_REFERENCE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
FOLDER = "PFEDGPA_FOLDER"  # environment: where the user started what works in another folder
# {module: {file: its digest}} as the module was imported, whatever is edited later
_SOURCES: dict[str, dict[Path, str]] = {}


def is_reference(name: str) -> bool:
    """Whether ``name`` is an import path, ``MODULE:NAME``."""
    return _REFERENCE.fullmatch(name) is not None


def in_users_folder() -> AbstractContextManager[None]:
    """In the block, relative paths are of the folder where the user started what runs here.

    Flower's own processes work in another one, where the user's code would not find its files.
    """
    folder = os.environ.get(FOLDER)
    return contextlib.chdir(folder) if folder else contextlib.nullcontext()


def still_there(folder: str, reference: str = "") -> str:
    """Return ``folder``, where a run found the user's code; "", the current one, if it is gone.

    So it is if only the current one has the module of ``reference``: on a deployment the code may
    have come with the Flower app.
    """
    if not Path(folder).is_dir():
        return ""
    top = reference.partition(":")[0].partition(".")[0]
    if is_reference(reference) and not _has(folder, top) and _has(str(Path.cwd()), top):
        return ""
    return folder


def _has(folder: str, module: str) -> bool:
    return importlib.machinery.PathFinder.find_spec(module, [folder]) is not None


def imported(reference: str, folder: str, setting: str) -> Any:
    """Import what ``reference`` names, from ``folder`` (empty: the current one) or as installed.

    Args:
        setting: the name of the setting that has this value, for messages.

    Raises:
        ConfigError: there is no such module or name, or importing it fails.
    """
    module_name, _, name = reference.partition(":")
    place = str(Path(folder or ".").absolute())
    # the folder is first in the path during the import and last afterwards: what the code imports
    # later must be found, but a user's file must not take the place of a library
    sys.path.insert(0, place)
    _forget_another(module_name.partition(".")[0], place)
    is_new = module_name not in sys.modules or module_name not in _SOURCES
    try:
        with seeded(0), in_users_folder():
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
    file = getattr(module, "__file__", None)  # a built-in module has none
    if is_new:
        _SOURCES[module_name] = _read(Path(file)) if file else {}
    if not hasattr(module, name):
        raise ConfigError(
            f"{setting} = {reference!r}: {file or module_name} has nothing called {name}"
        )
    return getattr(module, name)


def sources(reference: str) -> dict[Path, str]:
    """Return {file: its SHA-256} of the code of ``reference``, as this process imported it.

    The files are its module's and those beside it that it imports, directly or not; {} if it has
    not been ``imported`` yet.
    """
    return _SOURCES.get(reference.partition(":")[0], {})


def forget_edited() -> bool:
    """Forget modules whose files were edited since, as between a notebook's cells.

    They are imported anew when they are next asked for.

    Returns:
        whether there are any.
    """
    edited = [
        module
        for module, files in _SOURCES.items()
        if any(not file.is_file() or digest(file) != before for file, before in files.items())
    ]
    for module in edited:
        _forget(module)
    return bool(edited)


def _forget_another(top: str, place: str) -> None:
    """Forget ``top`` if it was imported from another folder than ``place``, which has one, too."""
    here = importlib.machinery.PathFinder.find_spec(top, [place])
    file = getattr(sys.modules.get(top), "__file__", None)
    if here is None or here.origin is None or file in (None, here.origin):
        return
    for module in [m for m in _SOURCES if m.partition(".")[0] == top]:
        _forget(module)


def _forget(module: str) -> None:
    """Drop a user's ``module``, and the modules beside it that it imports."""
    files = {str(file) for file in _SOURCES.pop(module)}
    tops = {module, module.partition(".")[0]}
    for name, loaded in list(sys.modules.items()):
        file = getattr(loaded, "__file__", None)
        if name != "__main__" and (name in tops or file in files):
            del sys.modules[name]
    importlib.invalidate_caches()


def digest(path: Path) -> str:
    """A file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(file: Path) -> dict[Path, str]:
    found: dict[Path, str] = {}
    left = {file}
    while left:
        each = left.pop()
        with contextlib.suppress(OSError):  # most of what is imported is not beside it
            found[each] = digest(each)
            left |= {file.with_name(f"{name}.py") for name in _imports(each)} - found.keys()
    return found


def _imports(file: Path) -> set[str]:
    """Return the last parts of the names that a file imports; none if it is not Python."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (SyntaxError, ValueError):
        return set()
    named = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            named |= {alias.name for alias in node.names}
    return {name.rpartition(".")[2] for name in named}
