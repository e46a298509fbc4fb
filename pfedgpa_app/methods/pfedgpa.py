"""pFedGPA (Lai et al., AAAI 2025, arXiv 2409.05701): generate each client its own weights.

shared: all weights · kept: nothing · client: as FedAvg, from the weights it is sent · server:
learns the distribution of the newest rounds' uploads with a diffusion model, inverts each
client's newest upload into it and denoises · evaluated: the generated weights, before and
after fine-tuning.

The paper has it two ways. By its Algorithm 1 every round ends with generation, and clients train
on from what was generated for them: ``pfedgpa``, in the last rounds. By its experiments' text the
distribution is learned from the last rounds' uploads and weights are generated once:
``pfedgpa-once``. What it leaves open is here FedAvg: the rounds before generation, and the tensors
that are not generated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch

from pfedgpa_app.config import Config
from pfedgpa_app.diffusion.buffer import Buffer
from pfedgpa_app.diffusion.copies import novelty
from pfedgpa_app.diffusion.directions import newest_rows
from pfedgpa_app.diffusion.fit import FitSettings, WeightDistribution, rank_of
from pfedgpa_app.diffusion.rank import RULES
from pfedgpa_app.methods.base import Upload
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.models import Weights, last_layers
from pfedgpa_app.settings import ConfigError, setting
from pfedgpa_app.training import device_for

DENOISERS = ("mlp", "transformer", "gaussian", "finite-set")


@dataclass(frozen=True)
class PFedGPASettings:
    """What pFedGPA's server goes by."""

    generate_from: int | None = setting(
        None, "first round that ends with generation; auto: the last 8 % of the rounds do", low=1
    )
    round_rate: float = setting(
        0.1, "learning rate of rounds that end with generation, in units of the run's", above=0
    )
    momentum: float = setting(
        0.0, "the server's momentum in the rounds before", low=0, high=0.999, grid=(0.0, 0.5, 0.7)
    )
    layers: int = setting(
        0, "so many last layers are generated, the rest is the global mean; 0: everything", low=0
    )
    round_layers: int = setting(0, "the same, at the end of a round that others follow", low=0)
    buffer_rounds: int = setting(20, "uploads of so many newest rounds are learned from", low=1)
    autoencoder: str = setting(
        "linear",
        "the exact linear one, of the whole or of each of its layers, or the paper's convolutional",
        choices=("linear", "layers", "conv"),
    )
    chunk_latents: int = setting(16, "conv: latents for every 16,384 weights", low=1)
    autoencoder_steps: int = setting(1500, "conv: optimiser steps", low=1)
    rank: int | None = setting(None, "latent dimensions; auto: by rank-rule", low=1)
    rank_rule: str = setting(
        "widest-gap", "how clients' mean classifiers tell the rank", choices=RULES
    )
    directions: str = setting(
        "shared",
        "what latents see: what clients with like classifiers share, or principal directions",
        choices=("shared", "principal"),
    )
    inversion: str = setting(
        "tweedie",
        "how an upload is carried through the diffusion model",
        choices=("identity", "sample", "invert", "edit-friendly", "ddim", "sdedit", "tweedie"),
    )
    strength: int | None = setting(
        None, "t0: how far an upload is noised, 0..diffusion-steps, or auto", low=0
    )
    own_weight: float | None = setting(
        None,
        "auto strength: posterior weight left on a client's own uploads; auto: by clients and rank",
        above=0,
        high=1,
    )
    most_noise: float = setting(
        0.5, "auto strength: most noise, in deviations of the unit-variance latents", above=0
    )
    keep: float = setting(0.0, "share of the stored noise replayed by invert", low=0, high=1)
    draws: int = setting(64, "decodings averaged for each client", low=1)
    residual_keep: float = setting(
        0.0, "share of what the autoencoder cannot express that is added back", low=0, high=1
    )
    denoiser: str = setting(
        "mlp", "of the last generation: a trained network, or a closed form", choices=DENOISERS
    )
    round_denoiser: str = setting(
        "finite-set", "of the rounds', which are fitted anew each time", choices=DENOISERS
    )
    schedule: str = setting("linear", "noise schedule", choices=("linear", "cosine"))
    diffusion_steps: int = setting(1000, "T, the length of the noise schedule", low=2)
    fit_steps: int = setting(2000, "optimiser steps of the denoiser", low=1)
    fit_batch_size: int = setting(256, "latents a step", low=1)
    fit_learning_rate: float = setting(1e-3, "peak learning rate of the denoiser", above=0)
    width: int = setting(256, "hidden width of the denoiser", low=1)
    blocks: int = setting(3, "residual blocks of the denoiser", low=1)
    ema: float = setting(0.99, "decay of the averaged denoiser", low=0, high=0.999999)
    input_noise: float = setting(
        0.0, "noise on the uploads in training, in units of their spread", low=0
    )
    descriptor: str = setting(
        "none",
        "what mlp and transformer know of a client: nothing, the class counts that it shares "
        "(share-label-counts), or an embedding learned for it",
        choices=("none", "labels", "learned"),
    )
    join_mode: str = setting(
        "tweedie",
        "clients that join: denoise their uploads, or the paper's reverse steps led by progress",
        choices=("tweedie", "guided"),
    )
    guidance: float = setting(
        0.0, "ω of eq. 9 (descriptors) and of eq. 10 (guided joining)", low=-1
    )
    latent_noise: float = setting(0.1, "noise on the unit-variance latents in training", low=0)


