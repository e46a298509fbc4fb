"""Keep a federation's buffered uploads, to make weights from them again with other settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pfedgpa_app.config import NO_PART, Resolved
from pfedgpa_app.files import read_tensors
from pfedgpa_app.methods.fedavg import FedAvgState
from pfedgpa_app.settings import ConfigError

FILE = "uploads.safetensors"
FORMAT = "pfedgpa-uploads-1"
# settings that may differ between the run that kept the uploads and the one that takes them
_FREE = NO_PART | {"method", "device", "evaluate-every", "uploads"}
_FREE_PREFIXES = ("pfedgpa.", "fine-tune-")


def _fixed(resolved: Resolved) -> dict[str, Any]:
    values = {name: entry["value"] for name, entry in resolved.as_dict().items()}
    fixed = {n: v for n, v in values.items() if n not in _FREE and not n.startswith(_FREE_PREFIXES)}
    plain: dict[str, Any] = json.loads(json.dumps(fixed))
    return plain


def save(path: Path, state: FedAvgState, resolved: Resolved, costs: dict[str, float]) -> None:
    """Write the buffer, with what the rounds cost and the settings that made it."""
    _, vectors, rounds, clients = state.buffer.stack()
    tensors = {"vectors": vectors, "rounds": rounds, "clients": clients}
    tensors |= {f"global/{name}": t.contiguous() for name, t in state.global_weights.items()}
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(_fixed(resolved)),
        "costs": json.dumps(costs),
    }
    save_file(tensors, path, metadata)


def load(
    path: Path, state: FedAvgState, resolved: Resolved
) -> tuple[FedAvgState, dict[str, float]]:
    """Fill a fresh ``state`` from ``path``; returns it and what the rounds cost.

    Raises:
        ConfigError: no such file, another format, or uploads of a federation with other
            settings than this run's.
    """
    try:
        tensors, metadata = read_tensors(path, FORMAT)
    except ValueError as error:
        raise ConfigError(f"uploads = {str(path)!r}: {error}") from error
    theirs, ours = json.loads(metadata["settings"]), _fixed(resolved)
    for name, value in ours.items():
        if theirs.get(name) != value:
            raise ConfigError(
                f"uploads = {str(path)!r}: made with {name} = {theirs.get(name)!r}, but this run "
                f"has {value!r}"
            )
    like = state.global_weights
    state.global_weights = {name: tensors[f"global/{name}"] for name in like}
    sizes = [tensor.numel() for tensor in like.values()]
    rows = zip(
        tensors["rounds"].tolist(), tensors["clients"].tolist(), tensors["vectors"], strict=True
    )
    for server_round, client, vector in rows:
        parts = zip(like.items(), vector.split(sizes), strict=True)
        state.buffer.add(server_round, client, {n: p.reshape(t.shape) for (n, t), p in parts})
    costs: dict[str, float] = json.loads(metadata["costs"])
    return state, costs
