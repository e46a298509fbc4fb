"""pFedHN: a hypernetwork."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.methods import METHODS
from pfedgpa_app.methods.pfedhn import Hypernetwork, PFedHN, sgd_coefficients
from pfedgpa_app.models.networks import weights_of
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    deep,
    linear,
    near,
    train,
)


@by_hand
class TestOneStepByHand:
    def test_pfedhn_clips(self) -> None:
        # the gradient (−0.5, 0.5) has the norm 0.707107: at most 0.1 of it is left
        clip: dict[str, Any] = {"pfedhn.clip": 0.1}
        uploaded, _, _ = train("pfedhn", linear(), {"1.weight": column(0, 0)}, **clip)
        assert near(uploaded["1.weight"], 0.070711, -0.070711)

    def test_pfedhn(self) -> None:
        uploaded, kept, _ = train("pfedhn", linear(), {"1.weight": column(1, -1)})
        assert near(uploaded["1.weight"], 1.119203, -1.119203)
        assert not kept


class TestHypernetwork:
    def test_coefficients_are_sgd(self) -> None:
        draws = torch.Generator().manual_seed(0)
        gradients = torch.randn(5, 3, generator=draws)
        parameter = nn.Parameter(torch.randn(3, generator=draws))
        start = parameter.detach().clone()
        optimiser = torch.optim.SGD([parameter], lr=0.1, momentum=0.9, weight_decay=0.01)
        for gradient in gradients:
            parameter.grad = gradient
            optimiser.step()
        rows = torch.from_numpy(sgd_coefficients(5, 0.1, 0.9, 0.01)).float()
        known = torch.stack([start, torch.zeros(3), *gradients])
        torch.testing.assert_close(rows[0] @ known, parameter.detach())
        velocity = optimiser.state[parameter]["momentum_buffer"]
        torch.testing.assert_close(rows[1] @ known, velocity)

    def test_the_update_is_the_chain_rule(self) -> None:
        """One plain inner step: Δθ = η∇L(θ), so that the server's step is a step on L∘h."""
        rate, inner = 0.1, 0.05
        more: dict[str, Any] = {
            "pfedhn.hidden": 7,
            "pfedhn.hidden-layers": 1,
            "pfedhn.server-momentum": 0.0,
        }
        more |= {"pfedhn.server-learning-rate": rate, "pfedhn.server-weight-decay": 0.0}
        config = configured(method="pfedhn", num_clients=3, **more)
        initial = weights_of(deep(0, 0, 0))
        method = PFedHN(config, PFedHN.begin(config, initial))
        reference = _copy(method.state.network)

        def loss(theta: Tensor) -> Tensor:
            return (theta - torch.arange(3.0)).square().sum()

        theta = method.state.made[1].clone().requires_grad_()
        [gradient] = torch.autograd.grad(loss(theta), theta)
        moved = (theta - inner * gradient).detach()
        method.aggregate(1, {1: Upload(_unflatten(moved, initial), 60)})

        composed = loss(reference(torch.tensor([1]))[0])
        parameters = list(reference.parameters())
        for p, g in zip(parameters, torch.autograd.grad(composed, parameters), strict=True):
            p.data -= rate * inner * g
        for ours, theirs in zip(method.state.network.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)

    @pytest.mark.parametrize("clip", [50.0, 0.01])
    def test_a_round_is_a_step_for_each_client_in_turn(self, clip: float) -> None:
        """Against torch's SGD, clipping and autograd, gradients taken at the round's start."""
        more: dict[str, Any] = {"pfedhn.hidden": 5, "pfedhn.clip": clip}
        config = configured(method="pfedhn", num_clients=4, **more)
        initial = weights_of(deep(0, 0, 0))
        method = PFedHN(config, PFedHN.begin(config, initial))
        live = _copy(method.state.network)
        optimiser = torch.optim.SGD(live.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-3)
        draws = torch.Generator().manual_seed(1)
        for number in (1, 2):  # the velocity goes on from round to round
            frozen, uploads = _copy(live), {}
            for client in (0, 2, 3):
                back = torch.randn(3, generator=draws)
                uploads[client] = Upload(_unflatten(back, initial), 60 + client)
                theta = frozen(torch.tensor([client]))[0]
                objective = ((theta - back).detach() * theta).sum()
                gradients = torch.autograd.grad(objective, list(frozen.parameters()))
                for p, g in zip(live.parameters(), gradients, strict=True):
                    p.grad = g
                nn.utils.clip_grad_norm_(live.parameters(), clip)
                optimiser.step()
            method.aggregate(number, uploads)
            for ours, theirs in zip(
                method.state.network.parameters(), live.parameters(), strict=True
            ):
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
            made = _flatten(method.download(1))
            torch.testing.assert_close(
                made, live(torch.tensor([1]))[0].detach(), atol=1e-5, rtol=1e-4
            )


def _copy(network: Hypernetwork) -> Hypernetwork:
    sizes = network.embeddings.num_embeddings, network.output.out_features
    own = replace(
        configured(method="pfedhn").of(METHODS["pfedhn"].settings),
        hidden=network.output.in_features,
        hidden_layers=len(network.trunk) // 2,
    )
    copy = Hypernetwork(*sizes, own)
    copy.load_state_dict(network.state_dict())
    return copy


def _flatten(named: Weights) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in named.values()])


def _unflatten(vector: Tensor, like: Weights) -> Weights:
    parts = vector.split([tensor.numel() for tensor in like.values()])
    return {n: part.view_as(t) for (n, t), part in zip(like.items(), parts, strict=True)}
