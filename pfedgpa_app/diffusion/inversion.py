"""Carry a client's latent into the diffusion model's noise and back.

A perfect inversion that the same model decodes is the identity for any network, so it aggregates
nothing. Aggregation comes from what is left to the model: by the strength t0, the share of
stored noise that is replayed, and the mean of several decodings.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.diffusion.denoiser import Denoiser, FiniteSetDenoiser
from pfedgpa_app.diffusion.schedule import Schedule

Noise = Callable[[int], Tensor]  # rows wanted -> standard normal [rows, k]
_DRAWS = 20  # of noise, to calibrate the strength with
_CODE_NUMBERS = 2**24  # most numbers of stored noise held at a time


@dataclass(frozen=True)
class Journey:
    """How far latents are carried into the noise, and how they are carried back.

    Attributes:
        strength: t0 in 0..T.
        keep: share of the stored noise replayed by ``invert``.
        draws: number of decodings that are averaged.
        ddim_steps: number of steps of ``ddim``, up and down alike.
    """

    strength: int
    keep: float
    draws: int
    ddim_steps: int


Mode = Callable[[Tensor, Denoiser, Schedule, Noise, Journey], Tensor]


def regenerate(
    latents: Tensor,
    denoiser: Denoiser,
    schedule: Schedule,
    generator: torch.Generator,
    *,
    mode: str = "tweedie",
    strength: int,
    keep: float = 0.0,
    draws: int = 1,
    ddim_steps: int = 50,
) -> Tensor:
    """Invert and denoise each client's latent; the result has the same shape and dtype.

    All clients share the noise of a draw, so that permuting clients permutes the result and
    equal uploads stay equal. Only ``sample``, which does not start from an upload, draws noise
    for each client.

    Args:
        latents: clean latents [M, k].
        generator: of the noise; on the CPU, whatever the latents' device.
        mode: a name in ``MODES``.
        strength: t0 in 0..T; 0 is the identity. ``sample`` always starts from T.
        keep: share of the stored noise replayed (``invert``).
        draws: number of decodings averaged; ``tweedie`` draws noise in antithetic pairs.

    Raises:
        ValueError: the mode is unknown, or a value is out of range.
    """
    if mode not in MODES:
        raise ValueError(f"no inversion called {mode!r}; there are {', '.join(MODES)}")
    if not 0 <= strength <= schedule.steps or not 0 <= keep <= 1 or draws < 1:
        raise ValueError("must have 0 <= strength <= T, 0 <= keep <= 1 and draws >= 1")
    if strength == 0 and mode != "sample":
        return latents.clone()

    def normal(rows: int) -> Tensor:
        noise = torch.randn(rows, latents.shape[1], generator=generator, dtype=latents.dtype)
        return noise.to(latents.device)

    journey = Journey(strength, keep, draws, ddim_steps)
    return MODES[mode](latents, denoiser, schedule, normal, journey)


def _identity(z: Tensor, _d: Denoiser, _s: Schedule, _n: Noise, _j: Journey) -> Tensor:
    """The latent itself."""
    return z.clone()


def _sample(
    latents: Tensor, denoiser: Denoiser, schedule: Schedule, normal: Noise, journey: Journey
) -> Tensor:
    """Sample from pure noise, without inversion."""
    m, k = latents.shape
    noise = normal(journey.draws * m)
    chains = reverse(noise, denoiser, schedule, schedule.steps, normal)
    return chains.view(journey.draws, m, k).mean(0)


def _tweedie(
    latents: Tensor, denoiser: Denoiser, schedule: Schedule, normal: Noise, journey: Journey
) -> Tensor:
    """Noise to t0, then the posterior mean of z_0 (Tweedie's formula)."""
    draws, t0, (m, k) = journey.draws, journey.strength, latents.shape
    noise = normal((draws + 1) // 2)
    noise = torch.cat([noise, -noise])[:draws] if draws > 1 else noise
    noisy = schedule.add_noise(latents, noise[:, None], t0).view(-1, k)
    clean = schedule.clean(noisy, denoiser(noisy, t0), t0)
    return clean.view(draws, m, k).mean(0)


def _sdedit(
    latents: Tensor, denoiser: Denoiser, schedule: Schedule, normal: Noise, journey: Journey
) -> Tensor:
    """Noise to t0, then run the reverse process with fresh noise (Meng et al. 2022)."""

    def once(start_from: Tensor, shared: Noise) -> Tensor:
        noisy = schedule.add_noise(start_from, shared(0), journey.strength)
        return reverse(noisy, denoiser, schedule, journey.strength, shared)

    return _averaged(latents, normal, journey, once)


def _invert(
    latents: Tensor, denoiser: Denoiser, schedule: Schedule, normal: Noise, journey: Journey
) -> Tensor:
    """DPM-Encoder (Wu & De la Torre 2023, the paper's citation).

    Noise the latent along the forward posterior, store what each reverse step misses, and replay
    the share ``keep`` of it.
    """

    def once(start_from: Tensor, shared: Noise) -> Tensor:
        code = dpm_encode(start_from, denoiser, schedule, journey.strength, shared)
        return dpm_decode(code, denoiser, schedule, keep=journey.keep)

    return _averaged(latents, normal, journey, once)


def _averaged(
    latents: Tensor, normal: Noise, journey: Journey, once: Callable[[Tensor, Noise], Tensor]
) -> Tensor:
    """The mean of ``draws`` journeys, run as many at once as their stored noise allows."""
    m, k = latents.shape
    total = torch.zeros_like(latents)
    at_once = max(1, _CODE_NUMBERS // (journey.strength * m * k))
    for start in range(0, journey.draws, at_once):
        count = min(at_once, journey.draws - start)

        def shared(_: int, count: int = count) -> Tensor:
            return normal(count)[:, None].expand(count, m, k).reshape(-1, k)

        total += once(latents.repeat(count, 1), shared).view(count, m, k).sum(0)
    return total / journey.draws


def reverse(z: Tensor, denoiser: Denoiser, schedule: Schedule, start: int, normal: Noise) -> Tensor:
    """Sample from z_start down to z_0 by DDPM's ancestral steps (the paper's eq. 6, corrected)."""
    for t in range(start, 0, -1):
        z = schedule.reverse_mean(z, denoiser(z, t), t)
        if t > 1:
            z = z + float(schedule.sigma[t]) * normal(len(z))
    return z


def guided(
    latents: Tensor,
    progress: Tensor,
    denoiser: Denoiser,
    schedule: Schedule,
    steps: int,
    weight: float,
) -> Tensor:
    """Take ``steps`` noiseless reverse steps with ε̃ = ε_φ − weight · progress (eq. 10).

    Local progress z(θ_l) − z(θ_{l−1}) stands in for the gradient of the client's log-likelihood,
    along which ε̃ must lead the latent. The sign is missing in the paper's extracted text; with the
    opposite one, denoising would undo what the client learned.
    """
    z = latents
    for t in range(steps, 0, -1):
        z = schedule.reverse_mean(z, denoiser(z, t) - weight * progress, t)
    return z


NoiseCode = tuple[Tensor, list[Tensor]]  # z_t0 and the residuals r_t0, …, r_1


def dpm_encode(
    latents: Tensor,
    denoiser: Denoiser,
    schedule: Schedule,
    strength: int,
    normal: Noise,
) -> NoiseCode:
    """Encode latents by DPM-Encoder: noise them by the true posterior, store what μ_φ misses.

    r_t = z_{t−1} − μ_φ(z_t, t) stands for σ_t u_t and needs no division by σ_1 = 0. The next step
    starts from μ_φ + r_t, as the decoder will compute it, so that rounding errors cannot add up.
    """
    rows = len(latents)
    z = code = schedule.add_noise(latents, normal(rows), strength)
    residuals = []
    for t in range(strength, 0, -1):
        if t == 1:
            target = latents
        else:
            mean = schedule.posterior_mean(z, latents, t)
            target = mean + float(schedule.sigma[t]) * normal(rows)
        predicted = schedule.reverse_mean(z, denoiser(z, t), t)
        residuals.append(target - predicted)
        z = predicted + residuals[-1]
    return code, residuals


def dpm_decode(code: NoiseCode, denoiser: Denoiser, schedule: Schedule, *, keep: float) -> Tensor:
    """Run the reverse process from z_t0, adding the share ``keep`` of each stored residual."""
    z, residuals = code
    for t, residual in zip(range(len(residuals), 0, -1), residuals, strict=True):
        z = schedule.reverse_mean(z, denoiser(z, t), t) + keep * residual
    return z


def _ddim(
    latents: Tensor, denoiser: Denoiser, schedule: Schedule, _: Noise, journey: Journey
) -> Tensor:
    """Go up to t0 by DDIM inversion and down; ε(·, t_1) replaces ε(·, 0), which is undefined."""
    steps = journey.ddim_steps
    times = sorted({max(1, round(journey.strength * (i + 1) / steps)) for i in range(steps)})
    first = times[0]
    eps = denoiser(schedule.signal(first) * latents, first)
    z = schedule.add_noise(latents, eps, first)
    for t, to in itertools.pairwise(times):
        z = schedule.ddim_step(z, denoiser(z, t), t, to)
    down = times[::-1]
    for t, to in zip(down, [*down[1:], 0], strict=True):
        z = schedule.ddim_step(z, denoiser(z, t), t, to)
    return z


MODES: dict[str, Mode] = {
    "identity": _identity,
    "sample": _sample,
    "invert": _invert,
    "ddim": _ddim,
    "sdedit": _sdedit,
    "tweedie": _tweedie,
}


def own_weight_of(clients: int, rank: int) -> float:
    """The posterior weight that clients' own uploads are to keep.

    ``rank`` directions tell rank + 1 kinds of clients apart, with g = clients / (rank + 1) of each
    kind. The weight is the geometric mean of 1, which pools nothing, and 1/g, which makes all
    clients of a kind the same: the more clients a kind has, the more they tell about each other.
    """
    return min(1.0, math.sqrt((rank + 1) / clients))


def calibrate_strength(
    latents: Tensor,
    clients: Tensor,
    newest: Tensor,
    schedule: Schedule,
    own_weight: float,
    seed: int,
    most_noise: float = math.inf,
) -> int:
    """The smallest t0 at which noise hides each client's newest latent well enough among others.

    Well enough means that, under the uploads' own empirical distribution, the posterior weight on
    a client's own uploads falls to ``own_weight`` on average. Where clients are too different for
    that, it is the largest t0 whose noise is at most ``most_noise`` times the signal: latents have
    unit deviation, so more noise would hide what tells any two apart. Needs no data, labels or
    groups.

    Args:
        latents: [N, k]; clients: [N]; newest: rows [M] of each client's newest upload.
    """
    generator = torch_generator(seed, "strength")
    noise = torch.randn(_DRAWS, latents.shape[1], generator=generator, dtype=latents.dtype)
    points = FiniteSetDenoiser(latents, schedule)
    own = (clients[newest][:, None] == clients).to(latents.dtype)

    def weight(t: int) -> float:
        noisy = schedule.add_noise(latents[newest], noise[:, None], t)
        weights = points.weights(noisy.view(-1, latents.shape[1]), t).view(_DRAWS, *own.shape)
        return float((weights * own).sum(2).mean())

    low, high = 1, schedule.last_below(most_noise)  # the weight falls as t rises
    while low < high:
        middle = (low + high) // 2
        if weight(middle) <= own_weight:
            high = middle
        else:
            low = middle + 1
    return low
