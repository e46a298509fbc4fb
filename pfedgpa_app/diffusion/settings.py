"""The settings by which a distribution of weights is learned."""

from __future__ import annotations

from dataclasses import dataclass

from pfedgpa_app.core.settings import setting

DENOISERS = ("mlp", "transformer", "gaussian", "finite-set")
RULES = ("widest-gap", "head-gap", "shrinkage", "cross-validation", "likelihood")


@dataclass(frozen=True)
class DiffusionSettings:
    """What is learned from clients' uploads, and how."""

    autoencoder: str = setting(
        "linear",
        "the exact linear one, of the whole or of each of its layers, or the paper's convolutional",
        choices=("linear", "layers", "conv"),
    )
    chunk_latents: int = setting(16, "conv: latents for every 16,384 weights", low=1)
    autoencoder_steps: int = setting(1500, "conv: optimiser steps", low=1)
    rank: int | None = setting(
        None, "latent dimensions; auto: by rank-rule; 0: everyone is sent the mean", low=0
    )
    rank_rule: str = setting(
        "widest-gap", "how clients' mean classifiers tell the rank", choices=RULES
    )
    directions: str = setting(
        "shared",
        "what latents see: what clients with like classifiers share, or principal directions",
        choices=("shared", "principal"),
    )
    strength: int | None = setting(
        None, "t0: how far an upload is noised, 0..diffusion-steps, or auto", low=0
    )
    own_weight: float | None = setting(
        None,
        "auto strength: posterior weight left on a client's own uploads; auto: by clients and rank",
        above=0,
        high=1,
    )
    most_noise: float = setting(
        0.5, "auto strength: most noise, in deviations of the unit-variance latents", above=0
    )
    denoiser: str = setting(
        "mlp", "of the last generation: a trained network, or a closed form", choices=DENOISERS
    )
    schedule: str = setting("linear", "noise schedule", choices=("linear", "cosine"))
    diffusion_steps: int = setting(1000, "T, the length of the noise schedule", low=2)
    fit_steps: int = setting(1000, "optimiser steps of the denoiser", low=1)
    fit_batch_size: int = setting(256, "latents a step", low=1)
    fit_learning_rate: float = setting(1e-3, "peak learning rate of the denoiser", above=0)
    width: int = setting(64, "hidden width of the denoiser", low=1)
    blocks: int = setting(3, "residual blocks of the denoiser", low=1)
    ema: float = setting(0.99, "decay of the averaged denoiser", low=0, high=0.999999)
    latent_noise: float = setting(0.1, "noise on the unit-variance latents in training", low=0)
    guidance: float = setting(
        0.0, "ω of eq. 9 (descriptors) and of eq. 10 (guided joining)", low=-1
    )
