"""From uploads to few numbers and back: drift removal and the exact linear autoencoders.

There are only N uploads, so every direction that matters among P weights is a combination of
them. Weights are read in blocks of columns, once per span of directions, and no P×P matrix is
ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")
_NUMBERS = 2**20  # read at a time: as many as fit into caches


def blocks(rows: int, end: int, first: int = 0) -> Iterator[slice]:
    """Split columns ``first`` to ``end`` into slices, narrower the more ``rows`` there are."""
    width = max(256, _NUMBERS // rows)
    for start in range(first, end, width):
        yield slice(start, min(end, start + width))


@dataclass(frozen=True)
class Deltas:
    """Uploads less their round's drift: ``vectors[j] − means[index[j]]``, computed by blocks.

    vectors [N, P] and means [R, P] are float32; ``index`` [N] is the place of each upload's round
    in ``rounds``. Sums over weights are computed on ``device``, which is sent a block of columns
    at a time.
    """

    vectors: Tensor
    means: Tensor
    index: Tensor
    rounds: tuple[int, ...]
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.vectors)

    def columns(self, block: slice) -> Tensor:
        """The deltas of a ``block`` of columns, [N, block] in float64, on ``device``."""
        vectors, means = (t[:, block].to(self.device) for t in (self.vectors, self.means))
        return (vectors - means[self.index.to(self.device)]).double()

    def rows(self, rows: Tensor) -> Tensor:
        """The deltas of some ``rows``, [len(rows), P] in float32."""
        return self.vectors[rows] - self.means[self.index[rows]]

    def part(self, columns: slice) -> Deltas:
        """The deltas of some ``columns`` only; no weight is copied."""
        return replace(self, vectors=self.vectors[:, columns], means=self.means[:, columns])

    def gram(self, combinations: Tensor | None = None, columns: slice = slice(None)) -> Tensor:
        """The deltas' inner products [N, N] in float64, over all weights or some ``columns``.

        Args:
            combinations: [N, K]; if given, the inner products [K, K] of these combinations of the
                deltas are returned instead.
        """
        size = len(self) if combinations is None else combinations.shape[1]
        gram = torch.zeros(size, size, dtype=torch.float64, device=self.device)
        combine = None if combinations is None else combinations.T.to(self.device)
        first, last, _ = columns.indices(self.vectors.shape[1])
        for block in blocks(len(self), last, first):
            part = self.columns(block) if combine is None else combine @ self.columns(block)
            gram.addmm_(part, part.T)
        return gram.cpu()

    def span(self, combinations: Tensor) -> Span:
        """The span of combinations [N, K] of the deltas; weights are read once, in O(NPK)."""
        combine = combinations.T.to(self.device)
        weights = torch.empty(len(combine), self.vectors.shape[1], dtype=torch.float64)
        products = torch.zeros(len(self), len(combine), dtype=torch.float64, device=self.device)
        for block in blocks(*self.vectors.shape):
            part = self.columns(block)
            combined = combine @ part
            products.addmm_(part, combined.T)
            weights[:, block] = combined.cpu()
        return Span(combinations, weights, products.cpu())


@dataclass(frozen=True)
class Span:
    """The span of some combinations of the deltas, in float64.

    Attributes:
        combinations: [N, K].
        weights: the combined deltas [K, P].
        products: the inner products of all deltas with ``weights`` [N, K].
    """

    combinations: Tensor
    weights: Tensor
    products: Tensor

    def axes(self, floor: float = 0.0) -> tuple[Tensor, Tensor]:
        """Orthonormal directions within the span, along which the deltas are uncorrelated.

        Args:
            floor: squared length up to which a direction is dropped.

        Returns:
            ``mixing`` [K, k ≤ K], which maps ``weights`` to the directions, and the deltas'
            deviations [k] along them, largest first. All latents are
            ``products @ mixing / deviations``.
        """
        lengths, axes = torch.linalg.eigh(self.combinations.T @ self.products)
        real = lengths > max(floor, 1e-9 * float(lengths[-1]))
        orthonormal = axes[:, real] / lengths[real].sqrt()
        projected = self.products @ orthonormal
        variances, rotation = torch.linalg.eigh(projected.T @ projected / len(projected))
        return orthonormal @ rotation.flip(1), variances.flip(0).clamp(min=0).sqrt()


def remove_drift(
    vectors: Tensor,
    rounds: Tensor,
    clients: Tensor,
    device: torch.device = CPU,
    known: Mapping[int, Tensor] | None = None,
) -> Deltas:
    """Subtract each round's drift μ_r, which all clients share, so that rounds can be compared.

    In the model θ_ir = μ_r + u_i + e_ir with u_i ~ N(0, σ²) and e_ir ~ N(0, σ²), the drift is
    estimated by the best linear predictor of μ_r. If every client uploads in every round, it is
    exactly the round's mean; if few do, it does not mistake for drift which clients took part.

    Args:
        known: {round: its μ_r}, for rounds in which it need not be predicted.
    """
    names, index = rounds.unique(return_inverse=True)
    _, who = clients.unique(return_inverse=True)
    n, r, c = len(vectors), len(names), int(who.max()) + 1
    design = torch.zeros(n, r + c, dtype=torch.float64)
    design[torch.arange(n), index] = 1
    design[torch.arange(n), r + who] = 1
    ridge = torch.diag(torch.cat([torch.zeros(r), torch.ones(c)]).double())
    solve = torch.linalg.solve(design.T @ design + ridge, design.T)[:r].to(device)
    means = torch.empty(r, vectors.shape[1])
    for block in blocks(*vectors.shape):
        means[:, block] = (solve @ vectors[:, block].to(device).double()).float().cpu()
    order = tuple(int(x) for x in names)
    for place, name in enumerate(order):
        if known and name in known:
            means[place] = known[name]
    return Deltas(vectors, means, index, order, device)


def root_mean_squares(deltas: Deltas, sizes: Sequence[int]) -> Tensor:
    """For each weight [P], the root mean square of all deltas of its tensor; 1 where that is 0."""
    sums = torch.cat(
        [deltas.columns(block).square().sum(0).cpu() for block in blocks(*deltas.vectors.shape)]
    )
    each = [tensor.mean().div(len(deltas.vectors)).sqrt() for tensor in sums.split(list(sizes))]
    scales = torch.stack(each).float()
    return scales.where(scales > 0, 1.0).repeat_interleave(torch.tensor(sizes))


class Autoencoder(Protocol):
    """Maps deltas [M, P] to latents [M, k] of unit variance over the uploads, and back.

    Attributes:
        tokens: the k latent numbers as (tokens, numbers in each), for denoisers of tokens.
    """

    @property
    def tokens(self) -> tuple[int, int]: ...

    def encode(self, deltas: Tensor) -> Tensor:
        """[M, P] → [M, k]."""

    def decode(self, latents: Tensor) -> Tensor:
        """[M, k] → [M, P]."""


@dataclass(frozen=True)
class LinearAutoencoder:
    """The exact linear autoencoder on a span of deltas, with latents of unit variance.

    components [k, P] are orthonormal; scale [k] is each latent's deviation before scaling,
    largest first. Over the uploads it was fitted to, latents are uncorrelated.
    """

    components: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, deltas: Deltas, combinations: Tensor) -> tuple[LinearAutoencoder, Tensor]:
        """Fit on the span of ``combinations`` [N, K] of the deltas; also returns latents [N, k].

        Directions that are only float32 rounding errors (of identical uploads, say) are dropped.
        """
        span = deltas.span(combinations)
        rounding = 1e-13 * float(torch.linalg.vector_norm(deltas.vectors)) ** 2  # error of float32
        mixing, deviations = span.axes(rounding)
        components, latents = mixing.T @ span.weights, span.products @ mixing / deviations
        # eigh leaves each sign open: a direction's largest weight is made positive
        if len(components):
            largest = components.abs().argmax(1, keepdim=True)
            signs = components.gather(1, largest).sign()
            components, latents = components * signs, latents * signs.T
        return cls(components.float(), deviations.float()), latents.float()

    @property
    def tokens(self) -> tuple[int, int]:
        """One token per direction."""
        return len(self.scale), 1

    def encode(self, deltas: Tensor) -> Tensor:
        return deltas @ self.components.T / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return (latents * self.scale) @ self.components


@dataclass(frozen=True)
class LayeredAutoencoder:
    """An exact linear autoencoder for each layer by itself: one token per layer.

    For a layer that spans fewer directions than others, the surplus latents are always 0.
    """

    layers: tuple[LinearAutoencoder, ...]
    columns: tuple[slice, ...]
    rank: int

    @classmethod
    def fit(
        cls, deltas: Deltas, columns: Sequence[slice], combinations: Tensor
    ) -> tuple[LayeredAutoencoder, Tensor]:
        """Fit on the span of ``combinations`` [N, K] of each layer's deltas; also returns latents.

        Args:
            columns: the columns of each layer.
        """
        fitted = [LinearAutoencoder.fit(deltas.part(layer), combinations) for layer in columns]
        layers = tuple(layer for layer, _ in fitted)
        coder = cls(layers, tuple(columns), max(len(layer.scale) for layer in layers))
        return coder, coder._joined([latents for _, latents in fitted])

    @property
    def tokens(self) -> tuple[int, int]:
        """One token per layer."""
        return len(self.layers), self.rank

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Join layers' latents [..., k_l ≤ rank], padded with 0, into [..., layers · rank]."""
        return torch.cat(
            [torch.nn.functional.pad(part, (0, self.rank - part.shape[-1])) for part in parts], -1
        )

    def encode(self, deltas: Tensor) -> Tensor:
        pairs = zip(self.layers, self.columns, strict=True)
        return self._joined([layer.encode(deltas[:, where]) for layer, where in pairs])

    def decode(self, latents: Tensor) -> Tensor:
        end = max(where.stop for where in self.columns)
        deltas = torch.zeros(len(latents), end, dtype=latents.dtype)
        parts = latents.reshape(len(latents), len(self.layers), self.rank).unbind(1)
        for layer, where, part in zip(self.layers, self.columns, parts, strict=True):
            deltas[:, where] = layer.decode(part[:, : len(layer.scale)])
        return deltas
