"""Denoisers: a trained network and two closed forms, all ``(z_t [M, k], t) -> ε̂ [M, k]``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from pfedgpa_app.diffusion.schedule import Schedule

Denoiser = Callable[[Tensor, int], Tensor]


class GaussianDenoiser:
    """The exact ε of a population N(μ, Σ): the linear-Gaussian (PPCA) baseline.

    E[z_0|z_t] = μ + √ᾱ Σ (ᾱΣ + (1−ᾱ)I)^{-1} (z_t − √ᾱ μ).
    """

    def __init__(self, mean: Tensor, covariance: Tensor, schedule: Schedule) -> None:
        self.mean = mean
        self.variances, self.axes = torch.linalg.eigh(covariance)
        self.schedule = schedule

    @classmethod
    def fit(cls, latents: Tensor, schedule: Schedule) -> GaussianDenoiser:
        """Fit the Gaussian with the mean and covariance of the latents [N, k]."""
        mean = latents.mean(0)
        centred = latents - mean
        return cls(mean, centred.T @ centred / len(latents), schedule)

    def __call__(self, z: Tensor, t: int) -> Tensor:
        signal, noise = self.schedule.signal(t), self.schedule.noise(t)
        gain = signal * self.variances / (signal**2 * self.variances + noise**2)
        centred = (z - signal * self.mean) @ self.axes
        clean = self.mean + (centred * gain) @ self.axes.T
        return self.schedule.eps_from_clean(z, clean, t)


class FiniteSetDenoiser:
    """The exact ε of points blurred by N(0, τ²I), which an over-fitted network tends to.

    E[z_0|z_t] = Σ_j w_j [z_j + g (z_t − √ᾱ z_j)], w = softmax_j(−‖z_t − √ᾱ z_j‖² / 2s),
    s = ᾱτ² + 1 − ᾱ, g = √ᾱ τ² / s; τ = 0 is the finite set itself.
    """

    def __init__(self, points: Tensor, schedule: Schedule, blur: float = 0.0) -> None:
        self.points, self.schedule, self.blur = points, schedule, blur

    def _spread(self, t: int) -> float:
        return self.schedule.signal(t) ** 2 * self.blur**2 + self.schedule.noise(t) ** 2

    def weights(self, z: Tensor, t: int) -> Tensor:
        """The posterior weight [M, N] of each point."""
        distance = torch.cdist(z, self.schedule.signal(t) * self.points).square()
        return torch.softmax(-distance / (2 * self._spread(t)), dim=1)

    def __call__(self, z: Tensor, t: int) -> Tensor:
        signal = self.schedule.signal(t)
        gain = signal * self.blur**2 / self._spread(t)
        centre = self.weights(z, t) @ self.points
        clean = centre + gain * (z - signal * centre)
        return self.schedule.eps_from_clean(z, clean, t)


class ConditionEmbedding(nn.Module):
    """Embeds times t [M], and descriptors of the clients whose latents are seen, as [M, width].

    A sinusoidal embedding of t goes through two layers. In a network with descriptors [M, d] their
    embedding is added; a learned null replaces it for rows of NaN, or if no descriptors are given.
    """

    EMBEDDING = 64

    def __init__(self, width: int, steps: int, descriptor: int = 0) -> None:
        super().__init__()
        self.steps = steps
        self.descriptor = descriptor
        self.net = nn.Sequential(
            nn.Linear(self.EMBEDDING, width), nn.SiLU(), nn.Linear(width, width)
        )
        if descriptor:
            self.describe = nn.Sequential(
                nn.Linear(descriptor, width), nn.SiLU(), nn.Linear(width, width)
            )
            self.null = nn.Parameter(torch.zeros(width))

    def forward(self, t: Tensor, descriptors: Tensor | None = None) -> Tensor:
        half = self.EMBEDDING // 2
        rates = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
        angles = (t * (1000 / self.steps))[:, None] * rates
        embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
        out: Tensor = self.net(embedding.to(self.net[0].weight.dtype))  # type: ignore[arg-type]
        if not self.descriptor:
            return out
        if descriptors is None:
            return out + self.null
        known = ~descriptors.isnan().any(1, keepdim=True)
        return out + torch.where(known, self.describe(descriptors.nan_to_num()), self.null)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width)
        )

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        out: Tensor = h + self.net(h + time)
        return out


class ResidualMLP(nn.Module):
    """Predicts v from z_t [M, k] and t [M] by residual blocks with a sinusoidal time embedding.

    Nothing is clipped: weights have no natural range.
    """

    def __init__(
        self, dimensions: int, width: int, blocks: int, steps: int, descriptor: int = 0
    ) -> None:
        super().__init__()
        self.time = ConditionEmbedding(width, steps, descriptor)
        self.inward = nn.Linear(dimensions, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(blocks))
        self.outward = nn.Linear(width, dimensions)

    def forward(self, z: Tensor, t: Tensor, descriptors: Tensor | None = None) -> Tensor:
        time = self.time(t, descriptors)
        h = self.inward(z)
        for block in self.blocks:
            h = block(h, time)
        out: Tensor = self.outward(h)
        return out


class TokenTransformer(nn.Module):
    """Predicts v from z_t [M, tokens · size] and t [M] by attention between tokens.

    The autoencoder decides what a token is: a direction, a layer or a chunk of the weights.
    """

    HEADS = 4

    def __init__(
        self, tokens: tuple[int, int], width: int, blocks: int, steps: int, descriptor: int = 0
    ) -> None:
        super().__init__()
        self.tokens = tokens
        self.time = ConditionEmbedding(width, steps, descriptor)
        self.inward = nn.Linear(tokens[1], width)
        self.place = nn.Parameter(0.02 * torch.randn(tokens[0], width))
        layer = nn.TransformerEncoderLayer(
            width, self.HEADS, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        self.outward = nn.Linear(width, tokens[1])

    def forward(self, z: Tensor, t: Tensor, descriptors: Tensor | None = None) -> Tensor:
        time = self.time(t, descriptors)[:, None]
        h = self.inward(z.view(-1, *self.tokens)) + self.place + time
        out: Tensor = self.outward(self.blocks(h))
        return out.flatten(1)


class NetworkDenoiser:
    """A trained v-network as a denoiser, with or without classifier-free guidance (eq. 9)."""

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        descriptors: Tensor | None = None,
        guidance: float = 0.0,
    ) -> None:
        """``descriptors`` [M, d]: of the clients whose latents it will denoise, in their order."""
        self.network, self.schedule = network.eval(), schedule
        self.descriptors, self.guidance = descriptors, guidance

    def of(self, descriptors: Tensor | None, guidance: float) -> NetworkDenoiser:
        """The same network for clients with these descriptors, guided by ω = ``guidance``.

        ε̃ = (1 + ω) ε_φ(z, t, e) − ω ε_φ(z, t, ∅): ω = 0 is the conditional model, −1 the
        unconditional.
        """
        return NetworkDenoiser(self.network, self.schedule, descriptors, guidance)

    @torch.no_grad()
    def __call__(self, z: Tensor, t: int) -> Tensor:
        times = torch.full((len(z),), float(t), device=z.device)
        v = self.network(z, times)
        if self.descriptors is not None:  # z holds all clients in turn, once per draw
            each = self.descriptors.to(z).repeat(len(z) // len(self.descriptors), 1)
            v = (1 + self.guidance) * self.network(z, times, each) - self.guidance * v
        return self.schedule.eps_from_v(z, v, t)
