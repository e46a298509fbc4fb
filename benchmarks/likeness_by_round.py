"""How clearly clients' likeness shows after some rounds, and what it is worth at the end.

    python benchmarks/likeness_by_round.py results/RUN [results/RUN …]

For runs that kept the uploads of all their rounds: `pfedgpa run method=pfedgpa-once` with
``save-uploads=true pfedgpa.buffer-rounds=100``, and, as docs/algorithm.md has them, ``--conf
map-fashion-mnist num-clients=20 train-per-client=30 learning-rate=0.05 seed=100``. After each of
several rounds, from the uploads of the last 20:

    widest-gap  and other rules: the rank that they choose
    groups      the share of the differences between hidden groups that the scores show, 0 to 1,
                at the rank of round 20 (not for partitions without groups)
    accuracy    on training images that no client holds, of weights made from the last 20 rounds'
                uploads with this likeness; in the last column, with what these uploads show
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from unheld import mean_accuracy, unheld

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Buffer
from pfedgpa_app.core.weights import Layout, Weights
from pfedgpa_app.data.client import load_partition, load_schema
from pfedgpa_app.diffusion.directions import Likeness
from pfedgpa_app.diffusion.distribution import WeightDistribution, likeness_of
from pfedgpa_app.diffusion.settings import DiffusionSettings
from pfedgpa_app.methods.generation import generated
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import weight_names
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.results.uploads import FILE
from pfedgpa_app.runs.folder import kept_config

RULES, WINDOW, AFTER = ("widest-gap", "shrinkage", "likelihood"), 20, (20, 40, 60, 80, 100)


class Kept:
    """A run's kept uploads."""

    def __init__(self, run: Path) -> None:
        self.config: Config = kept_config(run)
        self.tensors = load_file(run / FILE)
        self.model = network_of(self.config, load_schema(self.config))
        names = weight_names(self.model)  # in the uploads' order
        self.common: Weights = {name: self.tensors[f"global/{name}"] for name in names}
        self.images = unheld(self.config)

    def window(self, last: int) -> Buffer:
        """Return the uploads of the last ``WINDOW`` rounds up to round ``last``."""
        layout = Layout.of({name: self.common[name] for name in generated(list(self.common))})
        buffer = Buffer(WINDOW)
        rows = (self.tensors[name] for name in ("rounds", "clients", "vectors"))
        for number, client, vector in zip(*rows, strict=True):
            if last - WINDOW < number <= last:
                buffer.add(int(number), int(client), layout.unflatten(vector))
        return buffer

    def accuracy(self, uploads: Buffer, known: Likeness | None) -> float:
        """Return the accuracy in % of weights made from these uploads, by a ``known`` likeness."""
        settings = DiffusionSettings(denoiser="finite-set")
        fitted = WeightDistribution(uploads, settings, self.config.seed, known=known)
        made = {c: self.common | mine for c, mine in fitted.generate(draws=64).items()}
        accuracy: float = mean_accuracy(self.model, made, self.images)
        return accuracy

    def groups(self, known: Likeness, rank: int) -> str:
        """Return the share of the differences between groups that ``known`` shows, 0 to 1."""
        of = [split.group for split in load_partition(self.config)]
        if None in of:
            return "–"
        members = torch.nn.functional.one_hot(torch.tensor(of)).double()
        differ = _basis(members - members.mean(0))
        scores = _basis(torch.stack([known.scores[client][:rank] for client in range(len(of))]))
        return f"{float((differ.T @ scores).square().sum()) / differ.shape[1]:.2f}"


def _basis(columns: Tensor) -> Tensor:
    """Return an orthonormal basis of what the columns span."""
    left, sizes, _ = torch.linalg.svd(columns, full_matrices=False)
    basis: Tensor = left[:, sizes > 1e-9 * sizes[0]]
    return basis


def main() -> None:
    """Print a table for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="runs' folders, with all uploads")
    torch.set_num_threads(1)
    for run in parser.parse_args().runs:
        kept = Kept(run)
        windows = {last: kept.window(last) for last in AFTER}
        seed, newest = kept.config.seed, windows[AFTER[-1]]
        by_rule = {
            rule: [likeness_of(uploads, rule, seed) for uploads in windows.values()]
            for rule in RULES
        }
        known = by_rule[RULES[0]]
        rows = [[rule, *(str(k.rank) for k in found), ""] for rule, found in by_rule.items()]
        rows.append(["groups", *(kept.groups(k, known[0].rank) for k in known), ""])
        accuracies = [kept.accuracy(newest, k) for k in (*known, None)]
        rows.append(["accuracy", *(f"{accuracy:.1f}" for accuracy in accuracies)])
        print(f"{run.name}\n\n{markdown(['', *map(str, AFTER), 'late alone'], rows)}\n", flush=True)


if __name__ == "__main__":
    main()
