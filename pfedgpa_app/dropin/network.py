"""The tensors of nodes' networks: which are generated, and what becomes of the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, RecordDict
from torch import Tensor

from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights, finite
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server
from pfedgpa_app.methods.pfedgpa import PFedGPAState
from pfedgpa_app.server.screening import checked, too_large


class Network:
    """The tensors of the nodes' network: those that are generated, and others.

    Attributes:
        expected: {name: tensor} of the network at the start.
        generated: the tensors of ``expected`` that are generated.
        others: the newest values of the tensors that are not generated.
    """

    def __init__(self, initial: ArrayRecord, counted_by: str, loss_key: str) -> None:
        """Take the tensors from the ``initial`` arrays.

        Args:
            counted_by: the metric with a node's number of examples.
            loss_key: the metric with its training loss.

        Raises:
            ConfigError: the arrays are no tensors of torch's, or none can be generated.
        """
        self._counted_by, self._loss_key = counted_by, loss_key
        try:
            self.expected = dict(initial.to_torch_state_dict())
        except (TypeError, ValueError) as error:  # types that NumPy has and torch has not
            raise ConfigError(f"initial_arrays: torch cannot hold them: {error}") from error
        self.generated = {name: t for name, t in self.expected.items() if is_generated(t)}
        self.others = {name: t for name, t in self.expected.items() if name not in self.generated}
        if not self.generated:
            raise ConfigError(
                "initial_arrays: they contain no finite floating-point tensor to generate"
            )

    def record(self, generated: Weights) -> ArrayRecord:
        """A whole network of ``generated`` tensors and the others, in the network's order."""
        every = generated | self.others
        return ArrayRecord({name: every[name] for name in self.expected})

    def with_mean(self, generated: Weights) -> Weights:
        """``generated`` tensors and the others that have a mean."""
        return generated | {name: t for name, t in self.others.items() if has_mean(t)}

    def upload(self, content: RecordDict) -> tuple[Upload | None, str]:
        """The upload in a reply and "", or None and what is wrong with the reply."""
        arrays = list(content.array_records.values())
        if len(arrays) != 1:
            return None, f"sent {len(arrays)} array records, not 1"
        weights, wrong = checked(arrays[0], self.expected)
        if weights is None:
            return None, wrong
        [metrics] = content.metric_records.values()
        examples: Any = metrics[self._counted_by]
        loss: Any = metrics.get(self._loss_key)
        told = float(loss) if isinstance(loss, (int, float)) else math.nan
        return Upload(weights, examples, loss=told), ""

    def uploads(
        self, contents: Mapping[int, RecordDict], mean: Weights, limit: float
    ) -> tuple[dict[int, Upload], dict[int, str]]:
        """{node: its upload} for usable uploads, and {node: what is wrong} for the others.

        Args:
            mean: the global mean before the round.
            limit: ``max_upload_norm``.
        """
        uploads: dict[int, Upload] = {}
        unusable: dict[int, str] = {}
        for node, content in contents.items():
            upload, wrong = self.upload(content)
            if upload is None:
                unusable[node] = wrong
            else:
                uploads[node] = upload
        usual = self.with_mean(mean)
        measured = {node: part(upload, usual) for node, upload in uploads.items()}
        for node, wrong in too_large(measured, usual, limit).items():
            unusable[node] = f"{wrong}, and max_upload_norm is {limit:g}"
            del uploads[node]
        return uploads, unusable

    def learn_others(self, uploads: dict[int, Upload]) -> None:
        """Update ``others``: their means over ``uploads``, else those of the largest client."""
        largest = max(uploads.values(), key=lambda upload: upload.examples)
        averaged = [name for name, tensor in self.others.items() if has_mean(tensor)]
        means = weighted_mean({node: part(upload, averaged) for node, upload in uploads.items()})
        self.others = {name: means.get(name, largest.weights[name]) for name in self.others}


def is_generated(tensor: Tensor) -> bool:
    """Whether a tensor is generated: if it is floating-point, not empty and finite."""
    return tensor.is_floating_point() and tensor.numel() > 0 and bool(finite(tensor).all())


def has_mean(tensor: Tensor) -> bool:
    """Whether the tensor's type can hold the mean of two of its numbers."""
    return tensor.is_floating_point() or tensor.is_complex()


def part(upload: Upload, names: Iterable[str]) -> Upload:
    """The upload with the tensors called ``names`` only."""
    return dataclasses.replace(upload, weights={name: upload.weights[name] for name in names})


def whole_networks(
    generated: dict[int, Weights], server: Server, network: Network, nodes: Mapping[int, int]
) -> dict[int, ArrayRecord]:
    """Nodes' whole networks from clients' ``generated`` weights; ``nodes`` is {node id: client}."""
    newest = server.state.buffer.newest()
    made = like_uploads(generated, [newest[client].weights() for client in sorted(newest)])
    common = server.state.global_weights
    kept = server.state.buffer.layout.names if server.state.buffer.layout else ()
    beside = [name for name in common if name not in kept]  # may be tied to what is generated
    ties = {n: m for n in beside for m in kept if torch.equal(common[n], common[m])}
    for mine in made.values():
        mine |= {name: mine[other] for name, other in ties.items()}
    return {node: network.record(made[c]) for node, c in nodes.items() if c in made}


def merge(state: PFedGPAState, client: int, into: int) -> None:
    """Make the uploads of ``client`` those of the client ``into``, which is the same."""
    for entry in state.buffer.entries():
        if entry.client == client:
            state.buffer.forget(entry.server_round, client)
            state.buffer.add(entry.server_round, into, entry.weights())
    if client in state.statistics:
        state.statistics[into] = state.statistics.pop(client)
    state.generated.pop(client, None)


def like_uploads(made: dict[int, Weights], uploads: Sequence[Weights]) -> dict[int, Weights]:
    """Give the generated weights ``made`` the constraints that all ``uploads`` keep.

    Tensors that equal each other in every upload (tied weights) stay equal. A tensor that is
    nowhere negative in any upload (a variance) stays at or above the uploads' minimum.
    """
    least: Weights = {}
    first_of: dict[str, str] = {}
    names = list(uploads[0])
    for i, name in enumerate(names):
        lowest = torch.stack([weights[name] for weights in uploads]).amin(0)
        if bool((lowest >= 0).all()):
            least[name] = lowest
        for first in names[:i]:
            if all(torch.equal(weights[first], weights[name]) for weights in uploads):
                first_of[name] = first
                break
    like = {}
    for client, weights in made.items():
        bounded = weights | {n: weights[n].maximum(lowest) for n, lowest in least.items()}
        like[client] = bounded | {name: bounded[first] for name, first in first_of.items()}
    return like
