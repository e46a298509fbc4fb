"""Run small federations in this process, and read their results."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flwr.app import Message
from safetensors.torch import load_file

from pfedgpa_app.config import names
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.methods import METHODS
from pfedgpa_app.runs.experiment import run
from tests.support.local_grid import InProcessGrid

SMALL: dict[str, Any] = {
    "num-clients": 4,
    "num-server-rounds": 4,
    "train-per-client": 60,
    "test-per-client": 40,
    "validation-share": 0.2,
    "batch-size": 20,
    "pfedgpa.fit-steps": 20,
    "pfedgpa.width": 16,
    "pfedgpa.draws": 4,
}
PLAIN = {name: value for name, value in SMALL.items() if not name.startswith("pfedgpa.")}


def small(more: dict[str, Any]) -> dict[str, Any]:
    """Return the demo's settings at a small size and ``more``; pFedGPA's own only if it runs."""
    return (SMALL if "pfedgpa" in str(more.get("method", "pfedgpa")) else PLAIN) | more


def federate(
    out: Path, tamper: Any = None, nodes: Any = None, **settings: Any
) -> tuple[Path, InProcessGrid]:
    """Run the demo at a small size; ``settings`` are named with underscores."""
    named = {name.replace("_", "-"): value for name, value in settings.items()}
    run_config = small({"out-dir": str(out), "run-name": "run", "report": False} | named)
    resolved = resolve(run_config)
    grid = InProcessGrid(run_config, nodes or resolved.config.num_clients, tamper)
    return run(grid, resolved), grid


@contextlib.contextmanager
def known_for_a_while(method: str) -> Iterator[None]:
    """Forget a method of the user's own afterwards, so that other tests do not find it."""
    try:
        yield
    finally:
        METHODS.pop(method, None)
        names.sections.cache_clear()
        names.keys.cache_clear()


def summary(folder: Path) -> dict[str, dict[str, Any]]:
    return {row["method"]: row for row in json.loads((folder / "summary.json").read_text())}


def records(folder: Path, file: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / file).read_text().splitlines()]


def train_messages(grid: InProcessGrid, method: str = "fedavg") -> list[Message]:
    return [
        m
        for m in grid.sent
        if m.metadata.message_type == "train"
        and m.content.config_records["config"]["method"] == method
    ]


def results(folder: Path) -> dict[str, Any]:
    """Return all figures and weights, without times and memory."""
    rows = summary(folder)
    for row in rows.values():
        del row["server_seconds"], row["peak_memory_mib"]
    weights = {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.glob("weights/*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return {
        "rows": rows,
        "metrics": records(folder),
        "clients": records(folder, "clients.jsonl"),
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }
