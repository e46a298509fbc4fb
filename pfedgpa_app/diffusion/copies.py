"""Measure whether generated weights are more than copies of uploads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pfedgpa_app.diffusion.autoencoder import blocks


def novelty(generated: Sequence[Tensor], newest: Tensor, uploads: Sequence[Tensor]) -> Tensor:
    """How far clients' generated weights are from the nearest upload [M].

    The unit is the distance from the client's newest upload to the nearest other one: 0 is a copy,
    1 is as new as one more round of training (weight_memorization, arXiv 2506.07998, asks for such
    a ratio). NaN where uploads coincide.

    Args:
        generated: M vectors [P].
        newest: each client's place [M] among ``uploads``.
        uploads: N vectors [P].
    """
    m = len(generated)
    squared = torch.zeros(2 * m, len(uploads), dtype=torch.float64)
    for block in blocks(m + len(uploads), len(uploads[0])):
        origin = uploads[0][block].double()  # close to all vectors, so that squares lose no digits
        all_of_them = torch.stack([vector[block] for vector in uploads]).double() - origin
        made = torch.stack([vector[block] for vector in generated]).double() - origin
        rows = torch.cat([made, all_of_them[newest]])
        squared -= 2 * rows @ all_of_them.T
        squared += rows.square().sum(1)[:, None] + all_of_them.square().sum(1)
    squared[torch.arange(m, 2 * m), newest] = torch.inf
    nearest = squared.clamp(min=0).sqrt().amin(1)
    return nearest[:m] / nearest[m:].where(nearest[m:] > 0, torch.nan)
