"""Accuracy on training images that no client holds: to choose settings by, instead of test images.

    python benchmarks/unheld.py results/RUN [results/RUN …]

For runs that kept their weights. Prints the mean over clients. Each is tested on images of its own
class mix, drawn from those that were dealt to nobody, 12,000 in all (an image may be drawn for
several clients).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import nn

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import load_dataset, load_partition, load_schema
from pfedgpa_app.data.images import Images, images_of
from pfedgpa_app.data.partition import round_counts
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import load
from pfedgpa_app.runs.folder import kept_config
from pfedgpa_app.runs.personal import own_weights
from pfedgpa_app.training.evaluation import evaluate

IMAGES = 12_000


def unheld(config: Config) -> list[Images]:
    """Return each client's images."""
    data, splits = load_dataset(config), load_partition(config)
    held = [split.held for split in splits]
    free = np.setdiff1d(np.arange(len(data.train_labels)), np.concatenate(held))
    pools = [free[data.train_labels[free] == c] for c in range(len(data.classes))]
    found = []
    for client, own in enumerate(held):
        rng = np.random.default_rng(client)
        mix = np.bincount(data.train_labels[own], minlength=len(pools))
        counts = round_counts(mix, IMAGES // len(splits))
        drawn = [
            rng.choice(pool, min(n, len(pool)), replace=False)
            for pool, n in zip(pools, counts, strict=True)
        ]
        found.append(images_of(data.train_images, data.train_labels, np.concatenate(drawn)))
    return found


def mean_accuracy(model: nn.Module, made: Mapping[int, Weights], images: list[Images]) -> float:
    """Return the mean accuracy in % over clients, each with its own weights on its own images."""
    found = []
    for client, own in enumerate(images):
        load(model, made[client])
        score = evaluate(model, own)
        found.append(100 * score.correct / score.images)
    return float(np.mean(found))


def main() -> None:
    """Print a line for each method of each run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="runs' folders, with their weights")
    for run in parser.parse_args().runs:
        config = kept_config(run)
        images = unheld(config)
        model = network_of(config, load_schema(config))
        for file in sorted(run.glob("weights/*.safetensors")):
            weights = load_file(file)
            made = {client: own_weights(weights, client) for client in range(len(images))}
            accuracy = mean_accuracy(model, made, images)
            print(f"{run.name} {file.stem}: {accuracy:.2f} %", flush=True)


if __name__ == "__main__":
    main()
