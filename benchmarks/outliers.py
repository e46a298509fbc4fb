"""How far malicious uploads, and how far honest ones, lie from the uploads' median.

    pfedgpa run --conf compare-cifar10 method=fedavg save-uploads=true run-name=kept
    python benchmarks/outliers.py results/kept/uploads.safetensors

Takes the buffered rounds of a federation without attackers and spoils the uploads of two and of
four clients as ``pfedgpa_app.client.attacks`` does. Prints squared distances to the median of each
weight, in units of the median client's: the largest of an honest client, the smallest of a
malicious one.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from pfedgpa_app.client.attacks import malicious_upload
from pfedgpa_app.core.files import read_tensors
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.sections import Config
from pfedgpa_app.results.tables import markdown
from pfedgpa_app.results.uploads import FORMAT

ATTACKS = (("sign-flip", 4.0), ("scale", 4.0), ("noise", 4.0), ("noise", 1.0), ("sign-flip", 1.0))


def separation(
    uploads: torch.Tensor, sent: torch.Tensor, config: Config, bad: list[int]
) -> tuple[float, float]:
    """Return the largest honest and the smallest malicious distance.

    Args:
        uploads: [N, P], one for each client.
        sent: the weights [P] that they were trained from.
        bad: the clients whose uploads are spoilt.
    """
    vectors = uploads.clone()
    for client in bad:
        generator = torch_generator(config.seed, "attack", client)
        vectors[client] = malicious_upload(config, {"w": uploads[client]}, {"w": sent}, generator)[
            "w"
        ]
    square = (vectors - vectors.median(0).values).square().sum(1)
    square /= square.median()
    honest = [client for client in range(len(vectors)) if client not in bad]
    return float(square[honest].max()), float(square[bad].min())


def main() -> None:
    """Print a line for each attack."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("uploads", type=Path, help="a run's uploads.safetensors")
    tensors, _ = read_tensors(parser.parse_args().uploads, FORMAT)
    rounds = {
        int(r): tensors["vectors"][tensors["rounds"] == r] for r in tensors["rounds"].unique()
    }
    rows = []
    for kind, strength in ATTACKS:
        config = replace(Config(), attack=kind, attack_strength=strength)
        found = [
            separation(rounds[r], rounds[r - 1].mean(0), config, list(range(0, 20, 20 // count)))
            for r in sorted(rounds)[1::6]
            for count in (2, 4)
        ]
        honest, bad = zip(*found, strict=True)
        ranges = (f"{min(lengths):.1f} to {max(lengths):.1f}" for lengths in (honest, bad))
        rows.append([f"{kind}, strength {strength:g}", *ranges])
    print(markdown(["attack", "honest, largest", "malicious, smallest"], rows))


if __name__ == "__main__":
    main()
