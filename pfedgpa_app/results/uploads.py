"""Keep a federation's buffered uploads, to make weights from them again with other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.config.names import defaults, keys
from pfedgpa_app.config.resolve import Resolved, values_of
from pfedgpa_app.core.files import read_metadata, read_tensors, write_tensors
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.weights import Layout, is_statistic
from pfedgpa_app.diffusion.directions import Likeness
from pfedgpa_app.methods.generation import RememberedState, generated

FILE = "uploads.safetensors"
FORMAT = "pfedgpa-uploads-1"
COSTS = ("bytes_up", "bytes_down", "server_seconds")  # of the rounds
# settings that may differ between the run that saved the uploads and the one that loads them
_FREE = {"method", "device", "evaluate-every", "uploads"}
_FREE_PREFIXES = ("pfedgpa.", "fine-tune-")
# but these decide which uploads are kept, and which clients are found alike
_KEPT_BY = {"pfedgpa.buffer-rounds", "pfedgpa.rank-rule"}


def _fixed(resolved: Resolved) -> dict[str, Any]:
    values = values_of(resolved.as_dict())
    free = _FREE | {name for name, key in keys().items() if key.is_for_launch}
    fixed = {
        n: v
        for n, v in values.items()
        if n in _KEPT_BY or (n not in free and not n.startswith(_FREE_PREFIXES))
    }
    plain: dict[str, Any] = json.loads(json.dumps(fixed))
    return plain


def save(
    path: Path,
    state: RememberedState,
    resolved: Resolved,
    costs: dict[str, float],
    held: Mapping[str, Any],
) -> None:
    """Write the buffer, with what the rounds cost, the settings that made it and who held what.

    Args:
        held: what the run kept of its data, {} if these are on nodes.
    """
    _, vectors, rounds, clients = state.buffer.stack()
    tensors = {"vectors": vectors, "rounds": rounds, "clients": clients}
    newest = state.buffer.newest().values()
    # clients without an upload in the window: of their rounds only the means are kept
    older = [(entry, entry.round_mean) for entry in newest if entry.round_mean is not None]
    if older:
        tensors |= {
            "older-vectors": torch.stack([entry.vector for entry, _ in older]),
            "older-means": torch.stack([mean for _, mean in older]),
            "older-rounds": torch.tensor([entry.server_round for entry, _ in older]),
            "older-clients": torch.tensor([entry.client for entry, _ in older]),
        }
    if state.labels:
        tensors |= {"labels": torch.tensor(list(state.labels.values()))}
        tensors |= {"labels-clients": torch.tensor(list(state.labels))}
    tensors |= {f"global/{name}": t for name, t in state.global_weights.items()}
    for client, own in state.statistics.items():
        tensors |= {f"client-{client}/{name}": t for name, t in own.items()}
    if state.likeness is not None:
        scores = state.likeness.scores
        tensors |= {"likeness": torch.stack(list(scores.values()))}
        tensors |= {"likeness-clients": torch.tensor(list(scores))}
        tensors |= {"likeness-rank": torch.tensor(state.likeness.rank)}
    metadata = {
        "format": FORMAT,
        "settings": json.dumps(_fixed(resolved)),
        "costs": json.dumps(costs),
        "holdings": json.dumps(held),
    }
    write_tensors(path, tensors, metadata)


def check_whole(state: RememberedState) -> None:
    """Refuse to save uploads if earlier rounds kept only their last layers.

    Raises:
        ConfigError: they lack layers that a run may want to learn from.
    """
    layout = state.buffer.layout
    if layout and list(layout.names) != generated(state.global_weights):
        raise ConfigError(
            "save-uploads: earlier rounds kept only uploads' last layers (pfedgpa.layers), from "
            "which other runs could not learn: go on without save-uploads"
        )


def settings_and_costs(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """Return the settings that made the uploads in ``path``, and what the rounds cost.

    Raises:
        ConfigError: there is no such file, or it is of another format, or damaged.
    """
    try:
        metadata = read_metadata(path, FORMAT)
    except ValueError as error:
        raise _refused(path, str(error)) from error
    try:
        costs = json.loads(metadata["costs"])
        known = {name: float(costs[name]) for name in COSTS}
        return dict(json.loads(metadata["settings"])), known
    except KeyError as error:
        raise _refused(path, f"is incomplete: it lacks {error}") from error
    except (ValueError, TypeError) as error:
        raise _refused(path, f"is damaged: {error}") from error


def holdings_in(path: Path) -> dict[str, Any]:
    """Return what the file says of the data that its uploads were trained on; {}: nothing.

    Raises:
        ConfigError: there is no such file, or it is of another format, or damaged.
    """
    try:
        return dict(json.loads(read_metadata(path, FORMAT).get("holdings", "{}")))
    except (ValueError, TypeError) as error:
        raise _refused(path, str(error)) from error


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(f"uploads = {str(path)!r}: {why}")


def require_alike(path: Path, resolved: Resolved) -> dict[str, float]:
    """Refuse uploads of a federation unlike this run's; return what its rounds cost.

    Raises:
        ConfigError: as ``load``, for all that is found without reading the uploads themselves.
    """
    theirs, costs = settings_and_costs(path)
    theirs = defaults() | theirs
    for name, value in _fixed(resolved).items():
        if theirs[name] != value:
            there = f"made with {name} = {theirs[name]!r}"
            raise _refused(path, f"{there}, but this run has {value!r}")
    return costs


def load(path: Path, state: RememberedState, resolved: Resolved) -> dict[str, float]:
    """Fill a fresh ``state`` from ``path``; return what the rounds cost.

    Raises:
        ConfigError: there is no such file, it is of another format or damaged, or its uploads are
            of a federation with other settings than this run's.
    """
    costs = require_alike(path, resolved)
    try:
        _fill(state, read_tensors(path, FORMAT)[0], resolved.config)
    except KeyError as error:
        raise _refused(path, f"is incomplete: it lacks {error}") from error
    except (ValueError, TypeError, RuntimeError) as error:
        raise _refused(path, f"is damaged: {error}") from error
    return costs


def _fill(state: RememberedState, tensors: dict[str, Tensor], config: Config) -> None:
    layout = Layout.of(state.global_weights)
    state.global_weights = {name: tensors[f"global/{name}"] for name in layout.names}
    if not layout.flatten(state.global_weights).isfinite().all():
        raise ValueError("the global weights are not finite")
    kept = Layout.of({name: state.global_weights[name] for name in generated(layout.names)})
    clients: list[int] = []
    for part in ("older-", "") if "older-vectors" in tensors else ("",):
        vectors, mine = tensors[f"{part}vectors"], tensors[f"{part}clients"].tolist()
        if not set(mine) <= set(range(config.num_clients)):
            raise ValueError("it has clients that are not in the federation")
        rounds = tensors[f"{part}rounds"].tolist()
        for server_round, client, vector in zip(rounds, mine, vectors, strict=True):
            state.buffer.add(server_round, client, kept.unflatten(vector))
        if part:
            state.buffer.means |= dict(zip(rounds, tensors["older-means"], strict=True))
        clients += mine
    state.buffer.drop_old(config.num_server_rounds)
    if "labels" in tensors:
        counts = zip(tensors["labels-clients"].tolist(), tensors["labels"].tolist(), strict=True)
        state.labels |= dict(counts)
    if "likeness" in tensors:
        scores, rank = tensors["likeness"], int(tensors["likeness-rank"])
        whole = scores.ndim == 2 and scores.isfinite().all()
        if not whole or not 1 <= rank <= max(1, scores.shape[1]):
            raise ValueError("what it says about which clients are alike makes no sense")
        known = dict(zip(tensors["likeness-clients"].tolist(), scores, strict=True))
        state.likeness = Likeness(rank, known)
    own = [name for name in layout.names if is_statistic(name)]
    for client in set(clients) if own else ():
        state.statistics[client] = {name: tensors[f"client-{client}/{name}"] for name in own}
