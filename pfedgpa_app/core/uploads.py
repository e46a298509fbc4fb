"""A client's upload, means of uploads, and a buffer of the newest ones as flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pfedgpa_app.core.weights import Layout, Weights, all_finite


@dataclass(frozen=True)
class Entry:
    """One buffered upload, as a ``vector`` [P] float32.

    ``round_mean`` [P] is what the clients of its round share (the buffer's mean of that round, else
    the plain mean of its uploads). It is kept once the round has left the window: without it an old
    upload could not be told from the drift of all clients.
    """

    server_round: int
    client: int
    vector: Tensor
    layout: Layout
    round_mean: Tensor | None = None

    def weights(self) -> Weights:
        """The upload as named tensors."""
        return self.layout.unflatten(self.vector)


@dataclass
class Buffer:
    """The uploads of the ``window`` newest rounds, and each client's newest upload, however old.

    ``means`` {round: [P]} holds what all clients share in a round, for the rounds where that is
    known; for the others it is found from the uploads.
    """

    window: int
    layout: Layout | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    _entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    _stale: dict[int, Entry] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, server_round: int, client: int, weights: Weights) -> None:
        """Add an upload; it replaces an earlier one of the same client and round.

        Raises:
            ValueError: its layout is not the first upload's, or some of its numbers are not finite.
        """
        layout = self.layout or Layout.of(weights)
        vector = layout.flatten(weights)
        if not all_finite(vector):
            raise ValueError(f"upload of client {client} in round {server_round} is not finite")
        self.layout = layout
        self._entries[server_round, client] = Entry(server_round, client, vector, layout)
        self._stale.pop(client, None)

    def forget(self, server_round: int, client: int) -> None:
        """Drop one upload from the window, if it is there."""
        self._entries.pop((server_round, client), None)

    def drop_old(self, server_round: int) -> None:
        """Drop rounds that left the window at ``server_round``, but no client's newest upload."""
        self.drop_before(server_round - self.window + 1)

    def drop_before(self, first: int) -> None:
        """Drop rounds before ``first``, but no client's newest upload."""
        newest = self.newest()
        leaving: dict[int, list[Entry]] = {}
        for (r, _), entry in sorted(self._entries.items()):
            if r < first:
                leaving.setdefault(r, []).append(entry)
        for r, entries in leaving.items():
            kept = [entry for entry in entries if newest[entry.client] is entry]
            mean = self.means.pop(r, None)
            if kept:
                if mean is None:
                    mean = torch.stack([entry.vector for entry in entries]).mean(0)
                for entry in kept:
                    self._stale[entry.client] = replace(entry, round_mean=mean)
            for entry in entries:
                del self._entries[r, entry.client]

    def last(self, names: Sequence[str]) -> Buffer:
        """Return a view of the last tensors only, those called ``names``; no weight is copied."""
        view = Buffer(self.window)
        if self.layout is None:
            return view
        view.layout, part = self.layout.last(names)

        def cut(entry: Entry) -> Entry:
            mean = None if entry.round_mean is None else entry.round_mean[part]
            assert view.layout is not None
            return replace(entry, vector=entry.vector[part], layout=view.layout, round_mean=mean)

        view.means = {r: mean[part] for r, mean in self.means.items()}
        view._entries = {key: cut(entry) for key, entry in self._entries.items()}
        view._stale = {key: cut(entry) for key, entry in self._stale.items()}
        return view

    def newest(self) -> dict[int, Entry]:
        """Each client's newest upload, keyed by client."""
        newest = dict(self._stale)
        for (_, client), entry in sorted(self._entries.items()):
            newest[client] = entry
        return newest

    def entries(self) -> list[Entry]:
        """Return the window's uploads, ordered by round and client."""
        return [self._entries[key] for key in sorted(self._entries)]

    def stack(self) -> tuple[Layout, Tensor, Tensor, Tensor]:
        """Return the window as (layout, vectors [N, P], rounds [N], clients [N]).

        Uploads are ordered by round and client.

        Raises:
            ValueError: nothing is buffered.
        """
        entries = self.entries()
        if self.layout is None or not entries:
            raise ValueError("no uploads are buffered")
        return (
            self.layout,
            torch.stack([e.vector for e in entries]),
            torch.tensor([e.server_round for e in entries]),
            torch.tensor([e.client for e in entries]),
        )


def shares_of(counts: Sequence[float]) -> list[float]:
    """Return each count's share of their sum, n_i / Σ_j n_j.

    Counts are scaled by a power of two first: the sum cannot overflow, and no bit changes.
    """
    exponent = math.frexp(max(counts))[1]
    scaled = [math.ldexp(count, -exponent) for count in counts]
    return [count / sum(scaled) for count in scaled]


def weighted_mean(uploads: Mapping[int, Upload], uniform: bool = False) -> Weights:
    """Return Σ_i n_i w_i / Σ_i n_i, with n_i the examples of upload i, or 1 if ``uniform``.

    It is summed in float64, in the order of the clients.
    """
    shares = shares_of([1 if uniform else upload.examples for upload in uploads.values()])
    first = next(iter(uploads.values())).weights
    mean = {}
    for name, like in first.items():
        summed = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float64))
        for upload, share in zip(uploads.values(), shares, strict=True):
            if share:  # a share of 0 would make NaN of ∞
                summed += upload.weights[name].to(summed.dtype) * share
        mean[name] = summed.to(like.dtype)
    return mean


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply of a round."""

    weights: Weights
    examples: float  # training images; foreign clients may send another weight
    labels: list[int] = field(default_factory=list)  # images of each class, if shared
    # tempered losses of the weights it was sent, then of any reference; empty if it was not asked
    # or has no validation images
    validation_losses: list[list[float]] = field(default_factory=list)
    loss: float = math.nan  # mean training loss in the round; NaN if not sent
