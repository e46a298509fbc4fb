"""Clustered federated learning (Sattler et al. 2020, Algorithm 3): split clusters that disagree.

"Clustered Federated Learning: Model-Agnostic Distributed Multi-Task Optimization under Privacy
Constraints", arXiv 1910.01991.

shared: all weights, within a cluster · kept: nothing · client: as FedAvg, from its cluster's
weights · server: each cluster's mean, weighted by training images; where a cluster has settled
(‖mean update‖ < ε₁) while a client still pulls (max ‖update‖ > ε₂), it is split in two by the
cosines between its clients' updates, recursively · evaluated: the cluster's weights.

The authors' code cuts by complete linkage, the default; the paper's Algorithm 1, which minimises
the largest cosine across the cut, is single linkage. A cluster is split only once every member has
sent an update since the last split, so that clients that were not sampled are not sorted blindly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Layout, Weights, is_statistic
from pfedgpa_app.methods.base import Method


@dataclass(frozen=True)
class ClusteredSettings(MethodSettings):
    """When to split, and how."""

    eps1: float = setting(
        0.4,
        "ε₁: below this norm of its mean update, a cluster has settled",
        low=0,
        grid=(0.4, 0.8, 1.6),
    )
    eps2: float = setting(
        1.6,
        "ε₂: above this norm of its update, a client still pulls away",
        low=0,
        grid=(0.4, 0.8, 1.6),
    )
    first_round: int = setting(20, "no split before this round", low=1)
    linkage: str = setting(
        "complete",
        "linkage of the clustering that splits a cluster in two",
        choices=("complete", "single", "average"),
    )


@dataclass
class Cluster:
    """Clients that share weights, and their newest updates as vectors [P]."""

    members: list[int]
    weights: Weights
    updates: dict[int, Tensor] = field(default_factory=dict)
    examples: dict[int, float] = field(default_factory=dict)


def bipartition(updates: Tensor, linkage: str) -> Tensor:
    """Divide the updates [n, P] in two by their cosines; returns the side of each, 0 or 1 [n]."""
    from sklearn.cluster import AgglomerativeClustering  # imported here: clients do without it

    unit = updates / updates.norm(dim=1, keepdim=True).clamp_min(1e-12)
    distance = (1 - unit @ unit.T).clamp_(0, 2).fill_diagonal_(0)
    tree = AgglomerativeClustering(n_clusters=2, metric="precomputed", linkage=linkage)
    return torch.from_numpy(tree.fit_predict(distance.double().numpy()))


class ClusteredFL(Method[list[Cluster]]):
    """FedAvg within clusters, which are split where their clients disagree."""

    title = "clustered FL"
    settings = ClusteredSettings
    tuned = ("eps2", "eps1")

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> list[Cluster]:
        return [Cluster(list(range(config.initial_clients)), initial)]

    def expected_upload(self) -> Weights:
        return self.state[0].weights

    def download(self, client: int) -> Weights:
        """The weights of the client's cluster; of the largest one for a client that joins."""
        largest = max(self.state, key=lambda cluster: len(cluster.members))
        return next((c.weights for c in self.state if client in c.members), largest.weights)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        clusters = []
        for cluster in self.state:
            here = {i: upload for i, upload in uploads.items() if i in cluster.members}
            if here:
                # an update is what the optimiser did, which running statistics are not
                trained = {n: w for n, w in cluster.weights.items() if not is_statistic(n)}
                layout = Layout.of(trained)
                before = layout.flatten(trained)
                for i, upload in here.items():
                    after = {n: upload.weights[n] for n in trained}
                    cluster.updates[i] = layout.flatten(after) - before
                    cluster.examples[i] = upload.examples
                cluster.weights = weighted_mean(here)
            clusters += self._split(cluster, server_round)
        self.state[:] = clusters

    def report(self) -> dict[str, Any]:
        return {"clusters": [cluster.members for cluster in self.state]}

    def _split(self, cluster: Cluster, server_round: int) -> list[Cluster]:
        """The cluster, or the two clusters that it is split into."""
        own, known = self.config.of(ClusteredSettings), sorted(cluster.updates)
        if server_round < own.first_round or len(known) < 3 or known != sorted(cluster.members):
            return [cluster]
        updates = torch.stack([cluster.updates[i] for i in known])
        shares = torch.tensor([cluster.examples[i] for i in known]).to(updates)
        mean = (shares / shares.sum()) @ updates
        if mean.norm() >= own.eps1 or updates.norm(dim=1).max() <= own.eps2:
            return [cluster]
        side = bipartition(updates, own.linkage)
        sides = [[i for i, s in zip(known, side.tolist(), strict=True) if s == k] for k in (0, 1)]
        return [Cluster(members, cluster.weights) for members in sides]
