"""The server's side: ``PFedGPA`` where Flower's quickstart says ``FedAvg``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from pfedgpa_app import PFedGPA
from tabular.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds; say how accurate each hospital's weights are."""
    config: Any = context.run_config
    torch.manual_seed(0)
    strategy = PFedGPA(save_dir=Path(config["out"]).absolute())
    strategy.start(
        grid,
        ArrayRecord(Net().state_dict()),
        config["num-server-rounds"],
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
    )
    for hospital, found in sorted(strategy.personal_metrics.items()):
        mean, own = (
            f"{100 * found[when]['accuracy']:.0f} % (round {found[when]['server-round']})"
            for when in ("before", "after")
        )
        print(f"hospital {hospital}: {mean} with the mean, {own} with its own")
    print(f"each hospital's weights are in {strategy.folder}")
