"""The paper's autoencoder: 1-D convolutions over the weights, trained with noise (p-diff).

Wang et al. 2024 (arXiv 2402.13144) train it on the weights and add noise to its input and its
latent. Here noise is added to the latent alone. Weights are scaled tensor by tensor and cut into
chunks with latents of their own, so that the cost grows linearly with a network's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedgpa_app.core.randomness import seeded, torch_generator
from pfedgpa_app.core.weights import Layout
from pfedgpa_app.diffusion.autoencoder import Deltas, root_mean_squares

_ROWS = 32  # uploads per training step, and encoded or decoded at a time


@dataclass(frozen=True)
class ConvolutionalSettings:
    """How the autoencoder is trained; noise is in units of the latents, which lie in (−1, 1)."""

    latents: int = 16  # per chunk
    steps: int = 1500
    learning_rate: float = 1e-2
    latent_noise: float = 0.1
    chunk: int = 16_384  # weights in a chunk


class ConvolutionalNetwork(nn.Module):
    """Maps chunks [B, C, chunk] to latents [B, C, d] in (−1, 1) and back.

    All chunks share the convolutions; between these and its latents each chunk has a matrix of its
    own. There is no normalisation, because the scale of a weight carries its meaning.
    """

    CHANNELS = (8, 32)
    STRIDES = (8, 4)

    def __init__(self, chunks: int, chunk: int, latents: int) -> None:
        super().__init__()
        self.chunks, self.chunk = chunks, chunk
        (a, b), (s, t) = self.CHANNELS, self.STRIDES
        self.down = nn.Sequential(
            nn.Conv1d(1, a, 2 * s, s, s // 2),
            nn.LeakyReLU(0.2),
            nn.Conv1d(a, b, 2 * t, t, t // 2),
            nn.LeakyReLU(0.2),
        )
        self.up = nn.Sequential(
            nn.LeakyReLU(0.2),
            nn.ConvTranspose1d(b, a, 2 * t, t, t // 2),
            nn.LeakyReLU(0.2),
            nn.ConvTranspose1d(a, 1, 2 * s, s, s // 2),
        )
        features = b * chunk // (s * t)
        self.inward = nn.Parameter(torch.randn(chunks, features, latents) / features**0.5)
        self.outward = nn.Parameter(torch.randn(chunks, latents, features) / latents**0.5)

    def encode(self, x: Tensor) -> Tensor:
        h = self.down(x.reshape(-1, 1, self.chunk)).view(len(x), self.chunks, -1)
        return torch.einsum("bcf,cfd->bcd", h, self.inward).tanh()

    def decode(self, z: Tensor) -> Tensor:
        h = torch.einsum("bcd,cdf->bcf", z, self.outward)
        out: Tensor = self.up(h.reshape(len(z) * self.chunks, self.CHANNELS[-1], -1))
        return out.view(len(z), self.chunks, self.chunk)


class ConvolutionalAutoencoder:
    """Maps deltas to the network's latents, scaled to unit variance, and back."""

    def __init__(
        self, network: ConvolutionalNetwork, scale: Tensor, settings: ConvolutionalSettings
    ) -> None:
        """``scale`` [P]: the number that each weight's delta is divided by."""
        self.network, self.scale, self.settings = network, scale, settings
        self.mean = torch.zeros(network.chunks * settings.latents)
        self.deviation = torch.ones_like(self.mean)

    @classmethod
    def fit(
        cls,
        deltas: Deltas,
        layout: Layout,
        settings: ConvolutionalSettings,
        seed: int,
        device: torch.device,
    ) -> tuple[ConvolutionalAutoencoder, Tensor]:
        """Train on all deltas in O(steps · P), however many; also returns their latents [N, k]."""
        p = deltas.vectors.shape[1]
        chunk = min(settings.chunk, -(-p // 32) * 32)  # a multiple of the strides
        generator = torch_generator(seed, "autoencoder")
        with seeded(int(torch.randint(2**31, (1,), generator=generator))):
            network = ConvolutionalNetwork(-(-p // chunk), chunk, settings.latents).to(device)
        coder = cls(network, root_mean_squares(deltas, layout.sizes), settings)
        optimiser = torch.optim.AdamW(
            network.parameters(), settings.learning_rate, weight_decay=0.0
        )
        cycle = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, settings.learning_rate, total_steps=max(2, settings.steps)
        )
        lengths = torch.stack([deltas.rows(torch.tensor([r])).norm() for r in range(len(deltas))])
        order = lengths.argsort(stable=True)  # by content, not by client
        for _ in range(settings.steps):
            rows = order[torch.randint(len(deltas), (_ROWS,), generator=generator)]
            x = coder._chunked(deltas.rows(rows)).to(device)
            z = network.encode(x)
            noise = torch.randn(z.shape, generator=generator).to(device)
            loss = F.mse_loss(network.decode(z + settings.latent_noise * noise), x)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            cycle.step()
        network.eval().requires_grad_(False)
        rows = torch.arange(len(deltas)).split(_ROWS)
        raw = torch.cat([coder.encode(deltas.rows(some)) for some in rows])
        coder.mean, coder.deviation = raw.mean(0), raw.std(0, correction=0).clamp_min(1e-6)
        return coder, (raw - coder.mean) / coder.deviation

    @property
    def tokens(self) -> tuple[int, int]:
        """One token per chunk."""
        return self.network.chunks, self.settings.latents

    def _chunked(self, deltas: Tensor) -> Tensor:
        """Scale deltas [M, P] and cut them into [M, chunks, chunk], the last one padded with 0."""
        whole = self.network.chunks * self.network.chunk
        padded = F.pad(deltas / self.scale, (0, whole - deltas.shape[1]))
        return padded.view(len(deltas), self.network.chunks, self.network.chunk)

    @property
    def _device(self) -> torch.device:
        return self.network.inward.device

    def encode(self, deltas: Tensor) -> Tensor:
        parts = [
            self.network.encode(self._chunked(some).to(self._device)).flatten(1).cpu()
            for some in deltas.split(_ROWS)
        ]
        return (torch.cat(parts) - self.mean) / self.deviation

    def decode(self, latents: Tensor) -> Tensor:
        z = (latents * self.deviation + self.mean).view(-1, *self.tokens)
        parts = [
            self.network.decode(some.to(self._device)).flatten(1).cpu()[:, : len(self.scale)]
            for some in z.split(_ROWS)
        ]
        return torch.cat(parts) * self.scale
