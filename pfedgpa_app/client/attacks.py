"""Malicious clients, in simulations: the labels they learn, and what they upload instead."""

from __future__ import annotations

from dataclasses import replace

import torch

from pfedgpa_app.core.sections import LABEL_FLIP, AttackSettings
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.images import Images

_HONEST = ("none", LABEL_FLIP)  # attacks that upload what was trained


def flips_labels(config: AttackSettings, client: int) -> bool:
    """Whether the client takes class y for class K − 1 − y."""
    return config.attack == LABEL_FLIP and client in config.malicious_clients


def flipped(images: Images, classes: int) -> Images:
    """Return the same images, class y called K − 1 − y, for K ``classes``."""
    return replace(images, labels=classes - 1 - images.labels)


def attacks_updates(config: AttackSettings, client: int) -> bool:
    """Whether the client uploads anything but what it has trained."""
    return config.attack not in _HONEST and client in config.malicious_clients


def malicious_upload(
    config: AttackSettings, trained: Weights, before: Weights, generator: torch.Generator
) -> Weights:
    """Return what a malicious client uploads in the place of its ``trained`` weights.

    With s the attack's strength and Δ = trained − before: ``sign-flip`` sends before − sΔ,
    ``scale`` before + sΔ, and ``noise`` trained + s‖Δ‖ε/√P, with ε standard normal and P weights.

    Args:
        before: the weights that it trained from; what it uploads beside these stays as it is.
    """
    strength, kind = config.attack_strength, config.attack
    if kind in _HONEST:
        return trained
    updates = {name: trained[name] - before[name] for name in trained if name in before}
    if kind == "noise":
        square = sum(float(u.double().square().sum()) for u in updates.values())
        size = sum(u.numel() for u in updates.values())
        deviation = strength * (square / max(1, size)) ** 0.5
        return trained | {
            name: trained[name] + deviation * torch.randn(u.shape, generator=generator)
            for name, u in updates.items()
        }
    factor = strength if kind == "scale" else -strength
    return trained | {name: before[name] + factor * u for name, u in updates.items()}
