"""Whether a client's model tells which images it was trained on.

    python benchmarks/membership.py results/RUN

A loss-threshold attack (Yeom et al. 2018) on the weights that a run kept: images with a small
loss are taken for training images. For each method, the area under the ROC curve between each
client's own training and test images (of the same classes in the same shares), its mean and
spread over clients; 0.5 is guessing. Beside it accuracy on both. ``pfedgpa`` shows what generated
weights give away, ``last-upload`` what the client's own upload does, ``fedavg`` everybody's model.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score

from pfedgpa_app.config import Config, resolve
from pfedgpa_app.data.client import load_client, load_dataset
from pfedgpa_app.data.images import Images
from pfedgpa_app.models import Weights, build, load, network_name


def config_of(run: Path) -> Config:
    """The settings that the run in ``run`` had."""
    kept = json.loads((run / "config.json").read_text())
    given = {name: entry["value"] for name, entry in kept.items() if entry["from"] != "default"}
    methods = given["method"]
    given["method"] = ",".join(methods) if isinstance(methods, list) else methods
    return resolve(given).config


@torch.no_grad()
def losses(model: torch.nn.Module, images: Images) -> tuple[np.ndarray, float]:
    """Each image's loss, and the share of them that is recognised."""
    logits = model.eval()(images.floats())
    found = F.cross_entropy(logits, images.labels, reduction="none")
    right = (logits.argmax(1) == images.labels).float().mean()
    return found.numpy(), float(right)


def examine(config: Config, weights: dict[str, torch.Tensor]) -> np.ndarray:
    """(attack's area, training accuracy, test accuracy) of every client [clients, 3]."""
    data = load_dataset(config)
    model = build(network_name(config.model, data.shape), len(data.classes), config.seed)
    rows = []
    for client in range(config.founders):
        own: Weights = {
            name.partition("/")[2]: tensor
            for prefix in ("global", f"client-{client}")
            for name, tensor in weights.items()
            if name.startswith(f"{prefix}/")
        }
        load(model, own)
        images = load_client(config, client)
        member, seen = losses(model, images.train)
        other, unseen = losses(model, images.test)
        truth = np.r_[np.ones(len(member)), np.zeros(len(other))]
        rows.append((roc_auc_score(truth, -np.r_[member, other]), 100 * seen, 100 * unseen))
    return np.array(rows)


def main() -> None:
    """Print a line a method."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=Path, help="a run's folder, with the weights that it kept")
    run = parser.parse_args().run
    config = config_of(run)
    print(
        "| method | attack's area under the curve | worst client | on training images | on test |"
    )
    print("| --- | --- | --- | --- | --- |")
    for file in sorted(run.glob("weights/*.safetensors")):
        rows = examine(config, load_file(file))
        area, spread = rows[:, 0].mean(), rows[:, 0].std()
        print(
            f"| {file.stem} | {area:.3f} ± {spread:.3f} | {rows[:, 0].max():.3f} "
            f"| {rows[:, 1].mean():.1f} | {rows[:, 2].mean():.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
