"""FedProto (Tan et al. 2022, Algorithm 1): clients share what their classes look like.

"FedProto: Federated Prototype Learning across Heterogeneous Clients", arXiv 2105.00243.

shared: prototypes, the mean feature of each class · kept: all weights, on the client · client:
local-epochs of SGD on F_i + λ·‖feature − global prototype of its class‖² (mean over features, as
in the authors' code; classes without a global prototype count nothing), then its own prototypes
over its training images · server: each class's mean, weighted by the images of that class ·
evaluated: the class of the nearest global prototype, or with predict=classifier the client's own
last layer.

The nearest prototype is a linear layer: argmin_k ‖f − C_k‖² = argmax_k 2C_k·f − ‖C_k‖².
The server is told class means of features, which reveal more about the data than counts do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, MethodSettings, listed, setting
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights, last_layers, module_of
from pfedgpa_app.methods.base import OTHER, ClientTask, Method, Trained
from pfedgpa_app.models.networks import head_of, used_after, weight_names, weights_of
from pfedgpa_app.training.evaluation import evaluation_batches

NEVER = -1e9  # the logit of a class of which no client has sent a prototype


@dataclass(frozen=True)
class FedProtoSettings(MethodSettings):
    """How prototypes are used."""

    lam: float = setting(
        1.0, "λ, weight of the distance to the global prototypes", low=0, grid=(0.1, 1.0, 10.0)
    )
    predict: str = setting(
        "prototype",
        "what predicts: the nearest global prototype, or the client's own last layer",
        choices=("prototype", "classifier"),
    )


@dataclass
class Prototypes:
    """Global prototypes [K, D], the images behind each [K], and the last layer's weights' names.

    Prototypes are of the last layer's type.
    """

    means: Tensor
    counts: Tensor
    head: list[str]


def with_features(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The features [B, D] of images x, which enter the last layer, and the logits [B, K]."""
    seen: list[Tensor] = []
    hook = head_of(model).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        logits = model(x)
    finally:
        hook.remove()
    return seen[-1], logits


class FedProto(Method[Prototypes]):
    """Clients share prototypes of classes instead of weights."""

    title = "FedProto"
    settings = FedProtoSettings
    step_sizes = ("lam",)
    sends = OTHER  # class means and counts
    beside = ("counts",)
    adjustable = False  # prototypes do not depend on how frequent classes are
    unused: ClassVar = {"start-from": "its clients are sent prototypes, and no weights"}
    tuned = ("lam",)

    @classmethod
    def check_network(cls, config: Config, network: nn.Module) -> None:
        head, names = head_of(network), last_layers(weight_names(network), 1)
        if not isinstance(head, nn.Linear) or head.bias is None:
            wrong = f"the network's is {type(head).__name__}"
        elif [name.rpartition(".")[2] for name in names] != ["weight", "bias"]:
            wrong = f"clients share of the network's only {listed(names)}"
        elif after := used_after(network, module_of(names[0])):
            wrong = f"the network uses {after} after {module_of(names[0])}"
        else:
            return
        raise ConfigError(
            "fedproto: makes a linear last layer with a bias from its prototypes, but "
            f"{wrong}: give it such a layer (head names another), or leave fedproto out"
        )

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> Prototypes:
        head = last_layers(initial, 1)
        weight = initial[head[0]]
        return Prototypes(torch.zeros_like(weight), torch.zeros(len(weight)), head)

    def expected_upload(self) -> Weights:
        return {"means": self.state.means, "counts": self.state.counts}

    def download(self, client: int) -> Weights:
        return self.expected_upload()

    def evaluation_download(self, client: int) -> Weights:
        if self.config.of(FedProtoSettings).predict == "classifier" or not self.state.counts.any():
            return {}
        means, unseen = self.state.means, self.state.counts == 0
        bias = (-means.float().square().sum(1)).masked_fill(unseen, NEVER)
        bias = bias.to(means).clamp_min(torch.finfo(means.dtype).min)
        return dict(zip(self.state.head, (2 * means, bias), strict=True))

    def evaluation_of(self, client: int, given: Weights) -> Weights:
        return self.evaluation_download(client)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        counts = torch.stack([u.weights["counts"] for u in uploads.values()]).clamp_min(0)
        means = torch.stack([u.weights["means"] for u in uploads.values()])
        total = counts.sum(0)
        mean = (counts[:, :, None] * means).sum(0) / total.clamp_min(1)[:, None]
        shown = total > 0  # other classes keep their prototypes
        self.state.means = torch.where(shown[:, None], mean.to(means), self.state.means)
        self.state.counts = torch.where(shown, total, self.state.counts)

    @classmethod
    def train(cls, task: ClientTask) -> Trained:
        device = next(task.model.parameters()).device
        means, known = task.weights["means"].to(device), (task.weights["counts"] > 0).to(device)
        lam = task.config.of(FedProtoSettings).lam

        def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            features, logits = with_features(model, x)
            apart = (features.float() - means[y].float()).square().mean(1) * known[y]
            loss: Tensor = F.cross_entropy(logits.float(), y) + lam * apart.mean()
            return loss

        task.load(task.state)
        recipes = cls.recipes(task.config, weight_names(task.model), task.round)
        loss = task.sgd(recipes, loss_of=loss_of)
        return Trained(cls.prototypes(task, means), weights_of(task.model), loss)

    @staticmethod
    @torch.no_grad()
    def prototypes(task: ClientTask, like: Tensor) -> Weights:
        """The client's own prototypes, as ``like`` [K, D], and the images behind each [K]."""
        features = torch.cat(
            [
                with_features(task.model, inputs)[0].float()
                for inputs, _ in evaluation_batches(task.model, task.data.train)
            ]
        )
        member = F.one_hot(task.data.train.labels, len(like)).to(features)
        counts = member.sum(0)
        means = member.T @ features / counts.clamp_min(1)[:, None]
        return {"means": means.to(like.dtype).cpu(), "counts": counts.cpu()}

    @staticmethod
    def evaluated(weights: Weights, state: Mapping[str, Tensor]) -> Weights:
        return {**state, **weights}
