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
        "linear: exact, of the whole network; layers: exact, of each layer by itself; conv: "
        "the paper's convolutional one",
        choices=("linear", "layers", "conv"),
    )
    chunk_latents: int = setting(16, "conv: latents per chunk of 16,384 weights", low=1)
    autoencoder_steps: int = setting(1500, "conv: optimiser steps", low=1)
    rank: int | None = setting(
        None,
        "number of latent dimensions; auto: by rank-rule; 0: all clients are sent the mean",
        low=0,
    )
    rank_rule: str = setting(
        "widest-gap", "how the rank is found from the clients' mean classifiers", choices=RULES
    )
    directions: str = setting(
        "shared",
        "what the latents describe: what clients with similar classifiers share, or "
        "principal directions",
        choices=("shared", "principal"),
    )
    strength: int | None = setting(
        None,
        "t0, how far an upload is noised: 0 to diffusion-steps, or auto, as it always is where "
        "validation images favour clients' own weights",
        low=0,
    )
    own_weight: float | None = setting(
        None,
        "strength=auto: posterior weight that a client's own uploads keep; auto: by the "
        "number of clients and the rank",
        above=0,
        high=1,
    )
    most_noise: float = setting(
        0.5, "strength=auto: most noise, in standard deviations of the latents", above=0
    )
    denoiser: str = setting(
        "mlp",
        "denoiser of the last generation: a trained network, or a closed form",
        choices=DENOISERS,
    )
    schedule: str = setting("linear", "noise schedule", choices=("linear", "cosine"))
    diffusion_steps: int = setting(1000, "T, the length of the noise schedule", low=2)
    fit_steps: int = setting(1000, "optimiser steps of the denoiser", low=1)
    fit_batch_size: int = setting(256, "latents per optimiser step", low=1)
    fit_learning_rate: float = setting(1e-3, "peak learning rate of the denoiser", above=0)
    width: int = setting(64, "hidden width of the denoiser", low=1)
    blocks: int = setting(3, "residual blocks of the denoiser", low=1)
    ema: float = setting(
        0.99, "decay of the moving average of the denoiser's weights", low=0, high=0.999999
    )
    latent_noise: float = setting(
        0.1, "noise added to the latents in training, in their standard deviations", low=0
    )
    guidance: float = setting(
        0.0, "ω of eq. 9 (descriptors) and of eq. 10 (guided joining)", low=-1
    )
