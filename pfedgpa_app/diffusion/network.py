"""Fit a denoiser: choose a closed form, or build and train a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfedgpa_app.core.randomness import seeded, torch_generator
from pfedgpa_app.core.replay import Replayed
from pfedgpa_app.diffusion.denoiser import (
    Denoiser,
    FiniteSetDenoiser,
    GaussianDenoiser,
    NetworkDenoiser,
    ResidualMLP,
    TokenTransformer,
)
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.diffusion.settings import DiffusionSettings

Progress = Callable[[float], None]  # is called with the share that is done


def silent(share: float) -> None:
    """A ``Progress`` that does nothing."""


STEP_SECONDS = {"mlp": 0.004, "transformer": 0.04}  # of a training step on a CPU
_HIDDEN = 0.1  # share of latents whose descriptors are hidden (classifier-free guidance)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Limit torch to one thread on a CPU: contended threads make small layers up to 20 × slower."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def closed_form(
    settings: DiffusionSettings, latents: Tensor, schedule: Schedule
) -> Denoiser | None:
    """The closed-form denoiser of latents [N, k]; None if the settings ask for a network."""
    if not latents.shape[1] or settings.denoiser == "gaussian":
        return GaussianDenoiser.fit(latents, schedule)
    if settings.denoiser == "finite-set":
        return FiniteSetDenoiser(latents, schedule, blur=settings.latent_noise)
    return None


def new_network(
    settings: DiffusionSettings, dimensions: int, tokens: tuple[int, int], descriptor: int = 0
) -> ResidualMLP | TokenTransformer:
    """The untrained network that ``settings.denoiser`` names."""
    shape = settings.width, settings.blocks, settings.diffusion_steps, descriptor
    if settings.denoiser == "transformer":
        return TokenTransformer(tokens, *shape)
    return ResidualMLP(dimensions, *shape)


def stacked_descriptors(
    clients: Sequence[int], descriptors: dict[int, Tensor] | None
) -> Tensor | None:
    """Clients' descriptors [M, d], NaN for a client without one; None if there are none at all."""
    if not descriptors:
        return None
    unknown = torch.full_like(next(iter(descriptors.values())), torch.nan)
    return torch.stack([descriptors.get(client, unknown) for client in clients])


def fit_network(
    latents: Tensor,
    schedule: Schedule,
    settings: DiffusionSettings,
    seed: int,
    device: torch.device,
    tokens: tuple[int, int] = (1, 1),
    descriptors: Tensor | None = None,
    progress: Progress = silent,
) -> NetworkDenoiser:
    """Train a residual MLP, or a transformer over ``tokens``, by AdamW with one cycle and EMA.

    Args:
        latents: [N, k] at unit variance; their order does not matter.
        tokens: the autoencoder's tokens: their number and the numbers in each.
        descriptors: of each latent's client [N, d]; a share of the drawn ones is hidden.
        progress: is called after each step.
    """
    generator = torch_generator(seed, "fit")
    order = sorted_by_content(latents)
    latents = latents[order].to(device)
    if descriptors is not None:
        descriptors = descriptors[order].to(device)
    with seeded(int(torch.randint(2**31, (1,), generator=generator))):
        descriptor = 0 if descriptors is None else descriptors.shape[1]
        network = new_network(settings, latents.shape[1], tokens, descriptor).to(device)
    alpha_bar, noise = schedule.alpha_bar.float().to(device), settings.latent_noise
    (n, k), described = latents.shape, descriptors is not None

    def draw() -> list[Tensor]:
        return _draw(settings.fit_batch_size, n, k, len(alpha_bar), described, generator)

    def loss(drawn: Sequence[Tensor]) -> Tensor:
        return denoising_loss(network, latents, noise, descriptors, alpha_bar, drawn)

    trained = _trained(network, loss, draw, settings, device, progress)
    return NetworkDenoiser(trained.cpu(), schedule)  # latents are few: a CPU will do


