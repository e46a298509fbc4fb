"""Rules for how many directions clients' weights share; they need no data, labels or groups.

All rules look at the clients' mean classifiers: what clients share shows most clearly in the last
layer, and the mean over rounds leaves little of SGD's noise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.diffusion.autoencoder import Deltas
from pfedgpa_app.diffusion.directions import client_means
from pfedgpa_app.diffusion.settings import RULES

_NULL = 1e-12  # eigenvalues with less of the largest are of clients whose classifiers are equal
_SPLITS = 40  # random splits of clients and weights in cross-validation


def choose_rank(
    rule: str, deltas: Deltas, head: slice, classifiers: Tensor, clients: Tensor, seed: int
) -> int:
    """The latent rank by ``rule``: 2 to clients − 1, but 1 if there are fewer than 3 clients.

    Args:
        rule: ``head-gap`` counts the eigenvalues of the mean classifiers' Gram matrix above twice
            their median, as what each client merely memorised spreads evenly over directions.
            ``shrinkage`` counts those above the optimal hard threshold for a matrix of that shape
            (Gavish and Donoho 2014): the same if a classifier is far larger than clients are many.
            ``widest-gap`` does so, too, but repeats it with the median of those not yet counted
            until the count stays (where clients differ in many directions, these raise the median
            of all). Then it keeps those before the last gap in the eigenvalues' logarithms that is
            at least half as wide as the widest: with many clients, what each memorised has large
            eigenvalues, too, but without gaps.
            ``cross-validation`` takes the rank with the least error in predicting held-out weights
            of held-out clients from the rest (Owen and Perry 2009); ``likelihood`` the one with
            the largest likelihood of a held-out client under the others' probabilistic PCA.
        head: the classifier's columns.
        classifiers: the inner products [n, n] of clients' mean classifiers.
        clients: [N], of the deltas' rows.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"no rank rule called {rule!r}; there are {', '.join(RULES)}")
    n, p = len(classifiers), len(range(*head.indices(deltas.vectors.shape[1])))
    if n < 3:
        return max(1, n - 1)
    if rule == "cross-validation":
        rank = _cross_validated(deltas, head, client_means(clients), seed)
    elif rule == "likelihood":
        rank = _likeliest(classifiers, p)
    else:
        eigenvalues = torch.linalg.eigvalsh(classifiers).flip(0)[: min(n - 1, p)]
        eigenvalues = eigenvalues[eigenvalues > _NULL * eigenvalues[0]]
        times = 2.0 if rule == "head-gap" else hard_threshold((n - 1) / p)
        rank = _above(eigenvalues, times)
        if rule == "widest-gap":
            while (more := _above(eigenvalues, times, rank)) > rank:
                rank = more
            rank = _last_wide_gap(eigenvalues, rank)
    return min(max(2, rank), n - 1)


def _above(eigenvalues: Tensor, times: float, first: int = 0) -> int:
    """How many eigenvalues, in falling order, exceed ``times`` the median without the ``first``."""
    return int((eigenvalues > times * eigenvalues[first:].median()).sum())


def _last_wide_gap(eigenvalues: Tensor, most: int) -> int:
    """How many of the first ``most`` eigenvalues, in falling order, precede the last wide gap."""
    logs = eigenvalues.clamp_min(1e-300).log()
    gaps = -logs[1 : most + 1].diff()  # after the second, the third, …
    wide = torch.nonzero(gaps >= gaps.max() / 2) if len(gaps) else gaps
    return 2 + int(wide[-1]) if len(wide) else most


def hard_threshold(aspect: float) -> float:
    """Gavish and Donoho's threshold ω(β)², in units of the median eigenvalue, for β = ``aspect``.

    It is λ*(β)² over the median of the Marchenko-Pastur law, found by numerical integration:
    2 for β → 0, 8.2 (ω = 2.858) for a square matrix. β is n/p, or p/n if that is smaller.
    """
    beta = min(aspect, 1 / aspect)
    largest = 2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    angle = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    # points lie closest at the ends, where the density is steep
    x = (low + high) / 2 - (high - low) / 2 * angle.cos()
    density = (high - x).clamp(min=0).sqrt() * (x - low).clamp(min=0).sqrt() / x.clamp(min=1e-12)
    mass = (density * angle.sin()).cumsum(0)
    median = float(x[int(torch.searchsorted(mass, mass[-1] / 2))])
    return largest / median


def _cross_validated(deltas: Deltas, head: slice, means: Tensor, seed: int) -> int:
    """The rank k whose prediction B D_k⁺ C of held-out blocks A of client means errs least."""
    generator = torch_generator(seed, "rank")
    n = len(means)
    table = means @ deltas.columns(head).cpu()
    most = min(n // 2 - 1, table.shape[1] // 2)
    errors = torch.zeros(most + 1, dtype=torch.float64)
    for _ in range(_SPLITS):
        rows = torch.randperm(n, generator=generator)
        columns = torch.randperm(table.shape[1], generator=generator)
        out, kept = rows[: n // 2], rows[n // 2 :]
        seen, hidden = columns[: len(columns) // 2], columns[len(columns) // 2 :]
        others = table[kept] - table[kept].mean(0)
        left = table[out] - table[kept].mean(0)
        u, s, v = torch.linalg.svd(others[:, seen], full_matrices=False)
        scores = left[:, seen] @ v.T[:, :most] / s[:most]  # B V_k S_k⁻¹
        parts = u.T[:most] @ others[:, hidden]
        predicted = torch.zeros_like(left[:, hidden])
        errors[0] += left[:, hidden].square().sum()
        for k in range(most):
            predicted = predicted + scores[:, k : k + 1] * parts[k]
            errors[k + 1] += (left[:, hidden] - predicted).square().sum()
    return int(errors.argmin())


def _likeliest(gram: Tensor, size: int) -> int:
    """The rank under whose probabilistic PCA clients held out in turn are most likely.

    Args:
        gram: inner products [n, n] of the clients' means.
        size: numbers in each mean.
    """
    n = len(gram)
    total = torch.zeros(n - 2, dtype=torch.float64)
    for out in range(n):
        kept = [i for i in range(n) if i != out]
        centre = torch.zeros(n, n, dtype=torch.float64)
        centre[:, kept] = 1 / (n - 1)
        centred = (torch.eye(n, dtype=torch.float64) - centre) @ gram
        centred = centred @ (torch.eye(n, dtype=torch.float64) - centre).T
        values, vectors = torch.linalg.eigh(centred[kept][:, kept])
        values, vectors = values.flip(0)[: n - 2].clamp(min=1e-300), vectors.flip(1)[:, : n - 2]
        scores = (centred[out, kept] @ vectors).square() / values  # squared, along each axis
        variances, length = values / (n - 1), centred[out, out]
        different = int((values > _NULL * values[0]).sum())
        for k in range(1, min(n - 2, size, different)):
            left = size - k
            noise = variances[k:].sum() / left
            total[k] -= 0.5 * (
                variances[:k].log().sum()
                + left * noise.log()
                + (scores[:k] / variances[:k]).sum()
                + (length - scores[:k].sum()) / noise
            )
    total[0] = total[size:] = -math.inf
    return int(total.argmax())
