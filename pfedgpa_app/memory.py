"""What a client keeps between rounds.

It lives in Flower's context, which ends with its SuperNode or with the run. A copy is kept in
files where there is a folder for it: the one that a node's configuration names
(``--node-config 'state-dir="/var/lib/pfedgpa"'``), or, in a simulation, one beside the run's
results. So a node that was started again, and a run that was resumed, go on where they were.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context
from safetensors.torch import load_file, save_file

from pfedgpa_app.files import replacing
from pfedgpa_app.models import Weights

_ROUNDS = 2  # a resumed run may repeat a round: what was kept before it is still there


def _folder(context: Context, asked: Mapping[str, Any]) -> Path | None:
    folder: Any = context.node_config.get("state-dir") or asked.get("state-dir")
    return Path(str(folder)).expanduser() / f"run-{asked['run']}" if folder else None


def _kept(folder: Path | None, key: str) -> dict[int, Path]:
    """{round: file}, the newest round last."""
    if folder is None or not folder.is_dir():
        return {}
    files = folder.glob(f"{key}@*.safetensors")
    return dict(sorted((int(file.stem.rpartition("@")[2]), file) for file in files))


def recall(context: Context, asked: Mapping[str, Any], key: str, before: int) -> Weights:
    """What was kept under ``key`` in a round before ``before``; {} if nothing was.

    Args:
        asked: the server's settings for this message.
    """
    kept = context.state.array_records.get(key)
    if kept is not None:
        return dict(kept.to_torch_state_dict())
    files = [file for r, file in _kept(_folder(context, asked), key).items() if r < before]
    return load_file(files[-1]) if files else {}


def keep(
    context: Context, asked: Mapping[str, Any], key: str, state: Weights, server_round: int
) -> None:
    """Keep ``state`` under ``key``; a file is written whole or not at all."""
    if not state:
        return
    context.state[key] = ArrayRecord(state)
    folder = _folder(context, asked)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key}@{server_round}.safetensors"
    with replacing(path) as new:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, new)
    for old in list(_kept(folder, key).values())[:-_ROUNDS]:
        old.unlink(missing_ok=True)
