"""Door 1: the Flower ServerApp. It reads the configuration and runs the experiment."""

from __future__ import annotations

import logging

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pfedgpa_app.config import resolve
from pfedgpa_app.experiment import run

app = ServerApp()

logger = logging.getLogger("pfedgpa")  # what the run says goes where Flower's words go
logger.setLevel(logging.INFO)
logger.handlers = logging.getLogger("flwr").handlers


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every configured method on one partition and seed, and write the results."""
    run(grid, resolve(context.run_config))