STEP_SECONDS = {"mlp": 0.01, "transformer": 0.06}  # of a denoiser's training on a CPU
# what only rounds that end with generation go by
GENERATING = {
    f"pfedgpa.{name}"
    for name in ("generate-from", "round-rate", "round-layers", "round-denoiser", "momentum")
}


class PFedGPA(FedAvg):
    """FedAvg, maybe with momentum; then generation ends every round, and clients train on from it.

    These last rounds are gentle: at a small learning rate, clients fine-tune, but together with
    those whose weights are like theirs. What they upload differs by far more than its noise, so
    the distribution is learned from these rounds alone.
    """

    title = "pFedGPA"
    settings = PFedGPASettings
    tuned = ("momentum",)
    rounds = "pfedgpa"

    @classmethod
    def overlooks(cls) -> set[str]:
        return GENERATING if cls.rounds == FedAvg.rounds else set()

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.pfedgpa
        if own.strength is not None and own.strength > own.diffusion_steps:
            raise ConfigError(
                f"pfedgpa.strength = {own.strength}: must be at most pfedgpa.diffusion-steps = "
                f"{own.diffusion_steps}"
            )
        if own.descriptor == "labels" and not config.share_label_counts:
            raise ConfigError(
                "pfedgpa.descriptor = labels: clients must share their class counts: "
                "share-label-counts=true"
            )
        if (own.generate_from or 1) > config.num_server_rounds:
            raise ConfigError(
                f"pfedgpa.generate-from = {own.generate_from}: must be at most "
                f"num-server-rounds = {config.num_server_rounds}"
            )

    def download(self, client: int) -> Weights:
        return self.state.generated.get(client, self.state.global_weights)

    @classmethod
    def first_generation(cls, config: Config) -> int:
        """The first round that ends with generation."""
        rounds = config.num_server_rounds
        return config.pfedgpa.generate_from or rounds - math.ceil(0.08 * rounds) + 1

    @classmethod
    def momentum(cls, config: Config, server_round: int) -> float:
        return config.pfedgpa.momentum if server_round < cls.first_generation(config) else 0.0

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        generating = cls.first_generation(config) <= server_round <= config.num_server_rounds
        rate = super().learning_rate(config, server_round)
        return rate * (config.pfedgpa.round_rate if generating else 1)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        first = self.first_generation(self.config)
        if server_round >= first and not self.state.generated:
            self._prepare(first)
        super().aggregate(server_round, uploads)
        if server_round >= first:
            own = self.config.pfedgpa
            fitted = self._fit(own.round_layers, own.round_denoiser)
            self.state.generated = self._whole(self._decoded(fitted))

    def _prepare(self, first: int) -> None:
        """Choose the rank by FedAvg's rounds, and forget them.

        Clients that train on from generated weights differ ever more along the directions that
        generation kept, so that a rank chosen by their uploads would only confirm itself.
        """
        own, buffer = self.config.pfedgpa, self.state.buffer
        if own.rank is None and len(buffer):
            self.state.rank = rank_of(buffer, own.rank_rule, self.config.seed)
        buffer.drop_before(first)

    def personalise(self) -> dict[int, Weights]:
        """Generated weights; a client never seen gets the global ones."""
        common, made = self.state.global_weights, self._whole(self.made)
        return {client: made.get(client, common) for client in range(self.config.num_clients)}

    @classmethod
    def making_seconds(cls, config: Config) -> float:
        return config.pfedgpa.fit_steps * STEP_SECONDS.get(config.pfedgpa.denoiser, 0.0)

    @functools.cached_property
    def made(self) -> dict[int, Weights]:
        """What the last generation makes for every client that ever uploaded."""
        return self._decoded(self.distribution())

    def distribution(self) -> WeightDistribution:
        """The distribution of the newest uploads after the last round; fitted once."""
        if self.state.fitted is None:
            own = self.config.pfedgpa
            self.state.fitted = self._fit(own.layers, own.denoiser)
        return self.state.fitted

    def _fit(self, layers: int, denoiser: str) -> WeightDistribution:
        values = dataclasses.asdict(self.config.pfedgpa) | {"denoiser": denoiser}
        values["rank"] = self.config.pfedgpa.rank or self.state.rank
        names = {f.name for f in dataclasses.fields(FitSettings)}
        return WeightDistribution(
            self._uploads(layers),
            FitSettings(**{k: v for k, v in values.items() if k in names}),
            self.config.seed,
            device_for(self.config.device),
            self._descriptors(),
            self.progress,
        )

    def _descriptors(self) -> dict[int, torch.Tensor] | None:
        """What eq. 9 goes by: class shares, or one-hot names, whose embedding is learned."""
        kind = self.config.pfedgpa.descriptor
        if kind == "labels":
            counts = {c: torch.tensor(n).float() for c, n in self.state.labels.items()}
            return {client: n / n.sum() for client, n in counts.items()}
        if kind == "learned":
            return dict(enumerate(torch.eye(self.config.founders)))
        return None

    def _uploads(self, layers: int) -> Buffer:
        """The buffered uploads, or only their last ``layers``."""
        buffer = self.state.buffer
        if layers:
            buffer = buffer.last(last_layers(self.state.global_weights, layers))
        return buffer

    def _whole(self, made: dict[int, Weights]) -> dict[int, Weights]:
        """Generated tensors, and from the global mean what is not generated."""
        return {client: self.state.global_weights | mine for client, mine in made.items()}

    def _decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        """The generated tensors of every client that ever uploaded."""
        settings = self.config.pfedgpa
        return fitted.generate(
            settings.inversion,
            keep=settings.keep,
            draws=settings.draws,
            residual_keep=settings.residual_keep,
        )

    def admit(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """Where the learned distribution sees them (Algorithm 1, lines 7-14, and eq. 10).

        ``tweedie`` denoises an upload; ``guided`` takes reverse steps from it, led by the
        client's local progress.
        """
        fitted, own = self.distribution(), self.config.pfedgpa
        self.state.labels |= {c: upload.labels for c, upload in uploads.items() if upload.labels}
        names = fitted.layout.names
        given = {c: {n: upload.weights[n] for n in names} for c, upload in uploads.items()}
        if own.join_mode == "guided":
            before = {
                c: {n: self.state.admitted.get(c, self.state.global_weights)[n] for n in names}
                for c in uploads
            }
            made = fitted.guide(given, before, 1 + own.guidance)
        else:
            made = fitted.place(given, fitted.strength, own.draws, self._descriptors())
        self.state.admitted |= {c: self.state.global_weights | mine for c, mine in made.items()}
        return {client: self.state.admitted[client] for client in uploads}

    def reference(self, client: int) -> Weights | None:
        newest = self.state.buffer.newest()
        return newest[client].weights() if client in newest else None

    def report(self) -> dict[str, Any]:
        fitted, entries = self.distribution(), self._uploads(self.config.pfedgpa.layers).entries()
        here = sorted({entry.client for entry in entries})  # with an upload in the window
        generated = [fitted.layout.flatten(self.made[client]) for client in here]
        newest = newest_rows(torch.tensor([entry.client for entry in entries]))
        new = novelty(generated, newest, [entry.vector for entry in entries])
        return {
            "rank": fitted.rank,
            "strength": fitted.strength,
            "distance_to_nearest_upload": round(float(new.nanmean()), 4),
        }


class PFedGPAOnce(PFedGPA):
    """Generation once, after the last of FedAvg's rounds."""

    title = "pFedGPA, once"
    rounds = "fedavg"


class PFedGPAInverted(PFedGPAOnce):
    """The paper to the letter: invert from T and replay all stored noise.

    By the identity theorem this is the upload's projection to the latent directions.
    """

    title = "pFedGPA, once, paper's inversion"

    def _decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        steps = self.config.pfedgpa.diffusion_steps
        return fitted.generate("invert", strength=steps, keep=1.0)


class PFedGPASampled(PFedGPAOnce):
    """The paper's ablation: each client gets one sample decoded from pure noise."""

    title = "pFedGPA, once, without inversion"

    def _decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        return fitted.generate("sample")
