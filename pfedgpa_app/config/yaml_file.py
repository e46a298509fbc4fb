"""Read a YAML file of settings: UTF-8, a mapping, and every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pfedgpa_app.core.settings import ConfigError


class _Loader(yaml.SafeLoader):
    """A loader that keeps keys as they are written, as text, and refuses one that stands twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[str, Any]:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
        if key.value in lines:
            problem = f"{key.value} is given here and in line {lines[key.value]}"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        lines[key.value] = key.start_mark.line + 1
    loader.flatten_mapping(node)  # resolves "<<: *alias"
    # made at once, not after all else, so that a mapping that holds itself is noticed
    return {key.value: loader.construct_object(value, deep=True) for key, value in node.value}


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def read(path: Path) -> dict[str, Any]:
    """Return the settings in a file, {key: value}.

    Raises:
        ConfigError: it cannot be read, is not UTF-8 or not YAML, or is no mapping.
    """
    try:
        loaded = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.reader.ReaderError) as error:
        raise ConfigError(f"{path}: is not UTF-8 text; save it in that encoding") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: not valid YAML: nested too deeply") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}, line {line}: not valid YAML: {error.problem}") from error
    except (ValueError, LookupError, AttributeError) as error:
        # PyYAML does not catch errors in dates, tags and numbers of thousands of digits
        raise ConfigError(f"{path}: not valid YAML: a value cannot be read: {error}") from error
    if loaded is None:  # nothing but comments
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: must map settings to values")
    return loaded
