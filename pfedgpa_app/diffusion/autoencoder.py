"""From uploads to few numbers and back: drift removal and the exact linear autoencoders.

Only N uploads exist, so everything about P weights is known from N×N inner products;
weights are read in blocks of columns and no P×P matrix is ever made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

CPU = torch.device("cpu")
_BLOCK = 8192  # columns read at a time


def blocks(end: int, first: int = 0) -> Iterator[slice]:
    """Columns ``first`` to ``end``, so many at a time."""
    for start in range(first, end, _BLOCK):
        yield slice(start, min(end, start + _BLOCK))


@dataclass(frozen=True)
class Deltas:
    """Uploads less their round's drift: ``vectors[j] − means[index[j]]``, never made whole.

    vectors [N, P] and means [R, P] are float32; ``index`` [N] is each upload's round, in the
    order of ``rounds``. Sums over weights are computed on ``device``, which is sent a block of
    columns at a time.
    """

    vectors: Tensor
    means: Tensor
    index: Tensor
    rounds: tuple[int, ...]
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.vectors)

    def columns(self, block: slice) -> Tensor:
        """[N, block] in float64, on ``device``."""
        vectors, means = (t[:, block].to(self.device) for t in (self.vectors, self.means))
        return (vectors - means[self.index.to(self.device)]).double()

    def rows(self, rows: Tensor) -> Tensor:
        """[len(rows), P] in float32."""
        return self.vectors[rows] - self.means[self.index[rows]]

    def part(self, columns: slice) -> Deltas:
        """Only some ``columns``; no weight is copied."""
        return replace(self, vectors=self.vectors[:, columns], means=self.means[:, columns])

    def gram(self, columns: slice = slice(None)) -> Tensor:
        """Inner products [N, N] in float64, over all weights or some ``columns``."""
        shape = len(self.vectors), len(self.vectors)
        gram = torch.zeros(shape, dtype=torch.float64, device=self.device)
        first, last, _ = columns.indices(self.vectors.shape[1])
        for block in blocks(last, first):
            part = self.columns(block)
            gram.addmm_(part, part.T)
        return gram.cpu()


def remove_drift(
    vectors: Tensor,
    rounds: Tensor,
    clients: Tensor,
    device: torch.device = CPU,
    known: Mapping[int, Tensor] | None = None,
) -> Deltas:
    """Subtract what all clients share in a round, comparable between rounds.

    θ_ir = μ_r + u_i + e_ir with u_i ~ N(0, σ²), e ~ N(0, σ²): the best linear predictor of
    μ_r. When every client uploads in every round it is exactly the round's mean; when few
    do, it does not mistake who took part for drift.

    Args:
        known: {round: its μ_r}, of rounds of which that need not be predicted.
    """
    names, index = rounds.unique(return_inverse=True)
    _, who = clients.unique(return_inverse=True)
    n, r, c = len(vectors), len(names), int(who.max()) + 1
    design = torch.zeros(n, r + c, dtype=torch.float64)
    design[torch.arange(n), index] = 1
    design[torch.arange(n), r + who] = 1
    ridge = torch.diag(torch.cat([torch.zeros(r), torch.ones(c)]).double())
    solve = torch.linalg.solve(design.T @ design + ridge, design.T)[:r]
    means = torch.empty(r, vectors.shape[1])
    for block in blocks(vectors.shape[1]):
        means[:, block] = (solve @ vectors[:, block].double()).float()
    order = tuple(int(x) for x in names)
    for place, name in enumerate(order):
        if known and name in known:
            means[place] = known[name]
    return Deltas(vectors, means, index, order, device)


def root_mean_squares(deltas: Deltas, sizes: Sequence[int]) -> Tensor:
    """For every weight [P], the root mean square of all deltas of its tensor; 1 if they are 0."""
    sums = torch.cat(
        [deltas.columns(block).square().sum(0).cpu() for block in blocks(deltas.vectors.shape[1])]
    )
    each = [tensor.mean().div(len(deltas.vectors)).sqrt() for tensor in sums.split(list(sizes))]
    scales = torch.stack(each).float()
    return scales.where(scales > 0, 1.0).repeat_interleave(torch.tensor(sizes))


def principal_axes(gram: Tensor, combinations: Tensor, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Orthonormal directions within a span, along which the deltas are uncorrelated.

    Args:
        gram: the deltas' inner products [N, N].
        combinations: [N, K], the span's directions as combinations of deltas.
        floor: squared length below which a direction counts as none.

    Returns:
        coefficients [N, k ≤ K] of the directions, and the deltas' deviations [k] along them,
        largest first; all latents are ``gram @ coefficients / deviations``.
    """
    lengths, axes = torch.linalg.eigh(combinations.T @ gram @ combinations)
    real = lengths > max(floor, 1e-9 * float(lengths[-1]))
    orthonormal = combinations @ axes[:, real] / lengths[real].sqrt()
    projected = gram @ orthonormal
    variances, rotation = torch.linalg.eigh(projected.T @ projected / len(gram))
    return orthonormal @ rotation.flip(1), variances.flip(0).clamp(min=0).sqrt()


