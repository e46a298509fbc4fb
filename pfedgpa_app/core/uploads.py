"""The newest uploads as flat vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pfedgpa_app.core.weights import Layout, Weights, all_finite


@dataclass(frozen=True)
class Entry:
    """One upload: ``vector`` [P] float32.

    ``round_mean`` [P], the plain mean of its round's uploads, is kept once the round has left
    the window: without it an old upload could not be told from the population's drift.
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
    """The uploads of the ``window`` newest rounds, and each client's newest, however old.

    ``means`` [P] are what all clients share in a round, of those rounds of which it is known;
    of others the uploads tell.
    """

    window: int
    layout: Layout | None = None
    means: dict[int, Tensor] = field(default_factory=dict)
    _entries: dict[tuple[int, int], Entry] = field(default_factory=dict)
    _stale: dict[int, Entry] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, server_round: int, client: int, weights: Weights) -> None:
        """Keep an upload, instead of an earlier one of the same client and round.

        Raises:
            ValueError: another layout than the first upload's, or numbers that are not finite.
        """
        layout = self.layout or Layout.of(weights)
        vector = layout.flatten(weights)
        if not all_finite(vector):
            raise ValueError(f"upload of client {client} in round {server_round} is not finite")
        self.layout = layout
        self._entries[server_round, client] = Entry(server_round, client, vector, layout)
        self._stale.pop(client, None)

    def forget(self, server_round: int, client: int) -> None:
        """Drop one upload of the window, if it is there."""
        self._entries.pop((server_round, client), None)

    def drop_old(self, server_round: int) -> None:
        """Forget rounds that left the window at ``server_round``, but no client's newest upload."""
        self.drop_before(server_round - self.window + 1)

    def drop_before(self, first: int) -> None:
        """Forget rounds before ``first``, but no client's newest upload."""
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
        """A view of the last tensors only, ``names``; no weight is copied."""
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
        """The window, by round and client."""
        return [self._entries[key] for key in sorted(self._entries)]

    def stack(self) -> tuple[Layout, Tensor, Tensor, Tensor]:
        """The window as (layout, vectors [N, P], rounds [N], clients [N]), by round and client.

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
    """n_i / Σ_i n_i, scaled by a power of two first, lest the sum overflow; it changes no bit."""
    exponent = math.frexp(max(counts))[1]
    scaled = [math.ldexp(count, -exponent) for count in counts]
    return [count / sum(scaled) for count in scaled]


def weighted_mean(uploads: Mapping[int, Upload], uniform: bool = False) -> Weights:
    """Σ_i n_i w_i / Σ_i n_i, or with n_i = 1; summed in float64 in the order of the clients."""
    shares = shares_of([1 if uniform else upload.examples for upload in uploads.values()])
    first = next(iter(uploads.values())).weights
    mean = {}
    for name, like in first.items():
        summed = torch.zeros(like.shape, dtype=torch.promote_types(like.dtype, torch.float64))
        for upload, share in zip(uploads.values(), shares, strict=True):
            if share:  # else 0 · ∞
                summed += upload.weights[name].to(summed.dtype) * share
        mean[name] = summed.to(like.dtype)
    return mean


@dataclass(frozen=True)
class Upload:
    """One client's accepted reply of a round."""

    weights: Weights
    examples: float  # how many training images; other people's clients may weigh otherwise
    labels: list[int] = field(default_factory=list)  # images of each class, if it shares that
    # tempered ones of what it was sent and of what else it tried, if it was asked and has images
    validation_losses: list[list[float]] = field(default_factory=list)
    loss: float = math.nan  # mean training loss in the round; NaN where it was not told
