"""Choose the few directions of weight space that the latents describe.

Directions are combinations [N, k] of the N deltas. They decide what a latent can express, and so
most of what denoising can gain: directions along which clients differ only by what each of them
memorised must be left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.diffusion.autoencoder import Deltas
from pfedgpa_app.diffusion.denoiser import FiniteSetDenoiser
from pfedgpa_app.diffusion.inversion import calibrate_strength, regenerate
from pfedgpa_app.diffusion.schedule import Schedule


def client_means(clients: Tensor) -> Tensor:
    """Combinations [n, N] that give each client's mean delta, less the mean of all clients."""
    _, who = clients.unique(return_inverse=True)
    means = torch.nn.functional.one_hot(who).T.double()
    means /= means.sum(1, keepdim=True)
    return means - means.mean(0)


def newest_rows(clients: Tensor) -> Tensor:
    """The row of each client's newest upload [n], by client; rows are in the order of rounds."""
    last = {client: row for row, client in enumerate(clients.tolist())}
    return torch.tensor([last[client] for client in sorted(last)])


def principal_directions(gram: Tensor, rank: int) -> Tensor:
    """The principal directions [N, rank] of ``gram`` [N, N]; at rank N, autoencoding is exact."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:]


@dataclass(frozen=True)
class Likeness:
    """Which clients are alike, by the positions of clients' mean classifiers.

    Attributes:
        rank: the number of directions that tell clients apart.
        scores: {client: [clients − 1]}, its position along the principal directions, the widest
            first.
    """

    rank: int
    scores: dict[int, Tensor]


def scores_of(classifiers: Tensor) -> Tensor:
    """Clients' mean classifiers along the principal directions [n, n − 1], the widest first.

    Args:
        classifiers: the inner products [n, n] of clients' mean classifiers.
    """
    return principal_directions(classifiers, max(1, len(classifiers) - 1)).flip(1)


def directions_of_likeness(clients: Tensor, known: Likeness, rank: int) -> Tensor:
    """Whole-network directions that go with a ``known`` likeness of clients.

    As in ``shared_directions``, the client means are regressed on the scores; clients without
    known scores do not count.

    Returns:
        combinations [N, k].
    """
    nothing = torch.zeros_like(next(iter(known.scores.values())))
    scores = [known.scores.get(client, nothing) for client in clients.unique().tolist()]
    return client_means(clients).T @ torch.stack(scores)[:, :rank]


def shared_directions(
    deltas: Deltas,
    classifiers: Tensor,
    clients: Tensor,
    rank: int,
    schedule: Schedule,
    *,
    own_weight: float,
    blur: float,
    seed: int,
) -> Tensor:
    """Whole-network directions that clients with similar classifiers share.

    The principal scores of clients' mean classifiers tell which clients are alike. Regressing the
    client means of whole networks on these scores keeps what goes with them and averages out what
    each client memorised. The scores are then replaced by the clients' latents, denoised by the
    exact finite-set denoiser, which moves like clients closer together.

    Args:
        classifiers: the inner products [n, n] of clients' mean classifiers.
        clients: [N], of the deltas' rows, in the order of rounds.
        rank: the number of directions; cut to clients − 1.
        own_weight, blur: of the denoising.

    Returns:
        combinations [N, k].
    """
    means = client_means(clients)
    newest = newest_rows(clients)
    scores = scores_of(classifiers)[:, :rank]
    span = deltas.span(means.T @ scores)
    mixing, deviations = span.axes()
    if not len(deviations):
        return means.T @ scores
    latents = span.products @ mixing / deviations
    strength = calibrate_strength(latents, clients, newest, schedule, own_weight, seed)
    denoised = regenerate(
        latents[newest],
        FiniteSetDenoiser(latents, schedule, blur),
        schedule,
        torch_generator(seed, "directions"),
        mode="tweedie",
        strength=strength,
        draws=64,
    )
    gathered: Tensor = torch.linalg.qr(denoised - denoised.mean(0)).Q
    return means.T @ gathered
