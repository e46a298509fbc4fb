"""How much faster a client trains in bfloat16 on this machine, one thread.

    python benchmarks/precision.py

Prints, for each network, the time of an epoch in bfloat16 as a share of that in float32, both
measured in turn five times: the median and the range. Its effect on accuracies takes a sweep:

    pfedgpa sweep --conf compare-cifar10 --over precision=float32,bfloat16 --over seed=0,1,2
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from pfedgpa_app.data.images import Images
from pfedgpa_app.models.networks import SHAPES, build
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe


def seconds(network: str, data: Images, recipe: Recipe) -> float:
    """Time an epoch of training."""
    model = build(network, 10, 0).to(memory_format=torch.channels_last)
    started = time.perf_counter()
    training.train(model, data, recipe, torch.Generator().manual_seed(0))
    return time.perf_counter() - started


def main() -> None:
    """Print a line for each network."""
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    draws = torch.Generator().manual_seed(0)
    for shape, network in SHAPES.items():
        pixels = torch.randint(0, 255, (600, *shape), dtype=torch.uint8, generator=draws)
        data = Images(pixels, torch.randint(0, 10, (600,), generator=draws))
        recipe = Recipe(1, 0.01)
        ways = recipe, replace(recipe, bfloat16=True)
        ratios = []
        for repeat in range(6):
            exact, rounded = (seconds(network, data, way) for way in ways)
            if repeat:  # in the first, torch still loads libraries
                ratios.append(rounded / exact)
        print(f"{network}: {sorted(ratios)[2]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")


if __name__ == "__main__":
    main()
