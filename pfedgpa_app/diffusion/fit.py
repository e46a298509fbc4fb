"""Learn the distribution of clients' weights; then make each client its own."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from pfedgpa_app.diffusion.autoencoder import (
    Autoencoder,
    Deltas,
    LayeredAutoencoder,
    LinearAutoencoder,
    remove_drift,
)
from pfedgpa_app.diffusion.buffer import Buffer, Layout, Weights
from pfedgpa_app.diffusion.convolutional import ConvolutionalAutoencoder, ConvolutionalSettings
from pfedgpa_app.diffusion.denoiser import (
    Denoiser,
    FiniteSetDenoiser,
    GaussianDenoiser,
    NetworkDenoiser,
    ResidualMLP,
    TokenTransformer,
)
from pfedgpa_app.diffusion.directions import (
    newest_rows,
    principal_directions,
    shared_directions,
)
from pfedgpa_app.diffusion.inversion import (
    calibrate_strength,
    guided,
    own_weight_of,
    regenerate,
)
from pfedgpa_app.diffusion.rank import choose_rank
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.randomness import torch_generator


@dataclass(frozen=True)
class FitSettings:
    """How a weight distribution is learned; see ``PFedGPASettings`` for the meanings."""

    autoencoder: str = "linear"
    chunk_latents: int = 16
    autoencoder_steps: int = 1500
    rank: int | None = None
    rank_rule: str = "widest-gap"
    directions: str = "shared"
    strength: int | None = None
    own_weight: float | None = None
    most_noise: float = 0.5
    denoiser: str = "mlp"
    schedule: str = "linear"
    diffusion_steps: int = 1000
    fit_steps: int = 2000
    fit_batch_size: int = 256
    fit_learning_rate: float = 1e-3
    width: int = 256
    blocks: int = 3
    ema: float = 0.99
    input_noise: float = 0.0
    latent_noise: float = 0.1
    guidance: float = 0.0


Progress = Callable[[float], None]  # is told which share of something is done


def silent(share: float) -> None:
    """Progress that nobody watches."""


_HIDDEN = 0.1  # share of the steps that learn without descriptors (classifier-free guidance)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On the CPU: layers this small run up to twenty times slower on contended threads."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def closed_form(settings: FitSettings, latents: Tensor, schedule: Schedule) -> Denoiser | None:
    """The denoiser of latents [N, k] that needs no training; None where a network is wanted."""
    if not latents.shape[1] or settings.denoiser == "gaussian":
        return GaussianDenoiser.fit(latents, schedule)
    if settings.denoiser == "finite-set":
        return FiniteSetDenoiser(latents, schedule, blur=settings.latent_noise)
    return None


def new_network(
    settings: FitSettings, dimensions: int, tokens: tuple[int, int], descriptor: int = 0
) -> ResidualMLP | TokenTransformer:
    """The untrained network that ``settings.denoiser`` names."""
    shape = settings.width, settings.blocks, settings.diffusion_steps, descriptor
    if settings.denoiser == "transformer":
        return TokenTransformer(tokens, *shape)
    return ResidualMLP(dimensions, *shape)


def described(clients: Sequence[int], descriptors: dict[int, Tensor] | None) -> Tensor | None:
    """Clients' descriptors [M, d], NaN for one of whom nothing is known; None without any."""
    if not descriptors:
        return None
    unknown = torch.full_like(next(iter(descriptors.values())), torch.nan)
    return torch.stack([descriptors.get(client, unknown) for client in clients])


