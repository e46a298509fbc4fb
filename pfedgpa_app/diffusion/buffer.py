"""The newest uploads as flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

Weights = dict[str, Tensor]


def finite(tensor: Tensor) -> Tensor:
    """Which of its numbers are finite, also in the float32 of a layout's vectors."""
    return (tensor.float() if tensor.is_floating_point() else tensor).isfinite()


@dataclass(frozen=True)
class Layout:
    """How named tensors lie in one vector, in the order of the names."""

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, weights: Weights) -> Layout:
        """The layout of ``weights``."""
        tensors = weights.values()
        return cls(tuple(weights), tuple(t.shape for t in tensors), tuple(t.dtype for t in tensors))

    @property
    def sizes(self) -> list[int]:
        """Numbers in each tensor."""
        return [shape.numel() for shape in self.shapes]

    def flatten(self, weights: Weights) -> Tensor:
        """One float32 vector [P].

        Raises:
            ValueError: other names or shapes than the layout's.
        """
        if Layout.of(weights) != self:
            raise ValueError("weights of another layout")
        return torch.cat([weights[name].detach().reshape(-1).float() for name in self.names])

    def unflatten(self, vector: Tensor) -> Weights:
        """The named tensors of ``vector`` [P], as copies."""
        parts = vector.split(self.sizes)
        return {
            name: part.reshape(shape).to(dtype).clone()
            for name, part, shape, dtype in zip(
                self.names, parts, self.shapes, self.dtypes, strict=True
            )
        }

    def last(self, names: Sequence[str]) -> tuple[Layout, slice]:
        """The layout of ``names``, the last ones of this, and where they lie in a vector.

        Raises:
            ValueError: others than the last names in their order.
        """
        first = len(self.names) - len(names)
        if not names or self.names[first:] != tuple(names):
            raise ValueError(f"not the last tensors of {', '.join(self.names)}: {', '.join(names)}")
        part = Layout(self.names[first:], self.shapes[first:], self.dtypes[first:])
        return part, slice(sum(self.sizes[:first]), None)

    def layers(self) -> list[slice]:
        """Where each layer's tensors lie: neighbours that share a name up to its last dot."""
        found: list[slice] = []
        end, before = 0, None
        for name, size in zip(self.names, self.sizes, strict=True):
            layer = name.rpartition(".")[0] or name
            start = found.pop().start if layer == before else end
            end, before = end + size, layer
            found.append(slice(start, end))
        return found

    def head(self) -> slice:
        """Where the last matrix that is not empty lies: a feed-forward network's classifier."""
        end = 0
        found = slice(0, sum(self.sizes))
        for shape, size in zip(self.shapes, self.sizes, strict=True):
            if len(shape) == 2 and size:
                found = slice(end, end + size)
            end += size
        return found


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
    """The uploads of the ``window`` newest rounds, and each client's newest, however old."""

    window: int
    layout: Layout | None = None
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
        if not bool(torch.isfinite(vector).all()):
            raise ValueError(f"upload of client {client} in round {server_round} is not finite")
        self.layout = layout
        self._entries[server_round, client] = Entry(server_round, client, vector, layout)
        self._stale.pop(client, None)

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
            if kept:
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
