"""Rank and strength chosen without labels, against the best fixed ones in hindsight.

    python benchmarks/rank_strength.py [--out results/rank-strength] [--cifar10 imagefolder:cifar10]

Trains FedAvg on two data sets, in federations of 10, 20 and 100 clients (30 % a round) with hidden
groups of equal sizes, and of 20 clients with unequal groups, by Dirichlet(0.1) and (0.5), and IID.
From the uploads kept it makes every client's weights, with each rank and strength of a grid and
with those that the rules choose, and prints test accuracy in %; with --unheld, by which defaults
can be chosen, accuracy on training images that no client holds. The denoiser is the exact one of
the finite set. Runs that are done are skipped, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from unheld import mean_accuracy, unheld

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.files import write_text
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import load_client, load_schema
from pfedgpa_app.data.images import Images
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.diffusion.settings import RULES, DiffusionSettings
from pfedgpa_app.methods.baselines import ClientMean, LastUpload
from pfedgpa_app.methods.generation import RememberingFedAvg
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import weights_of
from pfedgpa_app.results import uploads
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.study.plan import PlannedRun, expand
from pfedgpa_app.study.sweep import run_sweep

BASE: dict[str, Any] = {
    "method": "fedavg",
    "num-server-rounds": 60,
    "precision": "float32",  # gives the same figures on any machine
    "evaluate-every": 0,
    "fine-tune-grid-epochs": 0,
    "save-uploads": True,
    "save-weights": False,
}
FEDERATIONS: dict[str, dict[str, Any]] = {
    "20 clients": {},
    "10 clients": {"num-clients": 10},
    "100 clients, 30 %": {"num-clients": 100, "fraction-train": 0.3, "train-per-client": 380},
    "groups of 8, 5, 4, 2, 1": {"group-shares": [8, 5, 4, 2, 1]},
    "Dirichlet(0.1)": {"partition": "dirichlet", "dirichlet-alpha": 0.1},
    "Dirichlet(0.5)": {"partition": "dirichlet", "dirichlet-alpha": 0.5},
    "IID": {"partition": "iid"},
}
RANKS = (2, 3, 4, 5, 6, 8, 12)
STRENGTHS = (0, 50, 100, 150, 200, 300, 450)
HEADER = (
    "",
    "FedAvg",
    "last upload",
    "client mean",
    "best of the grid",
    *RULES,
    "default less best",
)
MOST = 40  # how many clients of a federation are evaluated at most


def planned(out: Path, sets: Mapping[str, str]) -> dict[tuple[str, str], PlannedRun]:
    """Return {(experiment, federation): its run}."""
    runs = {}
    for name, over in FEDERATIONS.items():
        for conf, dataset in sets.items():
            settings = BASE | {"conf": conf, "dataset": dataset}
            [runs[conf, name]] = expand(settings, {k: [v] for k, v in over.items()}, out)
    return runs


class Bench:
    """One federation's uploads, and how accurate weights made from them are."""

    def __init__(self, run: PlannedRun, on_unheld: bool) -> None:
        self.config: Config = run.config
        schema = load_schema(self.config)
        self.model = network_of(self.config, schema)
        self.state = RememberingFedAvg.begin(self.config, weights_of(self.model))
        uploads.load(run.folder / uploads.FILE, self.state, resolve(run.settings))
        clients = range(min(MOST, self.config.num_clients))
        self.images: list[Images] = (
            unheld(self.config)[: len(clients)]
            if on_unheld
            else [load_client(self.config, client).test for client in clients]
        )

    def accuracy(self, made: Mapping[int, Weights]) -> float:
        """Return the clients' mean accuracy in %, each with its own weights, or the global ones."""
        everyone = {c: made.get(c, self.state.global_weights) for c in range(len(self.images))}
        accuracy: float = mean_accuracy(self.model, everyone, self.images)
        return accuracy

    def fit(self, **settings: Any) -> WeightDistribution:
        """Learn the distribution of the uploads."""
        chosen = DiffusionSettings(denoiser="finite-set", **settings)
        return WeightDistribution(self.state.buffer, chosen, self.config.seed)

    def everything(self) -> dict[str, Any]:
        """Return all figures of the federation."""
        found: dict[str, Any] = {
            "fedavg": self.accuracy({}),
            "last upload": self.accuracy(LastUpload(self.config, self.state).personalise()),
            "client mean": self.accuracy(ClientMean(self.config, self.state).personalise()),
            "rules": {},
            "grid": {},
        }
        for rule in RULES:
            fitted = self.fit(rank_rule=rule)
            accuracy = self.accuracy(fitted.generate(draws=64))
            found["rules"][rule] = (fitted.rank, fitted.strength, accuracy)
        for rank in RANKS:
            if rank < self.config.num_clients:
                fitted = self.fit(rank=rank, strength=0)
                for t in STRENGTHS:
                    made = fitted.generate(strength=t, draws=64)
                    found["grid"][f"{rank},{t}"] = self.accuracy(made)
        return found


def cells_of(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return a federation's row of the table."""
    best = max(found["grid"], key=found["grid"].get)
    rank, strength = best.split(",")
    default = found["rules"][DiffusionSettings().rank_rule]
    cells = [name, *(f"{found[key]:.1f}" for key in ("fedavg", "last upload", "client mean"))]
    cells.append(f"{found['grid'][best]:.1f} ({rank}, {strength})")
    cells += [f"{a:.1f} ({r}, {t})" for r, t, a in (found["rules"][rule] for rule in RULES)]
    cells.append(f"{default[2] - found['grid'][best]:+.1f}")
    return cells


def main() -> None:
    """Train what is missing, and print a table for each data set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/rank-strength"))
    parser.add_argument("--cifar10", default="cifar10", help="or imagefolder:PATH")
    parser.add_argument("--conf", nargs="+", default=["compare-cifar10", "compare-fashion-mnist"])
    parser.add_argument("--unheld", action="store_true", help="images nobody holds, not test ones")
    parser.add_argument("--jobs", type=int)
    options = parser.parse_args()
    every = {"compare-cifar10": options.cifar10, "compare-fashion-mnist": "fashion-mnist"}
    sets = {conf: every[conf] for conf in options.conf}
    runs = planned(options.out, sets)
    if not run_sweep(list(runs.values()), options.out, APP_DIR, options.jobs):
        raise SystemExit("some runs failed")
    torch.set_num_threads(1)
    for conf in sets:
        rows = []
        for name in FEDERATIONS:
            file = "rank-strength-unheld.json" if options.unheld else "rank-strength.json"
            kept = runs[conf, name].folder / file
            if not kept.exists():
                found = Bench(runs[conf, name], options.unheld).everything()
                write_text(kept, json.dumps(found, indent=1))
            rows.append(cells_of(name, json.loads(kept.read_text(encoding="utf-8"))))
        print(f"\n{conf}: accuracy in % (rank, strength)\n\n{markdown(HEADER, rows)}", flush=True)


if __name__ == "__main__":
    main()