def fit_network(
    latents: Tensor,
    noise: Tensor,
    schedule: Schedule,
    settings: FitSettings,
    seed: int,
    device: torch.device,
    tokens: tuple[int, int] = (1, 1),
    descriptors: Tensor | None = None,
    progress: Progress = silent,
) -> NetworkDenoiser:
    """Train a residual MLP, or a transformer over ``tokens``, by AdamW with one cycle and EMA.

    On the DDPM objective in its v-form:
    E‖v − v_φ(√ᾱ_t z + √(1−ᾱ_t) ε, t)‖², t uniform in 1..T, z a latent plus the augmentation.

    Args:
        latents: [N, k] at unit variance; their order does not matter.
        noise: deviation of the augmentation in each direction [k].
        tokens: k as the autoencoder's tokens.
        descriptors: of each latent's client [N, d], hidden in a share of the steps.
        progress: is told after each step.
    """
    generator = torch_generator(seed, "fit")
    order = torch.arange(len(latents))
    for column in range(latents.shape[1] - 1, -1, -1):  # sorted by content, not by client
        order = order[latents[order, column].argsort(stable=True)]
    latents, noise = latents[order].to(device), noise.to(device)
    if descriptors is not None:
        descriptors = descriptors[order].to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
        descriptor = 0 if descriptors is None else descriptors.shape[1]
        network = new_network(settings, latents.shape[1], tokens, descriptor).to(device)

    def follow(averaged: Any, current: Any, updates: Any) -> None:
        """An average that warms up: early weights must not linger in a short training."""
        decay = min(settings.ema, (1 + int(updates)) / (10 + int(updates)))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    average = AveragedModel(network, multi_avg_fn=follow)
    optimiser = torch.optim.AdamW(network.parameters(), lr=settings.fit_learning_rate)
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.fit_learning_rate, total_steps=max(2, settings.fit_steps)
    )
    alpha_bar = schedule.alpha_bar.float().to(device)
    batch, k = settings.fit_batch_size, latents.shape[1]
    for step in range(settings.fit_steps):
        rows = torch.randint(len(latents), (batch,), generator=generator).to(device)
        t = torch.randint(1, schedule.steps + 1, (batch,), generator=generator).to(device)
        jitter, eps = torch.randn(2, batch, k, generator=generator).to(device)
        z = latents[rows] + noise * jitter
        signal, sigma = alpha_bar[t].sqrt()[:, None], (1 - alpha_bar[t]).sqrt()[:, None]
        known = None
        if descriptors is not None:
            hidden = torch.rand(batch, 1, generator=generator).to(device) < _HIDDEN
            known = descriptors[rows].masked_fill(hidden, torch.nan)
        v = network(signal * z + sigma * eps, t.float(), known)
        optimiser.zero_grad()
        F.mse_loss(v, signal * eps - sigma * z).backward()
        optimiser.step()
        cycle.step()
        average.update_parameters(network)
        progress((step + 1) / settings.fit_steps)
    return NetworkDenoiser(average.module.cpu(), schedule)  # latents are few: generate there


def rank_of(buffer: Buffer, rule: str, seed: int) -> int:
    """The rank that ``rule`` chooses for the uploads of a buffer.

    Raises:
        ValueError: nothing is buffered, or no such rule.
    """
    layout, vectors, rounds, clients = buffer.stack()
    deltas, head = remove_drift(vectors, rounds, clients), layout.head()
    return choose_rank(rule, deltas, head, deltas.gram(head), clients, seed)


