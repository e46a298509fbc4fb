"""Cheap ways to make clients' weights from FedAvg's uploads, which generation must beat."""

from __future__ import annotations

import torch

from pfedgpa_app.core.sections import NODES, Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import load_partition
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.generation import (
    UPLOADS,
    PFedGPASettings,
    RememberedState,
    RememberingFedAvg,
)


class FromUploads(Personaliser[RememberedState]):
    """Makes weights from the newest uploads; pFedGPA's settings say how many, and which layers."""

    of = RememberingFedAvg
    settings = PFedGPASettings
    parts = (UPLOADS,)

    @property
    def layers(self) -> int:
        """How many of the last layers are a client's own; 0: all."""
        return self.config.of(PFedGPASettings).layers


class LastUpload(FromUploads):
    """Each client keeps its newest upload, or gets FedAvg's model if it has none (identity)."""

    title = "last upload"

    def personalise(self) -> dict[int, Weights]:
        newest = self.state.last(self.layers).newest()
        own = {client: self.state.whole(client, newest[client].weights()) for client in newest}
        clients = range(self.config.num_clients)
        return {client: own.get(client, self.state.global_weights) for client in clients}


class ClientMean(FromUploads):
    """Each client gets the mean of its uploads in the newest rounds, or else FedAvg's model."""

    title = "client mean"

    def members(self) -> list[list[int]]:
        """For each client, the clients whose uploads are averaged for it."""
        return [[client] for client in range(self.config.num_clients)]

    def personalise(self) -> dict[int, Weights]:
        layout, vectors, _, clients = self.state.last(self.layers).stack()
        weights = {}
        for client, members in enumerate(self.members()):
            rows = torch.isin(clients, torch.tensor(members))
            mean = layout.unflatten(vectors[rows].mean(0)) if rows.any() else {}
            weights[client] = self.state.whole(client, mean) if mean else self.state.global_weights
        return weights


class GroupMean(ClientMean):
    """An oracle, no method: the mean over the client's true hidden group, which no server knows."""

    title = "group mean (analysis only)"
    analysis_only = True

    @classmethod
    def check(cls, config: Config) -> None:
        if config.dataset == NODES:
            raise ConfigError("group-mean: the groups of nodes' own data are unknown")
        if config.partition != "dominant":
            raise ConfigError(
                f"group-mean: partition = {config.partition} has no hidden groups; dominant does"
            )

    def members(self) -> list[list[int]]:
        groups = [split.group for split in load_partition(self.config)]
        return [[j for j, other in enumerate(groups) if other == g] for g in groups]
