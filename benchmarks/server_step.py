"""Time and memory of pFedGPA's server step: encode, fit, invert, decode.

    python benchmarks/server_step.py [--clients 20] [--rounds 20] [--weights 107690]

Prints one JSON line: seconds in all and in parts, the buffer's bytes, and the peak of memory
beyond what the process held before the step, as a multiple of the buffer.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from typing import Any

import torch

from pfedgpa_app.core.uploads import Buffer
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.diffusion.settings import DiffusionSettings
from pfedgpa_app.runs.summary import peak_memory

CPU = torch.device("cpu")


def synthetic(clients: int, rounds: int, weights: int, device: torch.device = CPU) -> Buffer:
    """Return uploads of clients in five groups, with a head of 1,280 numbers at the end.

    They lie in the CPU's memory, but are drawn on ``device``.
    """
    rng = torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=rng, device=device)
    group, own = 0.02 * draw(5, weights), 0.01 * draw(clients, weights)
    buffer = Buffer(rounds)
    head = 1280
    for r in range(rounds):
        drift = 0.05 * draw(weights)
        for c in range(clients):
            noise = 0.02 * draw(weights)
            vector = (drift + group[c % 5] + own[c] + noise).cpu()
            named = {"body": vector[:-head], "head": vector[-head:].reshape(10, head // 10)}
            buffer.add(r, c, named)
    return buffer


def measure(clients: int, rounds: int, weights: int, device: torch.device) -> dict[str, Any]:
    """Run the step once; return what it took."""
    # first run a small one: what torch loads at its first steps is not to be measured
    small = synthetic(4, 3, 2000)
    WeightDistribution(small, DiffusionSettings(fit_steps=2), 0, device).generate(
        "tweedie", draws=2
    )
    buffer = synthetic(clients, rounds, weights, device)
    size = clients * rounds * weights * 4
    before = peak_memory()
    started = time.perf_counter()
    fitted = WeightDistribution(buffer, DiffusionSettings(), 0, device)
    fit = time.perf_counter() - started
    generated = fitted.generate("tweedie", draws=64)
    total = time.perf_counter() - started
    extra = peak_memory() - before
    return {
        "clients": clients,
        "rounds": rounds,
        "weights": weights,
        "rank": fitted.rank,
        "strength": fitted.strength,
        "seconds": round(total, 2),
        "seconds_fit": round(fit, 2),
        "seconds_generate": round(total - fit, 2),
        "buffer_bytes": size,
        "extra_bytes": extra,
        "extra_over_buffer": round(extra / size, 2),
        "generated": len(generated),
    }


def main() -> None:
    """Run the step once and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--weights", type=int, default=107_690)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    size = options.clients, options.rounds, options.weights
    print(json.dumps(measure(*size, torch.device(options.device))))


if __name__ == "__main__":
    main()
