"""The user's own methods: given by import path, or installed with an entry point."""

from __future__ import annotations

import ast
import dataclasses
import importlib.metadata
import inspect
import logging
import types
from typing import Any, get_args, get_origin, get_type_hints

from pfedgpa_app.core.own_code import imported, is_reference
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, listed, near, shown
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.methods.averaging import Averaging
from pfedgpa_app.methods.base import FINE_TUNINGS, Personaliser, Rounds

GROUP = "pfedgpa.methods"  # entry points: a method's name, and where its class is
# environment: import paths of methods that a study has beside those of a run; the experiment's file
# may have settings of them
STUDIED = "PFEDGPA_METHODS"
_HOOKS = (types.FunctionType, classmethod, staticmethod)
_REFERENCES: dict[str, str] = {}  # {name: the import path that the user gave}

logger = logging.getLogger("pfedgpa")


def register_installed() -> None:
    """Add the methods of other installed packages to ``METHODS``."""
    entries = importlib.metadata.entry_points(group=GROUP)
    for entry in entries:
        try:
            _register(entry.name, entry.load(), f"entry point {entry.value}")
        except Exception as error:  # no error of another package must stop ours
            logger.warning("method %s: cannot be used: %s", entry.name, error)
    for name in METHODS.keys() & {entry.name for entry in entries}:
        try:
            federation_of(name)
        except ConfigError as error:
            logger.warning("%s", error)
            del METHODS[name]


def registered(method: str, code_dir: str) -> tuple[str, bool]:
    """Return a method's name in ``METHODS``, and whether this call added it.

    Args:
        method: a name, or the import path of a class, which is added under its name in small
            letters.

    Raises:
        ConfigError: the class cannot be imported, is no method, or has another method's name.
    """
    if not is_reference(method):
        return method, False
    kind = imported(method, code_dir, "method")
    name = own_name(method)
    is_new = METHODS.get(name) is not kind
    if is_new:
        _register(name, kind, f"method = {method!r}")
    _REFERENCES[name] = method
    return name, is_new


