"""A run's state on disk, from which a killed run can go on.

A checkpoint is a tree of numbers, texts, containers, tensors and dataclasses of this package or of
a method's. It consists of a manifest in JSON and of tensors in safetensors files; nothing in it is
executed. A tensor of a frozen dataclass that an earlier checkpoint already holds is not written
again, so that keeping a buffer of uploads costs only the newest round's. The manifest is replaced
last and atomically: whenever a run is killed, the newest checkpoint or the one before it is there.
Checksums cover everything, so that a damaged checkpoint is refused.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pfedgpa_app.core.files import checksum, write_tensors, write_text
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import METHODS

FORMAT = "pfedgpa-checkpoint-3"
CHECKPOINT, MANIFEST = "checkpoint", "checkpoint.json"  # in a run's folder, and in that
_DTYPES = {str(each): each for each in vars(torch).values() if isinstance(each, torch.dtype)}
# the errors that reading a damaged checkpoint can raise
_DAMAGED: tuple[type[Exception], ...] = (OSError, SafetensorError, RuntimeError, ValueError)
_DAMAGED += (AttributeError, LookupError, TypeError)

Put = Callable[[Tensor, bool], list[str]]  # the second argument: whether the tensor is frozen
Get = Callable[[list[str]], Tensor]


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the text says why."""


def has_checkpoint(folder: Path) -> bool:
    """Whether the run in ``folder`` has kept a checkpoint to go on from."""
    return (folder / CHECKPOINT / MANIFEST).exists()


def encode(value: Any, put: Put, frozen: bool = False) -> Any:
    """Turn ``value`` into JSON.

    Args:
        put: stores a tensor and returns where; its second argument is whether the tensor is
            frozen, that is, will not change any more.
        frozen: whether ``value`` is a field of a frozen dataclass, whose tensors never change.

    Raises:
        ConfigError: ``value`` holds something that is neither data nor a module.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        return ["tensor", put(value, frozen)]
    if isinstance(value, np.ndarray):
        return ["array", put(torch.from_numpy(value), frozen)]
    if isinstance(value, torch.dtype):
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, nn.Module):
        return ["module", encode(dict(value.state_dict()), put)]
    if isinstance(value, dict):
        return ["dict", [[encode(k, put), encode(v, put)] for k, v in value.items()]]
    for kind in (torch.Size, list, tuple):  # Size is a tuple
        if isinstance(value, kind):
            return [kind.__name__, [encode(item, put) for item in value]]
    if dataclasses.is_dataclass(value) and _is_ours(type(value).__module__):
        frozen = vars(type(value))["__dataclass_params__"].frozen
        parts = {
            f.name: encode(getattr(value, f.name), put, frozen) for f in dataclasses.fields(value)
        }
        return ["data", f"{type(value).__module__}:{type(value).__qualname__}", parts]
    raise ConfigError(
        f"a checkpoint cannot hold a {type(value).__name__}: only numbers, texts, lists, dicts, "
        "tensors, modules and dataclasses of the module or package that a method is in; "
        "set checkpoint-every=0 to do without"
    )


def decode(node: Any, get: Get, like: Any = None) -> Any:
    """Turn what ``encode`` returned back into a value.

    Args:
        get: returns the tensor that is stored in a place that ``encode``'s ``put`` named.
        like: a value of the same structure, into whose modules the stored weights are loaded.

    Raises:
        CheckpointError: ``node`` names a class that is no dataclass of this package or of a
            method's, or holds a module that ``like`` lacks.
    """
    if not isinstance(node, list):
        return node
    kind, content = node[0], node[1]
    if kind == "tensor":
        return get(content)
    if kind == "array":
        return get(content).numpy()
    if kind == "dtype":
        return _DTYPES[f"torch.{content}"]
    if kind == "module":
        if not isinstance(like, nn.Module):
            raise CheckpointError(
                "holds a module that the state before the first round does not have: let begin() "
                "make all modules, or keep their state_dict()"
            )
        like.load_state_dict(decode(content, get))
        return like
    if kind == "dict":
        known = like if isinstance(like, dict) else {}
        pairs = [(decode(k, get), v) for k, v in content]
        return {k: decode(v, get, known.get(k)) for k, v in pairs}
    if kind == "data":
        fields = {f: decode(v, get, getattr(like, f, None)) for f, v in node[2].items()}
        return _dataclass(content)(**fields)
    before = like if isinstance(like, (list, tuple)) else ()
    items = [
        decode(item, get, before[i] if i < len(before) else None) for i, item in enumerate(content)
    ]
    return {"Size": torch.Size, "list": list, "tuple": tuple}[kind](items)


def _is_ours(module: str) -> bool:
    """Whether a module belongs to this package, or to one that has a method of the user's."""
    packages = {kind.__module__.partition(".")[0] for kind in METHODS.values()}
    return module.partition(".")[0] in packages


