"""The ServerApp: ``PFedGPA`` where the quickstart says ``FedAvg``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp

from pfedgpa_app import PFedGPA
from pfedgpa_app.methods.generation import PFedGPASettings
from quickstart.task import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the strategy."""
    config: Any = context.run_config
    out = Path(config["out"])
    torch.manual_seed(0)
    settings = PFedGPASettings(fit_steps=config["fit-steps"])
    strategy = PFedGPA(
        settings=settings, fraction_evaluate=config["fraction-evaluate"], save_dir=out
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        train_config=ConfigRecord({"lr": config["learning-rate"]}),
        num_rounds=config["num-server-rounds"],
    )
    accuracies = {r: m["eval_acc"] for r, m in result.evaluate_metrics_clientapp.items()}
    (out / "accuracies.json").write_text(json.dumps(accuracies))
