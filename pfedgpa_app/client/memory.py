"""What a client keeps between rounds: its method's state, and how it recognises its own data.

It is kept in Flower's context, which ends with the client's SuperNode or with the run. A copy is
kept in files if there is a folder for it: the one that a node's configuration names
(``--node-config 'state-dir="/var/lib/pfedgpa"'``) or, in a simulation, one beside the run's
results. So a node that is started again, and a run that is resumed, go on where they were.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context
from safetensors.torch import load_file

from pfedgpa_app.core.files import write_json, write_tensors
from pfedgpa_app.core.paths import user_path
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.messages import record_of


def _folder(context: Context, asked: Mapping[str, Any]) -> Path | None:
    folder: Any = context.node_config.get("state-dir") or asked.get("state-dir")
    return user_path(str(folder)) / f"run-{asked['run']}" if folder and asked.get("run") else None


def _fingerprint_file(context: Context, asked: Mapping[str, Any]) -> Path | None:
    folder = _folder(context, asked)  # which several nodes of a machine may share
    return folder / f"data-{context.node_config.get('partition-id', -1)}.json" if folder else None


def recall_fingerprint(context: Context, asked: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the fingerprint that the node's own data had before in this run; None if unknown."""
    if (kept := context.state.config_records.get("data")) is not None:
        return kept
    if (file := _fingerprint_file(context, asked)) is not None:
        with suppress(OSError, ValueError):  # none was written, or it is damaged
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    return None


def keep_fingerprint(context: Context, asked: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Keep the fingerprint of the node's own data for the rest of the run."""
    context.state["data"] = ConfigRecord(dict(found))
    if (file := _fingerprint_file(context, asked)) is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, found)
    except OSError as error:  # the run does not depend on it
        warn_once(
            f"{error.filename} cannot be written: {error.strerror}; give this node a state-dir"
        )


def _kept(folder: Path | None, key: str) -> list[Path]:
    """Return the files whose key matches ``key``, ordered by round."""
    return sorted(folder.glob(f"{key}@*.safetensors"), key=_round) if folder else []


def _round(file: Path) -> int:
    return int(file.stem.rpartition("@")[2])


def newest(folder: Path, method: str) -> list[Path]:
    """Return the newest file of every client that keeps something for ``method``.

    Args:
        folder: a run's, in a ``state-dir``.
    """
    files = _kept(folder, f"{method}.*")
    return list({file.stem.rpartition("@")[0]: file for file in files}.values())


def leave(asked: Mapping[str, Any], own: Weights, kind: str = "client") -> None:
    """Save a client's ``own`` tensors, of that ``kind``, beside a simulation's results."""
    folder: Any = asked.get("weights-dir")
    if own and folder:
        path = Path(folder) / f"{asked['method']}.{kind}-{asked['client']}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(path, own)


def recall(context: Context, asked: Mapping[str, Any], key: str, before: int) -> Weights:
    """Return what was kept under ``key``; {} if nothing was.

    The context has it as it was kept last. Where it does not, the newest file of a round before
    ``before`` is read.

    Args:
        asked: the server's settings for this message.
    """
    kept = context.state.array_records.get(key)
    if kept is not None:
        return dict(kept.to_torch_state_dict())
    files = [file for file in _kept(_folder(context, asked), key) if _round(file) < before]
    return load_file(files[-1]) if files else {}


def keep(
    context: Context,
    asked: Mapping[str, Any],
    key: str,
    state: Weights,
    server_round: int,
    again: int = 1,
) -> None:
    """Keep ``state`` under ``key``, unless it is empty; a file is written whole or not at all.

    Args:
        again: how many rounds a resumed run may repeat; the files of that many rounds before this
            one stay. Files of later rounds are deleted: a process that was killed has left them.

    Raises:
        OSError: the file cannot be written; it names the folder. What was kept before stays.
    """
    if not state:
        return
    if (folder := _folder(context, asked)) is not None:
        path = folder / f"{key}@{server_round}.safetensors"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_tensors(path, state)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(folder)) from error
        files = _kept(folder, key)
        here = files.index(path)
        for other in (*files[: max(0, here - again)], *files[here + 1 :]):
            other.unlink(missing_ok=True)
    context.state[key] = record_of(state)


def forget_after(folder: Path, method: str, server_round: int) -> None:
    """Delete what clients kept for ``method`` in rounds after ``server_round``.

    A resumed run repeats these rounds.

    Args:
        folder: a run's, in a ``state-dir``.
    """
    for file in _kept(folder, f"{method}.*"):
        if _round(file) > server_round:
            file.unlink()