@dataclass
class Distribution:
    """A learned distribution of clients' weights, for clients that it need not have seen.

    Attributes:
        settings, seed: what it was learned with.
        anchor [P]: the population's newest mean, to which decoded deltas are added.
        latents [N, k], clients [N], rounds [N]: the uploads that it was learned from.
        strength: t0, as given or as chosen.
    """

    settings: FitSettings
    seed: int
    layout: Layout
    anchor: Tensor
    clients: Tensor
    rounds: Tensor
    autoencoder: Autoencoder
    latents: Tensor
    strength: int
    denoiser: Denoiser

    @functools.cached_property
    def schedule(self) -> Schedule:
        """Of its noise."""
        return Schedule(self.settings.diffusion_steps, self.settings.schedule)

    @property
    def rank(self) -> int:
        """Latent dimensions: less than asked for where uploads span less."""
        return self.latents.shape[1]

    def _latents_of(self, weights: dict[int, Weights]) -> Tensor:
        """Where weights that are no upload of the buffer lie [M, k]."""
        vectors = torch.stack([self.layout.flatten(mine) for mine in weights.values()])
        return self.autoencoder.encode(vectors - self.anchor)

    def _decoded(
        self, clients: Iterable[int], latents: Tensor, residual: Tensor | float = 0.0
    ) -> dict[int, Weights]:
        vectors = self.autoencoder.decode(latents) + residual + self.anchor
        return {c: self.layout.unflatten(v) for c, v in zip(clients, vectors, strict=True)}

    def place(
        self,
        weights: dict[int, Weights],
        strength: int,
        draws: int,
        descriptors: dict[int, Tensor] | None = None,
    ) -> dict[int, Weights]:
        """What the distribution makes of clients' weights that it has never seen.

        Their latents' posterior mean after noise of ``strength``, over ``draws``.
        """
        latents = self._latents_of(weights)
        if self.rank:
            rng = torch_generator(self.seed, "place")
            denoiser = self._denoiser_of(list(weights), descriptors)
            latents = regenerate(
                latents, denoiser, self.schedule, rng, strength=strength, draws=draws
            )
        return self._decoded(weights, latents)

    def _denoiser_of(
        self, clients: Sequence[int], descriptors: dict[int, Tensor] | None
    ) -> Denoiser:
        """The denoiser for clients' latents in this order."""
        if not isinstance(self.denoiser, NetworkDenoiser):
            return self.denoiser
        return self.denoiser.of(described(clients, descriptors), self.settings.guidance)

    def guide(
        self, weights: dict[int, Weights], before: dict[int, Weights], weight: float
    ) -> dict[int, Weights]:
        """Reverse steps from clients' weights, led by how they went there from ``before``.

        So many steps as the calibrated strength; ``weight`` is the 1 + ω of eq. 10.
        """
        latents = self._latents_of(weights)
        if self.rank:
            progress = latents - self._latents_of(before)
            denoiser = self._denoiser_of(list(weights), None)
            latents = guided(latents, progress, denoiser, self.schedule, self.strength, weight)
        return self._decoded(weights, latents)


