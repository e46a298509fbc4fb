"""Whether a client's model tells which images it was trained on.

    python benchmarks/membership.py results/RUN

A loss-threshold attack (Yeom et al. 2018) on the weights that a run kept: images with a small
loss are taken for training images. For each method, it prints the area under the ROC curve between
a client's training and test images (of the same classes in the same shares), 0.5 being a guess.
The images are each client's own under its model, and those of every other client, of its hidden
group and of others: what its model gives away about them. ``pfedgpa`` shows what generated weights
give away, ``last-upload`` what a client's own upload does, ``fedavg`` what the shared model does.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from pfedgpa_app.core.sections import Config
from pfedgpa_app.data.client import load_client, load_partition, load_schema
from pfedgpa_app.data.images import Images
from pfedgpa_app.models.build import network_of
from pfedgpa_app.models.networks import load
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.runs.folder import kept_config
from pfedgpa_app.runs.personal import own_weights


@dataclass(frozen=True)
class Found:
    """What the attack finds.

    Attributes:
        areas: [clients, clients], for the row's model on the column's images; training images that
            both clients have are left out.
        accuracies: [clients, 2] in %, of every model on its client's training and test images.
    """

    areas: np.ndarray
    accuracies: np.ndarray


@torch.no_grad()
def losses(model: torch.nn.Module, images: Images) -> tuple[np.ndarray, float]:
    """Return each image's loss, and the share of images classified correctly."""
    logits = model.eval()(images.floats())
    found = F.cross_entropy(logits, images.labels, reduction="none")
    right = (logits.argmax(1) == images.labels).float().mean()
    return found.numpy(), float(right)


def examine(config: Config, weights: dict[str, torch.Tensor]) -> Found:
    """Attack every client's model with every client's images."""
    splits = load_partition(config)
    model = network_of(config, load_schema(config))
    clients = range(config.initial_clients)
    areas, accuracies = np.zeros((len(clients), len(clients))), np.zeros((len(clients), 2))
    for client in clients:
        load(model, own_weights(weights, client))
        for other in clients:
            images = load_client(config, other)
            member, seen = losses(model, images.train)
            stranger, unseen = losses(model, images.test)
            if other == client:
                accuracies[client] = 100 * seen, 100 * unseen
            else:
                member = member[~np.isin(splits[other].train, splits[client].train)]
            truth = np.r_[np.ones(len(member)), np.zeros(len(stranger))]
            areas[client, other] = roc_auc_score(truth, -np.r_[member, stranger])
    return Found(areas, accuracies)


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder, with the weights that it kept")
    run = parser.parse_args().run
    config = kept_config(run)
    groups = np.array([split.group for split in load_partition(config)])[: config.initial_clients]
    alike, same = groups[:, None] == groups, np.eye(len(groups), dtype=bool)
    rows = []
    for file in sorted(run.glob("weights/*.safetensors")):
        found = examine(config, load_file(file))
        own, near, far = (found.areas[which] for which in (same, alike & ~same, ~alike))
        seen, unseen = found.accuracies.mean(0)
        mine, group, others = (f"{a.mean():.3f} ± {a.std():.3f}" for a in (own, near, far))
        cells = [file.stem, mine, f"{own.max():.3f}", group, others]
        cells += [f"{found.areas[~same].max():.3f}", f"{seen:.1f}", f"{unseen:.1f}"]
        rows.append(cells)
    header = ["method", "own images", "the worst client's", "its hidden group's", "other groups'"]
    header += ["the worst pair's", "accuracy on own training images", "on own test images"]
    print(markdown(header, rows))


if __name__ == "__main__":
    main()
