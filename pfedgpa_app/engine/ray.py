"""Ray: Flower's own simulation, with a SuperLink for this run alone.

Flower's ``flwr run`` exits 0 whatever becomes of the run, and has it served by a lasting daemon
with the first caller's folder and environment. Here each run has a SuperLink of its own, on a
free port, with a home that is deleted with it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pfedgpa_app.core.sections import Config
from pfedgpa_app.engine import Poll, gpu_for
from pfedgpa_app.engine.flower import Flower, stage


class Simulation(Flower):
    """A SuperLink in simulation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.env |= {
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            # else Ray starts two processes that no client can use, since ours have an environment
            "RAY_prestart_worker_first_driver": "0",
            "RAY_TMPDIR": str(self.home / "ray"),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        if "RAY_ADDRESS" not in self.env:
            # Ray listens on every interface, and must obey only those who know this run's token
            self.env |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        (self.home / "ray").mkdir()

    def superlink_options(self) -> list[str]:
        return ["--insecure", "--simulation"]


def run(
    app: Path,
    settings: Mapping[str, Any],
    config: Config,
    log: Path,
    poll: Poll,
    flower: Simulation | None = None,
) -> str:
    """Run the app in ``app`` with ``settings``; ``poll`` is called while it runs.

    Args:
        flower: a simulation that has been started already; ending it is up to the caller.

    Returns:
        why the run did not complete, or "".
    """
    # one CPU per client keeps torch to one thread each
    federation = f"num-supernodes={config.num_clients} client-resources-num-cpus=1"
    if config.workers and "RAY_ADDRESS" not in os.environ:  # a running cluster has its own size
        federation += f" init-args-num-cpus={config.workers}"
    if gpu_for(config.device):
        federation += " client-resources-num-gpus=0.1"
    with contextlib.nullcontext(flower) if flower else Simulation() as flower:
        staged = stage(app, Path(tempfile.mkdtemp(dir=flower.home)) / "app", settings)
        flower.wait_until_ready()
        run_id = flower.run(staged, dict(settings), "--federation-config", federation)
        return flower.wait(run_id, log, poll)