def reference_in(module: str, code_dir: str) -> str:
    """Return the import path of the method in the file ``module``.py; "" unless it has just one."""
    file = user_path(code_dir or ".") / f"{module}.py"
    try:
        statements = ast.parse(file.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return ""
    classes = [each for each in statements if isinstance(each, ast.ClassDef) and each.bases]
    names = [each.name for each in classes if not ast.unparse(each.bases[0]).endswith("Settings")]
    return f"{module}:{names[0]}" if len(names) == 1 and module.isidentifier() else ""


def own_name(reference: str) -> str:
    """The name in ``METHODS`` of a method given by its import path, or by its name."""
    return reference.partition(":")[2].lower() if is_reference(reference) else reference


def reference_of(name: str) -> str:
    """What another process loads the method called ``name`` by: its import path, or the name."""
    return _REFERENCES.get(name, name)


def studied() -> str:
    """The import paths of the user's own methods that this process knows, for ``STUDIED``."""
    return ",".join(reference for name, reference in _REFERENCES.items() if name in METHODS)


def _register(name: str, kind: object, source: str) -> None:
    if not isinstance(kind, type) or not issubclass(kind, Personaliser):
        raise ConfigError(
            f"{source}: must be a class that extends one of pfedgpa_app.methods (Method, "
            "Averaging, …)"
        )
    if name in METHODS:
        raise ConfigError(f"{source}: there is already a method {name}: rename the class")
    _check_settings(kind, source)
    _check_fine_tuning(kind, source)
    _check_hooks(kind, source)
    if isinstance(own := getattr(kind, "of", None), type):
        _check_hooks(own, f"{source}: its rounds, {own.__name__}")
    if "title" not in vars(kind):
        kind.title = kind.__name__
    METHODS[name] = kind


def _check_settings(kind: type[Personaliser[Any]], source: str) -> None:
    """Refuse declarations that would not become settings, and a ``tuned`` that names none.

    Raises:
        ConfigError: the message names the declaration and what is missing.
    """
    own: Any = kind.settings
    if not isinstance(own, type):
        raise ConfigError(f"{source}: its `settings` must be a class that extends MethodSettings")
    for each in own.__mro__[:-1]:
        found = _declared(each)
        if found and "__dataclass_fields__" not in vars(each):
            raise ConfigError(
                f"{source}: {each.__name__} declares {listed(found)}, but is not a dataclass: "
                "write @dataclass(frozen=True) above it"
            )
    if not dataclasses.is_dataclass(own):
        raise ConfigError(
            f"{source}: {own.__name__}, its `settings`, must extend MethodSettings, with "
            "@dataclass(frozen=True) above it"
        )
    for field in dataclasses.fields(own):
        if not field.metadata:
            raise ConfigError(
                f"{source}: {field.name} of {own.__name__} is not a setting: write it as "
                f'{field.name}: {_written(field.type)} = setting(DEFAULT, "what it means")'
            )
    _check_types(own, source)
    if "tuned" in vars(kind):
        _check_tuned(kind, own if "settings" in vars(kind) else Config, source)


def _check_tuned(kind: type[Personaliser[Any]], settings: Any, source: str) -> None:
    names = [field.name.replace("_", "-") for field in dataclasses.fields(settings)]
    if isinstance(kind.tuned, str) or not all(isinstance(name, str) for name in kind.tuned):
        raise ConfigError(
            f'{source}: its `tuned` must be a tuple of settings\' names, as in ("{names[0]}",)'
        )
    for name in kind.tuned:
        if name not in names:
            raise ConfigError(
                f"{source}: its `tuned` names {name!r}, but there is no such setting in "
                f"{settings.__name__}{near(name, names)}"
            )


def _check_fine_tuning(kind: type[Personaliser[Any]], source: str) -> None:
    """Refuse a ``fine_tuning`` that does not exist, or is its own and not given.

    Raises:
        ConfigError: otherwise the run would fail once its table is made.
    """
    chosen = kind.fine_tuning
    renamed = '; "gentle" is called "default" now' if chosen == "gentle" else ""
    if chosen not in FINE_TUNINGS:
        raise ConfigError(
            f"{source}: its `fine_tuning` is {shown(chosen)}, but must be one of "
            f"{listed(FINE_TUNINGS)}{renamed}"
        )
    said = any("own_fine_tuning" in vars(k) for k in kind.__mro__ if k is not Personaliser)
    if chosen == "own" and not said:
        raise ConfigError(
            f'{source}: its `fine_tuning` is "own": give it an own_fine_tuning, which says what '
            "that is"
        )


def _check_hooks(kind: type, source: str) -> None:
    """Refuse a hook that cannot be called as the one of its base class is.

    Raises:
        ConfigError: otherwise the run would fail when it is called, maybe after the last round.
    """
    for base in (Rounds, Personaliser, Averaging):
        names = [n for n in vars(base) if n == "__init__" or not n.startswith("_")]
        for name in names if issubclass(kind, base) else ():
            hook, own = vars(base)[name], inspect.getattr_static(kind, name)
            if isinstance(hook, _HOOKS) and own is not hook:
                _check_hook(name, hook, own, source)


def _check_hook(name: str, hook: Any, own: Any, source: str) -> None:
    # as it is called: on an instance, or on the class
    place = object() if isinstance(hook, types.FunctionType) else None
    called = inspect.signature(hook.__get__(place, object))
    try:
        inspect.signature(own.__get__(place, object)).bind(*called.parameters)
    except (TypeError, AttributeError) as error:
        if not isinstance(own, _HOOKS):
            raise ConfigError(f"{source}: its {name} is {shown(own)}, not a function") from error
        raise ConfigError(
            f"{source}: its {_head(name, own)} must take what {_head(name, hook)} takes: {error}"
        ) from error


def _head(name: str, function: Any) -> str:
    """A function with the names of its parameters, as in "@classmethod train(cls, task)"."""
    bare = getattr(function, "__func__", function)
    kind = "" if bare is function else f"@{type(function).__name__} "
    return f"{kind}{name}({', '.join(inspect.signature(bare).parameters)})"


def _declared(kind: type) -> list[str]:
    """The names that a class of settings itself declares as fields, or means to."""
    hints = inspect.get_annotations(kind)
    typed = [name for name, hint in hints.items() if "ClassVar" not in str(hint)]
    untyped = [n for n, v in vars(kind).items() if isinstance(v, dataclasses.Field)]
    return list(dict.fromkeys(typed + untyped))


def _check_types(settings: type, source: str) -> None:
    try:
        hints = get_type_hints(settings)
    except NameError as error:
        raise ConfigError(f"{source}: a type in {settings.__name__}: {error}") from error
    for field in dataclasses.fields(settings):
        if not _is_plain(hints[field.name]):
            raise ConfigError(
                f"{source}: {field.name} of {settings.__name__} is a {_written(field.type)}: a "
                "setting must be a str, int, float, bool, tuple of these, or one of them | None"
            )


def _is_plain(hint: Any) -> bool:
    """Whether a setting can have the type ``hint``."""
    if get_origin(hint) in (tuple, types.UnionType):
        return all(each in (None, type(None), ...) or _is_plain(each) for each in get_args(hint))
    return hint in (str, int, float, bool)


def _written(kind: Any) -> str:
    """A field's type as its declaration spells it."""
    return kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