def _trained(
    network: nn.Module,
    loss: Callable[[Sequence[Tensor]], Tensor],
    draw: Callable[[], list[Tensor]],
    settings: DiffusionSettings,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Train ``network`` on ``loss``; returns it with the moving average of its weights."""
    rate, steps = settings.fit_learning_rate, settings.fit_steps
    weights = _in_one(network)  # faster than a step over many small tensors
    average = weights.detach().clone()
    optimiser = torch.optim.AdamW([weights], rate, fused=True)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(2, steps))
    drawn = draw()
    held = [tensor.to(device) for tensor in drawn]

    def gradients() -> None:
        optimiser.zero_grad(set_to_none=False)
        loss(held).backward()

    go_back = Replayed(gradients, device)
    for step in range(steps):
        for mine, new in zip(held, drawn if step == 0 else draw(), strict=True):
            mine.copy_(new)
        go_back()
        optimiser.step()
        cycle.step()
        # early weights must not linger in a short training
        decay = min(settings.ema, (1 + step) / (10 + step)) if step else 0.0
        average.lerp_(weights.detach(), 1 - decay)
        progress((step + 1) / steps)
    nn.utils.vector_to_parameters(average, network.parameters())
    network.zero_grad()
    return network


def _in_one(network: nn.Module) -> nn.Parameter:
    """All weights of a network as one parameter [P]; its own weights and gradients become views."""
    own = list(network.parameters())
    every = nn.Parameter(nn.utils.parameters_to_vector(own).detach())
    every.grad = torch.zeros_like(every)
    sizes = [mine.numel() for mine in own]
    parts = zip(every.data.split(sizes), every.grad.split(sizes), strict=True)
    for mine, (values, gradient) in zip(own, parts, strict=True):
        mine.data, mine.grad = values.view_as(mine), gradient.view_as(mine)
    return every


def _draw(
    batch: int, latents: int, numbers: int, times: int, described: bool, generator: torch.Generator
) -> list[Tensor]:
    """Draw the random numbers of a training step on N = ``latents`` of k = ``numbers`` each.

    Args:
        batch: B.
        times: T + 1.

    Returns:
        rows [B], times 1..T [B], jitter and noise [2, B, k], and, if latents are ``described``,
        a uniform number for each [B, 1].
    """
    drawn = [
        torch.randint(latents, (batch,), generator=generator),
        torch.randint(1, times, (batch,), generator=generator),
        torch.randn(2, batch, numbers, generator=generator),
    ]
    return [*drawn, torch.rand(batch, 1, generator=generator)] if described else drawn


def denoising_loss(
    network: nn.Module,
    latents: Tensor,
    noise: float,
    descriptors: Tensor | None,
    alpha_bar: Tensor,
    drawn: Sequence[Tensor],
) -> Tensor:
    """The DDPM objective in its v-form on latents [N, k], with the numbers that ``_draw`` drew.

    E‖v − v_φ(√ᾱ_t z + √(1−ᾱ_t) ε, t)‖², with t uniform in 1..T and z a latent plus augmentation.

    Args:
        noise: deviation of the augmentation.
        alpha_bar: [T + 1].
    """
    rows, t, (jitter, eps) = drawn[0], drawn[1], drawn[2]
    z = latents[rows] + noise * jitter
    signal, sigma = alpha_bar[t].sqrt()[:, None], (1 - alpha_bar[t]).sqrt()[:, None]
    known = None
    if descriptors is not None:
        known = descriptors[rows].masked_fill(drawn[3] < _HIDDEN, torch.nan)
    v = network(signal * z + sigma * eps, t.float(), known)
    return F.mse_loss(v, signal * eps - sigma * z)


def sorted_by_content(latents: Tensor) -> Tensor:
    """The order [N] that sorts latents [N, k] by their numbers, not by their clients."""
    order = torch.arange(len(latents))
    for column in range(latents.shape[1] - 1, -1, -1):
        order = order[latents[order, column].argsort(stable=True)]
    return order