class WeightDistribution(Distribution):
    """A distribution learned from a buffer, and each of its clients' place in it.

    Attributes:
        newest: clients with an upload, in rising order; newest_latents [M, k]: their newest.
        own_weight: posterior weight that clients' own uploads keep, as given or as chosen.
    """

    def __init__(
        self,
        buffer: Buffer,
        settings: FitSettings,
        seed: int,
        device: str | torch.device = "cpu",
        descriptors: dict[int, Tensor] | None = None,
        progress: Progress = silent,
    ) -> None:
        """Fit the distribution to the buffer.

        Args:
            descriptors: what is known of clients, each [d]; only networks go by it.
            progress: is told how far a network's training is.

        Raises:
            ValueError: nothing is buffered.
        """
        self.settings, self.seed = settings, seed
        self.layout, vectors, self.rounds, self.clients = buffer.stack()
        deltas = remove_drift(vectors, self.rounds, self.clients)
        self.anchor = deltas.means[-1]
        head = self.layout.head()
        head_gram = deltas.gram(head)
        rank = settings.rank or choose_rank(
            settings.rank_rule, deltas, head, head_gram, self.clients, seed
        )
        self.own_weight = settings.own_weight or own_weight_of(len(self.clients.unique()), rank)
        self.autoencoder = self._autoencoder(deltas, head_gram, rank, torch.device(device))
        self.latents = self.autoencoder.encode_all(deltas)
        self.newest = sorted(buffer.newest())
        self._newest_deltas = _newest_deltas(buffer, deltas)
        self.newest_latents = self._within(self.autoencoder.encode(self._newest_deltas))
        given = settings.strength
        self.strength = self._calibrated() if given is None else given
        self.denoiser = self._fit(settings, torch.device(device), descriptors, progress)

    def _calibrated(self) -> int:
        """t0 at which a client's own uploads keep the wanted posterior weight."""
        if not self.rank:
            return 0
        return calibrate_strength(
            self.latents,
            self.clients,
            newest_rows(self.clients),
            self.schedule,
            self.own_weight,
            self.seed,
            self.settings.most_noise,
        )

    def _within(self, newest: Tensor) -> Tensor:
        """Latents [M, k] of ``newest``, those of stale uploads as far out as the window goes.

        They may come from rounds at another learning rate, in which clients differed by more.
        """
        if not newest.shape[1]:
            return newest
        fresh = torch.isin(torch.tensor(self.newest), self.clients)[:, None]
        lengths = newest.norm(dim=1, keepdim=True)
        most = self.latents.norm(dim=1).max() / lengths.clamp_min(1e-12)
        return torch.where(fresh, newest, newest * most.clamp_max(1))

    def _autoencoder(
        self, deltas: Deltas, head_gram: Tensor, rank: int, device: torch.device
    ) -> Autoencoder:
        settings, seed = self.settings, self.seed
        if settings.autoencoder == "conv":
            training = ConvolutionalSettings(
                settings.chunk_latents, settings.autoencoder_steps, input_noise=settings.input_noise
            )
            return ConvolutionalAutoencoder.fit(deltas, self.layout, training, seed, device)
        gram = deltas.gram()
        if settings.directions == "principal":
            combinations = principal_directions(gram, rank)
        else:
            combinations = shared_directions(
                gram,
                head_gram,
                self.clients,
                rank,
                self.schedule,
                own_weight=self.own_weight,
                blur=settings.latent_noise,
                seed=seed,
            )
        if settings.autoencoder == "layers":
            return LayeredAutoencoder.fit(deltas, self.layout.layers(), combinations)
        return LinearAutoencoder.fit(deltas, gram, combinations)

    def _fit(
        self,
        settings: FitSettings,
        device: torch.device,
        descriptors: dict[int, Tensor] | None,
        progress: Progress,
    ) -> Denoiser:
        exact = closed_form(settings, self.latents, self.schedule)
        if exact is not None:
            return exact
        augmentation = self.autoencoder.latent_noise(settings.input_noise) + settings.latent_noise
        with _one_thread(device):
            fitted = fit_network(
                self.latents,
                augmentation,
                self.schedule,
                settings,
                self.seed,
                device,
                self.autoencoder.tokens,
                described(self.clients.tolist(), descriptors),
                progress,
            )
        return fitted.of(described(self.newest, descriptors), settings.guidance)

    def generate(
        self,
        mode: str = "tweedie",
        *,
        strength: int | None = None,
        keep: float = 0.0,
        draws: int = 1,
        residual_keep: float = 0.0,
    ) -> dict[int, Weights]:
        """Weights for every client that ever uploaded: invert its newest latent, denoise, decode.

        Args:
            strength: t0; None: the calibrated one. See ``regenerate`` for the other knobs.
            residual_keep: share of the upload's part outside the latent directions added back.
        """
        latents = self.generate_latents(mode, strength=strength, keep=keep, draws=draws)
        residual: Tensor | float = 0.0
        if residual_keep:
            inside = self.autoencoder.decode(self.newest_latents)
            residual = residual_keep * (self._newest_deltas - inside)
        return self._decoded(self.newest, latents, residual)

    def generate_latents(
        self, mode: str, *, strength: int | None = None, keep: float = 0.0, draws: int = 1
    ) -> Tensor:
        """The latents [M, k] that ``generate`` decodes, in the order of ``newest``."""
        if not self.rank:
            return self.newest_latents
        return regenerate(
            self.newest_latents,
            self.denoiser,
            self.schedule,
            torch_generator(self.seed, "generate", mode),
            mode=mode,
            strength=self.strength if strength is None else strength,
            keep=keep,
            draws=draws,
        )


def _newest_deltas(buffer: Buffer, deltas: Deltas) -> Tensor:
    """Every client's newest upload less its round's mean [M, P], in rising order of clients."""
    place = {server_round: i for i, server_round in enumerate(deltas.rounds)}
    rows = []
    for _, entry in sorted(buffer.newest().items()):
        mean = entry.round_mean  # set once the round has left the window
        rows.append(
            entry.vector - (deltas.means[place[entry.server_round]] if mean is None else mean)
        )
    return torch.stack(rows)
