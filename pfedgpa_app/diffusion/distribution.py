"""Learn the distribution of clients' weights, and make each client its own weights from it."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.uploads import Buffer
from pfedgpa_app.core.weights import Layout, Weights
from pfedgpa_app.diffusion.autoencoder import (
    CPU,
    Autoencoder,
    Deltas,
    LayeredAutoencoder,
    LinearAutoencoder,
    remove_drift,
)
from pfedgpa_app.diffusion.convolutional import ConvolutionalAutoencoder, ConvolutionalSettings
from pfedgpa_app.diffusion.denoiser import Denoiser, NetworkDenoiser
from pfedgpa_app.diffusion.directions import (
    Likeness,
    client_means,
    directions_of_likeness,
    newest_rows,
    principal_directions,
    scores_of,
    shared_directions,
)
from pfedgpa_app.diffusion.inversion import calibrate_strength, guided, own_weight_of, regenerate
from pfedgpa_app.diffusion.network import (
    Progress,
    closed_form,
    fit_network,
    one_thread,
    silent,
    stacked_descriptors,
)
from pfedgpa_app.diffusion.rank import choose_rank
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.diffusion.settings import DiffusionSettings

_FURTHER = 4.0  # the most that a first round's latents are scaled up by


def likeness_of(buffer: Buffer, rule: str, seed: int) -> Likeness:
    """Compute which clients are alike from a buffer's uploads, which may be of the last layer only.

    Raises:
        ValueError: nothing is buffered, or there is no such rank rule.
    """
    layout, vectors, rounds, clients = buffer.stack()
    deltas, head = remove_drift(vectors, rounds, clients), layout.classifier()
    classifiers = deltas.gram(client_means(clients).T, head)
    rank = choose_rank(rule, deltas, head, classifiers, clients, seed)
    scores = scores_of(classifiers)
    return Likeness(rank, dict(zip(clients.unique().tolist(), scores, strict=True)))


@dataclass
class Distribution:
    """A learned distribution of clients' weights, also for clients that it was not learned from.

    Attributes:
        settings, seed: the settings and the seed that it was learned with.
        anchor [P]: the population's newest mean, to which decoded deltas are added.
        latents [N, k], clients [N], rounds [N]: the uploads that it was learned from.
        strength: t0, as given or as calibrated.
    """

    settings: DiffusionSettings
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
        """The noise schedule."""
        return Schedule(self.settings.diffusion_steps, self.settings.schedule)

    @property
    def rank(self) -> int:
        """The number of latent dimensions; fewer than asked for if the uploads span fewer."""
        return self.latents.shape[1]

    def _seen(self, weights: dict[int, Weights]) -> tuple[Tensor, Tensor]:
        """Encode weights of clients that the distribution may not have seen.

        Returns:
            the latents [M, k], and the rest of the weights that these do not describe [M, P]: the
            clients' own, or 0 at rank 0, where clients share everything.
        """
        vectors = torch.stack([self.layout.flatten(mine) for mine in weights.values()])
        deltas = vectors - self.anchor
        latents = self.autoencoder.encode(deltas)
        left = deltas - self.autoencoder.decode(latents)
        return latents, left if self.rank else torch.zeros_like(left)

    def _decoded(
        self, clients: Iterable[int], latents: Tensor, left: Tensor | float = 0.0
    ) -> dict[int, Weights]:
        vectors = self.autoencoder.decode(latents) + self.anchor + left
        return {c: self.layout.unflatten(v) for c, v in zip(clients, vectors, strict=True)}

    def place(
        self,
        weights: dict[int, Weights],
        strength: int,
        draws: int,
        descriptors: dict[int, Tensor] | None = None,
        *,
        begun: Collection[int] = (),
    ) -> dict[int, Weights]:
        """Denoise the weights of clients that the distribution has never seen.

        The result is their latents' posterior mean after noise of ``strength``, averaged over
        ``draws``.

        Args:
            begun: clients that have trained on from the mean for one round only. Their latents are
                only part of the way out, so they are scaled up to the mean length of the learned
                latents, at most fourfold: a client that is like none of these goes another way.
        """
        latents, left = self._seen(weights)
        if self.rank:
            far = self.latents.norm(dim=1).mean() / latents.norm(dim=1, keepdim=True)
            new = torch.tensor([client in begun for client in weights])[:, None]
            latents = torch.where(new, latents * far.clamp(1, _FURTHER), latents)
            rng = torch_generator(self.seed, "place")
            denoiser = self._denoiser_of(list(weights), descriptors)
            latents = regenerate(
                latents, denoiser, self.schedule, rng, strength=strength, draws=draws
            )
        return self._decoded(weights, latents, left)

    def _denoiser_of(
        self, clients: Sequence[int], descriptors: dict[int, Tensor] | None
    ) -> Denoiser:
        """The denoiser for the latents of ``clients``, in this order."""
        if not isinstance(self.denoiser, NetworkDenoiser):
            return self.denoiser
        return self.denoiser.of(stacked_descriptors(clients, descriptors), self.settings.guidance)

    def guide(
        self, weights: dict[int, Weights], before: dict[int, Weights], weight: float
    ) -> dict[int, Weights]:
        """Take reverse steps from clients' weights, led by their progress since ``before``.

        The number of steps is ``strength``; ``weight`` is the 1 + ω of eq. 10.
        """
        latents, left = self._seen(weights)
        if self.rank:
            progress = latents - self._seen(before)[0]
            denoiser = self._denoiser_of(list(weights), None)
            latents = guided(latents, progress, denoiser, self.schedule, self.strength, weight)
        return self._decoded(weights, latents, left)


class WeightDistribution(Distribution):
    """A distribution learned from a buffer, with each of its clients' latents.

    Attributes:
        newest: clients with an upload, in rising order; newest_latents [M, k]: the latents of
            their newest uploads.
        own_weight: posterior weight that clients' own uploads keep, as given or as calculated.
    """

    def __init__(
        self,
        buffer: Buffer,
        settings: DiffusionSettings,
        seed: int,
        device: torch.device = CPU,
        descriptors: dict[int, Tensor] | None = None,
        progress: Progress = silent,
        known: Likeness | None = None,
    ) -> None:
        """Fit the distribution to the buffer.

        Args:
            descriptors: of clients, each [d]; only network denoisers use them.
            progress: is called with the share of a network's training that is done.
            known: which clients are alike, by ``likeness_of`` earlier uploads; None to compute it
                from the buffer.

        Raises:
            ValueError: nothing is buffered.
        """
        self.settings, self.seed = settings, seed
        self.layout, vectors, self.rounds, self.clients = buffer.stack()
        deltas = remove_drift(vectors, self.rounds, self.clients, device, buffer.means)
        self.anchor = deltas.means[-1]
        head = self.layout.classifier()
        classifiers = deltas.gram(client_means(self.clients).T, head)
        rank = known.rank if settings.rank is None and known else settings.rank
        if rank is None:
            rank = choose_rank(settings.rank_rule, deltas, head, classifiers, self.clients, seed)
        self.own_weight = settings.own_weight or own_weight_of(len(classifiers), rank)
        self.autoencoder, self.latents = self._encoded(deltas, classifiers, rank, known, device)
        self.newest = sorted(buffer.newest())
        newest = self.autoencoder.encode(_newest_deltas(buffer, deltas))
        self.newest_latents = self._within(newest)
        given = settings.strength
        self.strength = self._calibrated() if given is None else given
        self.denoiser = self._fit(device, descriptors, progress)

    def _calibrated(self) -> int:
        """The t0 at which clients' own uploads keep the posterior weight ``own_weight``."""
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
        """Latents ``newest`` [M, k], those of stale uploads shortened to the window's longest.

        Stale uploads may come from rounds at another learning rate, in which clients differed more.
        """
        if not newest.shape[1]:
            return newest
        fresh = torch.isin(torch.tensor(self.newest), self.clients)[:, None]
        lengths = newest.norm(dim=1, keepdim=True)
        most = self.latents.norm(dim=1).max() / lengths.clamp_min(1e-12)
        return torch.where(fresh, newest, newest * most.clamp_max(1))

    def _encoded(
        self,
        deltas: Deltas,
        classifiers: Tensor,
        rank: int,
        known: Likeness | None,
        device: torch.device,
    ) -> tuple[Autoencoder, Tensor]:
        """Fit the autoencoder; returns it and the uploads' latents [N, k]."""
        settings, seed = self.settings, self.seed
        if settings.autoencoder == "conv" and rank:
            training = ConvolutionalSettings(settings.chunk_latents, settings.autoencoder_steps)
            return ConvolutionalAutoencoder.fit(deltas, self.layout, training, seed, device)
        if not rank:
            return LinearAutoencoder.fit(deltas, torch.zeros(len(deltas), 1).double())
        if settings.directions == "principal":
            combinations = principal_directions(deltas.gram(), rank)
        elif known:
            combinations = directions_of_likeness(self.clients, known, rank)
        else:
            combinations = shared_directions(
                deltas,
                classifiers,
                self.clients,
                rank,
                self.schedule,
                own_weight=self.own_weight,
                blur=settings.latent_noise,
                seed=seed,
            )
        if settings.autoencoder == "layers":
            return LayeredAutoencoder.fit(deltas, self.layout.layers(), combinations)
        return LinearAutoencoder.fit(deltas, combinations)

    def _fit(
        self, device: torch.device, descriptors: dict[int, Tensor] | None, progress: Progress
    ) -> Denoiser:
        settings = self.settings
        exact = closed_form(settings, self.latents, self.schedule)
        if exact is not None:
            return exact
        with one_thread(device):
            fitted = fit_network(
                self.latents,
                self.schedule,
                settings,
                self.seed,
                device,
                self.autoencoder.tokens,
                stacked_descriptors(self.clients.tolist(), descriptors),
                progress,
            )
        return fitted.of(stacked_descriptors(self.newest, descriptors), settings.guidance)

    def generate(
        self,
        mode: str = "tweedie",
        *,
        strength: int | None = None,
        keep: float = 0.0,
        draws: int = 1,
    ) -> dict[int, Weights]:
        """Weights for every client that ever uploaded: invert its newest latent, denoise, decode.

        Args:
            strength: t0; None for the distribution's own. For the others see ``regenerate``.
        """
        latents = self.generate_latents(mode, strength=strength, keep=keep, draws=draws)
        return self._decoded(self.newest, latents)

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
    """Every client's newest upload less its round's drift [M, P], in rising order of clients."""
    place = {server_round: i for i, server_round in enumerate(deltas.rounds)}
    rows = []
    for _, entry in sorted(buffer.newest().items()):
        mean = entry.round_mean  # None while the round is in the window
        rows.append(
            entry.vector - (deltas.means[place[entry.server_round]] if mean is None else mean)
        )
    return torch.stack(rows)
