"""What a client keeps between rounds.

It lives in Flower's context, which a SuperNode loses when it ends. A node whose configuration
names a folder (``--node-config 'state-dir="/var/lib/pfedgpa"'``) keeps a copy there, so that
one that was started again goes on where it was.
"""

from __future__ import annotations

import os
from pathlib import Path

from flwr.app import ArrayRecord, Context
from safetensors.torch import load_file, save_file

from pfedgpa_app.models import Weights


def _path(context: Context, key: str) -> Path | None:
    folder = context.node_config.get("state-dir")
    if not folder:
        return None
    return Path(str(folder)).expanduser() / f"run-{context.run_id}" / f"{key}.safetensors"


def recall(context: Context, key: str) -> Weights:
    """What was kept under ``key`` in this run; {} if nothing was."""
    kept = context.state.array_records.get(key)
    if kept is not None:
        return dict(kept.to_torch_state_dict())
    path = _path(context, key)
    return load_file(path) if path and path.exists() else {}


def keep(context: Context, key: str, state: Weights) -> None:
    """Keep ``state`` under ``key``; a file is replaced whole or not at all."""
    if not state:
        return
    context.state[key] = ArrayRecord(state)
    if path := _path(context, key):
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, new)
        os.replace(new, path)
