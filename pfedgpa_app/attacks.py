"""Malicious clients, in simulations: what they hold, and what they upload instead."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pfedgpa_app.models import Weights
from pfedgpa_app.randomness import numpy_generator

if TYPE_CHECKING:
    from pfedgpa_app.config import Config

LABEL_FLIP = "label-flip"
ATTACKS = ("none", "sign-flip", "scale", "noise", LABEL_FLIP)


def malicious(config: Config) -> frozenset[int]:
    """The clients that attack: a share of those who are there from the start, drawn by the seed."""
    if config.attack == "none":
        return frozenset()
    count = round(config.malicious_share * config.founders)
    rng = numpy_generator(config.seed, "malicious")
    return frozenset(rng.choice(config.founders, count, replace=False).tolist())


def flips_labels(config: Config, client: int) -> bool:
    """Whether the client takes class y for class K − 1 − y."""
    return config.attack == LABEL_FLIP and client in malicious(config)


def spoiled(config: Config, trained: Weights, sent: Weights, generator: torch.Generator) -> Weights:
    """What a malicious client uploads in the place of its ``trained`` weights.

    With s the attack's strength and Δ = trained − sent: ``sign-flip`` sends sent − sΔ, ``scale``
    sent + sΔ, and ``noise`` trained + s‖Δ‖ε/√P with ε normal. What was not sent to it stays.
    """
    strength, kind = config.attack_strength, config.attack
    if kind in ("none", LABEL_FLIP):
        return trained
    updates = {name: trained[name] - sent[name] for name in trained if name in sent}
    if kind == "noise":
        square = sum(float(u.double().square().sum()) for u in updates.values())
        size = sum(u.numel() for u in updates.values())
        deviation = strength * (square / max(1, size)) ** 0.5
        return trained | {
            name: trained[name] + deviation * torch.randn(u.shape, generator=generator)
            for name, u in updates.items()
        }
    factor = strength if kind == "scale" else -strength
    return trained | {name: sent[name] + factor * u for name, u in updates.items()}