def _dataclass(where: str) -> type[Any]:
    """Return the dataclass, of this package or of a method's, that ``where`` names.

    Nothing is imported: the run, which has been set up, has imported all that its checkpoint can
    hold.

    Raises:
        CheckpointError: there is no such dataclass.
    """
    module, _, name = where.partition(":")
    found = getattr(sys.modules.get(module), name, None) if _is_ours(module) else None
    if not isinstance(found, type) or not dataclasses.is_dataclass(found):
        raise CheckpointError(f"names {where}, which is no dataclass of this package")
    return found


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content).encode())


class Checkpoint:
    """The checkpoints of one run; ``folder`` holds the newest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        # {id: (tensor, its version, [file, key])}: the tensors that the newest checkpoint holds
        self._kept: dict[int, tuple[Tensor, int, list[str]]] = {}
        self._checksums: dict[str, int] = {}  # of the files with tensors

    def save(self, parts: dict[str, Any]) -> None:
        """Replace the checkpoint by one of these named parts.

        Raises:
            OSError: it cannot be written; the previous one is still there.
        """
        self._number += 1
        file = f"{self._number}.safetensors"
        new: dict[str, Tensor] = {}
        kept: dict[int, tuple[Tensor, int, list[str]]] = {}

        def put(tensor: Tensor, frozen: bool) -> list[str]:
            # a tensor's version does not count writes through .data or .numpy(), so only frozen
            # tensors are looked up in files of earlier checkpoints
            for known in (kept, self._kept) if frozen else (kept,):
                found = known.get(id(tensor))
                if found is not None and found[1] == tensor._version:
                    kept[id(tensor)] = found
                    return found[2]
            key = str(len(new))
            new[key] = tensor
            kept[id(tensor)] = tensor, tensor._version, [file, key]
            return [file, key]

        described = {name: encode(part, put) for name, part in parts.items()}
        self.folder.mkdir(parents=True, exist_ok=True)
        if new:
            write_tensors(self.folder / file, new)
            self._checksums[file] = checksum(self.folder / file)
        used = {where[0] for _, _, where in kept.values()}
        checksums = {name: self._checksums[name] for name in sorted(used)}
        content = {"files": checksums, "parts": described}
        about = {"format": FORMAT, "checksum": _checksum(content)}
        write_text(self.folder / MANIFEST, json.dumps(about | content))
        self._kept, self._checksums = kept, checksums
        for path in self.folder.glob("*.safetensors*"):
            if path.name not in used:
                path.unlink()

    def read(self) -> dict[str, Any]:
        """Return every part, still encoded, for ``restore``; {} if there is no checkpoint.

        Raises:
            CheckpointError: it cannot be read, is damaged, or is of another format.
        """
        path = self.folder / MANIFEST
        if not path.exists():
            return {}
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read: {error}") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise CheckpointError(
                f"{path}: its format is {found!r}, but this version reads {FORMAT}: run anew "
                "under another run-name"
            )
        content = {name: manifest.get(name, {}) for name in ("files", "parts")}
        if manifest.get("checksum") != _checksum(content):
            raise CheckpointError(f"{path}: is damaged: its checksum does not match")
        self._checksums = content["files"]
        parts: dict[str, Any] = content["parts"]
        return parts

    def restore(self, node: Any, like: Any = None) -> Any:
        """Decode a part; see ``decode``.

        Raises:
            CheckpointError: the part, or a file that it needs, is damaged or missing.
        """
        open_files: dict[str, Any] = {}
        found: dict[tuple[str, str], Tensor] = {}

        def opened(file: str) -> Any:
            if checksum(self.folder / file) != self._checksums[file]:
                raise CheckpointError(f"{self.folder / file}: is damaged: its checksum differs")
            self._number = max(self._number, int(file.partition(".")[0]))
            return safe_open(self.folder / file, "pt")

        def get(where: list[str]) -> Tensor:
            file, key = where
            if (file, key) not in found:
                if file not in open_files:
                    open_files[file] = opened(file)
                tensor = found[file, key] = open_files[file].get_tensor(key)
                self._kept[id(tensor)] = tensor, tensor._version, where
            return found[file, key]

        try:
            return decode(node, get, like)
        except CheckpointError:
            raise
        except _DAMAGED as error:
            raise CheckpointError(f"{self.folder}: is incomplete: {error}") from error
