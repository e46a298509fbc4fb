"""Door 1: the Flower ServerApp. It reads the configuration and runs the experiment."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from pfedgpa_app.config import resolve
from pfedgpa_app.experiment import run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run every configured method on one partition and seed, and write the results."""
    run(grid, resolve(context.run_config))