class Autoencoder(Protocol):
    """Deltas [M, P] to latents [M, k] of unit variance over the uploads, and back.

    Attributes:
        tokens: k as (tokens, numbers in each), for denoisers that look at tokens.
    """

    @property
    def tokens(self) -> tuple[int, int]: ...

    def encode(self, deltas: Tensor) -> Tensor:
        """[M, P] → [M, k]."""

    def decode(self, latents: Tensor) -> Tensor:
        """[M, k] → [M, P]."""

    def encode_all(self, deltas: Deltas) -> Tensor:
        """Every upload's latent [N, k], read by blocks."""


@dataclass(frozen=True)
class LinearAutoencoder:
    """The exact linear autoencoder on a span of deltas, latents at unit variance.

    components [k, P] are orthonormal, scale [k] is each latent's deviation before scaling,
    largest first; latents are uncorrelated over the uploads they were fitted to.
    """

    components: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, deltas: Deltas, gram: Tensor, combinations: Tensor) -> LinearAutoencoder:
        """On the span of ``combinations`` [N, K] of the deltas; O(NPk) beyond the Gram matrix.

        The principal axes within the span, from the N×N Gram matrix alone. Directions that
        do not exist in float32 (of identical uploads, say) are dropped.
        """
        p = deltas.vectors.shape[1]
        rounding = 1e-13 * float(torch.linalg.vector_norm(deltas.vectors)) ** 2  # of float32
        coefficients, deviations = principal_axes(gram, combinations, rounding)
        components = torch.empty(coefficients.shape[1], p)
        combine = coefficients.T.to(deltas.device)
        for block in blocks(p):
            components[:, block] = (combine @ deltas.columns(block)).float().cpu()
        # eigh leaves each sign open: a direction's largest weight is positive, whoever uploads
        if len(components):
            largest = components.abs().argmax(1, keepdim=True)
            components *= components.gather(1, largest).sign()
        return cls(components, deviations.float())

    @property
    def tokens(self) -> tuple[int, int]:
        """One token a direction."""
        return len(self.scale), 1

    def encode(self, deltas: Tensor) -> Tensor:
        return deltas @ self.components.T / self.scale

    def decode(self, latents: Tensor) -> Tensor:
        return (latents * self.scale) @ self.components

    def encode_all(self, deltas: Deltas) -> Tensor:
        latents = torch.zeros(len(deltas.vectors), len(self.scale), dtype=torch.float64)
        for block in blocks(self.components.shape[1]):
            components = self.components[:, block].to(deltas.device).double()
            latents += (deltas.columns(block) @ components.T).cpu()
        return (latents / self.scale.double()).float()


@dataclass(frozen=True)
class LayeredAutoencoder:
    """The exact linear autoencoder of every layer by itself: one token a layer.

    A layer that spans fewer directions than others has latents that are always 0.
    """

    layers: tuple[LinearAutoencoder, ...]
    columns: tuple[slice, ...]
    rank: int

    @classmethod
    def fit(
        cls, deltas: Deltas, columns: Sequence[slice], combinations: Tensor
    ) -> LayeredAutoencoder:
        """On the span of ``combinations`` [N, K] of each layer's deltas.

        Args:
            columns: where each layer lies.
        """
        parts = [deltas.part(layer) for layer in columns]
        fitted = [LinearAutoencoder.fit(part, part.gram(), combinations) for part in parts]
        return cls(tuple(fitted), tuple(columns), max(len(layer.scale) for layer in fitted))

    @property
    def tokens(self) -> tuple[int, int]:
        """One token a layer."""
        return len(self.layers), self.rank

    def _joined(self, parts: Sequence[Tensor]) -> Tensor:
        """Layers' latents [..., k_l ≤ rank] as one [..., layers · rank]."""
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

    def encode_all(self, deltas: Deltas) -> Tensor:
        pairs = zip(self.layers, self.columns, strict=True)
        return self._joined([layer.encode_all(deltas.part(where)) for layer, where in pairs])
