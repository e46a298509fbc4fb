"""The noise schedule and all formulas that follow from it.

z_t = √ᾱ_t z_0 + √(1−ᾱ_t) ε with t = 0..T and ᾱ_0 = 1: index 0 is clean. β, α, ᾱ and σ are
computed only here. Tables are float64; latents keep their own dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Schedule:
    """DDPM's variance schedule (Ho et al. 2020, arXiv 2006.11239), "linear" or "cosine".

    Linear: β from 1e-4 to 0.02 at T = 1000, scaled by 1000/T for other lengths so that ᾱ_T
    stays small. Cosine: Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17, β at most 0.999.
    """

    def __init__(self, steps: int = 1000, kind: str = "linear") -> None:
        self.steps = steps
        if kind == "linear":
            scale = 1000 / steps
            beta = torch.linspace(1e-4 * scale, 0.02 * scale, steps, dtype=torch.float64)
            beta = beta.clamp(max=0.999)
        elif kind == "cosine":
            t = torch.arange(steps + 1, dtype=torch.float64) / steps
            f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
            beta = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        else:
            raise ValueError(f"no schedule called {kind!r}")
        zero = torch.zeros(1, dtype=torch.float64)
        self.beta = torch.cat([zero, beta])
        self.alpha = 1 - self.beta
        self.alpha_bar = self.alpha.cumprod(0)
        previous = self.alpha_bar[:-1]
        variance = torch.cat([zero, self.beta[1:] * (1 - previous) / (1 - self.alpha_bar[1:])])
        self.sigma = variance.sqrt()  # "fixed small"; σ_1 = 0

    def signal(self, t: int) -> float:
        """√ᾱ_t, the factor of z_0 in z_t."""
        return math.sqrt(self.alpha_bar[t])

    def noise(self, t: int) -> float:
        """√(1−ᾱ_t), the factor of ε in z_t."""
        return math.sqrt(1 - self.alpha_bar[t])

    def last_below(self, ratio: float) -> int:
        """The largest t whose noise is at most ``ratio`` times the signal, but at least 1."""
        return max(1, int((1 - self.alpha_bar <= ratio**2 * self.alpha_bar).sum()) - 1)

    def add_noise(self, clean: Tensor, eps: Tensor, t: int) -> Tensor:
        """z_t from z_0 = ``clean`` and ε: a draw of q(z_t | z_0)."""
        return self.signal(t) * clean + self.noise(t) * eps

    def clean(self, z: Tensor, eps: Tensor, t: int) -> Tensor:
        """ẑ_0 from z_t and ε."""
        return (z - self.noise(t) * eps) / self.signal(t)

    def eps_from_clean(self, z: Tensor, clean: Tensor, t: int) -> Tensor:
        """ε from z_t and ẑ_0."""
        return (z - self.signal(t) * clean) / self.noise(t)

    def eps_from_v(self, z: Tensor, v: Tensor, t: int) -> Tensor:
        """ε from z_t and v = √ᾱ ε − √(1−ᾱ) z_0 (Salimans & Ho 2022, arXiv 2202.00512)."""
        return self.noise(t) * z + self.signal(t) * v

    def reverse_mean(self, z: Tensor, eps: Tensor, t: int) -> Tensor:
        """μ_φ(z_t, t), the mean of z_{t−1}: the paper's eq. 6 with its misprints corrected.

        The paper prints 1/√ᾱ_t; the posterior mean needs 1/√α_t, α_t = 1−β_t.
        """
        step = float(self.beta[t]) / self.noise(t)
        return (z - step * eps) / math.sqrt(self.alpha[t])

    def posterior_mean(self, z: Tensor, clean: Tensor, t: int) -> Tensor:
        """The mean of q(z_{t−1} | z_t, z_0); its deviation is ``sigma[t]`` (DDPM eq. 7)."""
        remaining = 1 - float(self.alpha_bar[t])
        before = float(self.alpha_bar[t - 1])
        from_clean = math.sqrt(before) * float(self.beta[t]) / remaining
        from_noisy = math.sqrt(self.alpha[t]) * (1 - before) / remaining
        return from_clean * clean + from_noisy * z

    def ddim_step(self, z: Tensor, eps: Tensor, t: int, to: int) -> Tensor:
        """Deterministic DDIM from t to any other time (Song et al. 2021, arXiv 2010.02502, η=0)."""
        return self.add_noise(self.clean(z, eps, t), eps, to)
