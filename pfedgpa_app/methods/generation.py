"""Weights generated once, from the uploads of FedAvg's last rounds (Lai et al., AAAI 2025).

shared: all weights · kept: nothing · client: as FedAvg · server: learns the distribution of the
newest rounds' uploads with a diffusion model, inverts each client's newest upload into it and
denoises · evaluated: the generated weights, before and after fine-tuning.

This is pFedGPA as the text on the paper's experiments has it: ``pfedgpa-once``. Its two variants
are the paper's inversion to the letter and the paper's ablation without inversion.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import RESULTS, ConfigError, setting
from pfedgpa_app.core.uploads import Buffer, Entry, Upload
from pfedgpa_app.core.weights import Weights, is_statistic, last_layers, own_statistics
from pfedgpa_app.diffusion.copies import novelty
from pfedgpa_app.diffusion.denoiser import TokenTransformer
from pfedgpa_app.diffusion.directions import Likeness, newest_rows
from pfedgpa_app.diffusion.distribution import WeightDistribution, likeness_of
from pfedgpa_app.diffusion.network import STEP_SECONDS
from pfedgpa_app.diffusion.settings import DENOISERS, DiffusionSettings
from pfedgpa_app.methods.averaging import Shared
from pfedgpa_app.methods.base import Personaliser
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.training.sgd import device_for

UPLOADS = "uploads"  # the part of the settings that says which uploads are kept
ROUNDS = "rounds"  # the part for rounds that end with generation
SETTLED = 20  # rounds after which clients' classifiers tell clients apart


@dataclass(frozen=True)
class PFedGPASettings(DiffusionSettings):
    """The settings of pFedGPA's server."""

    generate_from: int | None = setting(
        None,
        "first gentle round, in which clients train on from weights generated for them; "
        "auto: the last 8 % of the rounds are gentle",
        low=1,
        part=ROUNDS,
    )
    round_rate: float = setting(
        0.1,
        "learning rate of gentle rounds, as a multiple of the run's",
        above=0,
        part=ROUNDS,
    )
    momentum: float | None = setting(
        None,
        "the server's momentum before gentle rounds; auto: 1 - fraction-train, at most 0.7, "
        "and more, up to 0.9, where clients' training loss falls more slowly than the rounds pass "
        "(docs/algorithm.md)",
        low=0,
        high=0.999,
        grid=("auto", 0.0, 0.5, 0.7, 0.9),
        part=ROUNDS,
    )
    layers: int = setting(
        0,
        "number of last layers that are generated, the rest being the global mean; 0: all layers",
        low=0,
        part=UPLOADS,
    )
    round_layers: int = setting(
        0,
        "number of last layers that all generations but the last generate; 0: as many as layers",
        low=0,
        part=ROUNDS,
    )
    buffer_rounds: int = setting(
        20, "number of newest rounds whose uploads the server learns from", low=1, part=UPLOADS
    )
    inversion: str = setting(
        "tweedie",
        "how an upload is carried through the diffusion model",
        choices=("identity", "sample", "invert", "ddim", "sdedit", "tweedie"),
    )
    keep: float = setting(
        0.0, "inversion=invert: share of the stored noise that is replayed", low=0, high=1
    )
    draws: int = setting(64, "number of decodings that are averaged for each client", low=1)
    round_denoiser: str = setting(
        "finite-set",
        "denoiser of all generations but the last",
        choices=DENOISERS,
        part=ROUNDS,
    )
    descriptor: str = setting(
        "none",
        "what mlp and transformer are told of a client: nothing, the class counts that it "
        "shares (share-label-counts), or an embedding learned for it",
        choices=("none", "labels", "learned"),
    )
    join_mode: str = setting(
        "tweedie",
        "weights of joining clients: their denoised uploads, or the paper's reverse steps "
        "guided by their progress",
        choices=("tweedie", "guided"),
    )


@dataclass
class RememberedState(Shared):
    """The mean of the uploads, and the newest uploads for the methods that learn from them.

    ``labels``: class counts of the clients that share them. ``statistics``: the running
    statistics in each client's newest upload; they are the client's own and are not generated.
    ``likeness``: which clients are alike, by ``likeness_of``, once that has been computed.
    ``fitted``: the distribution learned from the uploads after the last round, for all methods
    that share these rounds.
    """

    buffer: Buffer
    labels: dict[int, list[int]] = field(default_factory=dict)
    statistics: dict[int, Weights] = field(default_factory=dict)
    likeness: Likeness | None = None
    fitted: WeightDistribution | None = None

    def whole(self, client: int, mine: Weights) -> Weights:
        """A client's whole network, completed from the tensors ``mine`` that are made for it.

        The rest are its own running statistics, where it has any, and the global mean.
        """
        own = self.statistics.get(client, {})
        kept = own_statistics(self.global_weights, mine) if own else ()
        return self.global_weights | {name: own[name] for name in kept} | mine

    def last(self, layers: int) -> Buffer:
        """The buffered uploads cut to the network's last ``layers`` layers; 0: as they are kept."""
        if not layers:
            return self.buffer
        return self.buffer.last(last_layers(generated(self.global_weights), layers))


class RememberingFedAvg(FedAvg):
    """FedAvg's rounds; the server also keeps the newest uploads and which clients are alike."""

    state: RememberedState

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> RememberedState:
        return RememberedState(initial, Buffer(config.of(PFedGPASettings).buffer_rounds))

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        super().aggregate(server_round, uploads)
        self.remember(server_round, uploads)

    def remember(self, server_round: int, uploads: dict[int, Upload]) -> None:
        """Keep a round's uploads, drop those outside the window, and compute likeness when due."""
        layout = self.state.buffer.layout
        names = layout.names if layout else remembered(self.config, [*self.state.global_weights])
        for client, upload in uploads.items():
            if upload.labels:
                self.state.labels[client] = upload.labels
            if statistics := {n: t for n, t in upload.weights.items() if is_statistic(n)}:
                self.state.statistics[client] = statistics
            self.state.buffer.add(server_round, client, {n: upload.weights[n] for n in names})
        self.state.buffer.drop_old(server_round)
        if self.state.likeness is None and server_round >= self.settled(self.config):
            rule = self.config.of(PFedGPASettings).rank_rule
            heads = self.state.buffer.last(last_layers(names, 1))
            self.state.likeness = likeness_of(heads, rule, self.config.seed)

    @classmethod
    def settled(cls, config: Config) -> int:
        """The round after which the server computes which clients are alike.

        It is the first in which the buffer is full, but not before round ``SETTLED``; in a
        shorter run, the last. Likeness shows most clearly before clients memorise their images.
        """
        full = max(SETTLED, config.of(PFedGPASettings).buffer_rounds)
        return min(full, config.num_server_rounds)


def generated(names: Iterable[str]) -> list[str]:
    """The names of the tensors that are generated if all layers are: all but statistics."""
    return [name for name in names if not is_statistic(name)]


def remembered(config: Config, names: Sequence[str]) -> list[str]:
    """The names of the weights whose uploads are kept: those of the layers that are generated.

    All weights, if the uploads are saved beside the results for other runs to learn from.
    """
    own, every = config.of(PFedGPASettings), generated(names)
    if config.save_uploads or not own.layers:
        return every
    return last_layers(every, max(own.layers, own.round_layers))


class Generation(Personaliser[RememberedState]):
    """Generates every client's weights from the distribution of the newest uploads.

    Attributes:
        ignored: names of settings that do not influence what it generates.
    """

    of = RememberingFedAvg
    settings = PFedGPASettings
    parts: ClassVar[tuple[str, ...]] = (RESULTS, UPLOADS)
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Config, state: RememberedState) -> None:
        super().__init__(config, state)
        self.own_settings = config.of(PFedGPASettings)
        self.joined: dict[int, Weights] = {}  # what joining clients were last sent

    @classmethod
    def check(cls, config: Config) -> None:
        own = config.of(PFedGPASettings)
        if own.strength is not None and own.strength > own.diffusion_steps:
            raise ConfigError(
                f"pfedgpa.strength = {own.strength}: must be at most pfedgpa.diffusion-steps = "
                f"{own.diffusion_steps}"
            )
        heads = TokenTransformer.HEADS
        if "transformer" in (own.denoiser, own.round_denoiser) and own.width % heads:
            raise ConfigError(
                f"pfedgpa.width = {own.width}: the transformer has {heads} heads of equal width: "
                f"set a multiple of {heads}"
            )
        if own.descriptor == "labels" and not config.share_label_counts:
            raise ConfigError(
                "pfedgpa.descriptor = labels: clients must share their class counts: "
                "set share-label-counts=true"
            )

    def personalise(self) -> dict[int, Weights]:
        """Every client's generated weights; the global ones for a client that never uploaded."""
        common, made = self.state.global_weights, self.whole(self.learned(), self.made)
        return {client: made.get(client, common) for client in range(self.config.num_clients)}

    @classmethod
    def making_seconds(cls, config: Config) -> float:
        own = config.of(PFedGPASettings)
        return own.fit_steps * STEP_SECONDS.get(own.denoiser, 0.0)

    @functools.cached_property
    def made(self) -> dict[int, Weights]:
        """The tensors generated after the last round, for every client that ever uploaded."""
        return self.decoded(self.learned())

    def learned(self) -> WeightDistribution:
        """The distribution of the newest uploads after the last round, fitted at the first call."""
        if self.state.fitted is None:
            self.state.fitted = self.fit(self.own_settings.layers, self.own_settings.denoiser)
        return self.state.fitted

    def fit(self, layers: int, denoiser: str) -> WeightDistribution:
        """Fit the distribution of the buffered uploads, or of their last ``layers`` if not 0."""
        values = asdict(self.own_settings) | {"denoiser": denoiser} | self.sharing()
        names = {f.name for f in fields(DiffusionSettings)}
        return WeightDistribution(
            self.state.last(layers),
            DiffusionSettings(**{k: v for k, v in values.items() if k in names}),
            self.config.seed,
            device_for(self.config.device),
            self._descriptors(),
            self.progress,
            self.known(),
        )

    def known(self) -> Likeness | None:
        """Which clients are alike; None: to be computed from the buffered uploads."""
        return self.state.likeness

    def sharing(self) -> dict[str, Any]:
        """Settings of the distribution that override the user's: how much clients share."""
        return {}

    def _descriptors(self) -> dict[int, Tensor] | None:
        """Descriptors of clients for eq. 9: class shares, or one-hot vectors to be embedded."""
        if self.own_settings.descriptor == "labels":
            counts = {c: torch.tensor(n).float() for c, n in self.state.labels.items()}
            return {client: n / n.sum() for client, n in counts.items()}
        if self.own_settings.descriptor == "learned":
            return dict(enumerate(torch.eye(self.config.initial_clients)))
        return None

    def whole(self, fitted: WeightDistribution, made: dict[int, Weights]) -> dict[int, Weights]:
        """Clients' whole networks: the tensors ``made`` by ``fitted``, and the mean for the rest.

        Running statistics are the client's own, except at rank 0: there all clients get the mean's
        weights, to which the mean's statistics belong.
        """
        if not fitted.rank:
            return {client: self.state.global_weights | mine for client, mine in made.items()}
        return {client: self.state.whole(client, mine) for client, mine in made.items()}

    def decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        """The generated tensors of every client that ever uploaded."""
        return fitted.generate(
            self.own_settings.inversion, keep=self.own_settings.keep, draws=self.own_settings.draws
        )

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        """Place joining clients in the learned distribution (Algorithm 1, lines 7-14).

        Join mode ``tweedie`` denoises an upload; ``guided`` takes reverse steps from it, led by
        the client's local progress (eq. 10).
        """
        fitted, common = self.learned(), self.state.global_weights
        self.state.labels |= {c: upload.labels for c, upload in uploads.items() if upload.labels}
        names = fitted.layout.names
        given = {c: {n: upload.weights[n] for n in names} for c, upload in uploads.items()}
        if self.own_settings.join_mode == "guided":
            before = {c: {n: self.joined.get(c, common)[n] for n in names} for c in uploads}
            made = fitted.guide(given, before, 1 + self.own_settings.guidance)
        else:
            how = fitted.strength, self.own_settings.draws, self._descriptors()
            made = fitted.place(given, *how, begun=given.keys() - self.joined.keys())
        self.joined |= self.whole(fitted, made)
        return {client: self.joined[client] for client in uploads}

    def steps_back(self, fitted: WeightDistribution) -> int:
        """From which step of the noise schedule clients' weights are denoised."""
        return fitted.strength

    def reference(self, client: int) -> Weights | None:
        return self._newest.get(client)

    @functools.cached_property
    def _newest(self) -> dict[int, Weights]:
        newest = self.state.last(self.own_settings.layers).newest().items()
        return {c: self.state.whole(c, e.weights()) for c, e in newest if self.is_upload(e)}

    def is_upload(self, entry: Entry) -> bool:
        """Whether a buffered entry is an upload, not one that the server put in its place."""
        return True

    def report(self) -> dict[str, Any]:
        fitted, buffered = self.learned(), self.state.last(self.own_settings.layers).entries()
        entries = [entry for entry in buffered if self.is_upload(entry)]
        here = sorted({entry.client for entry in entries})  # clients with an upload in the window
        generated = [fitted.layout.flatten(self.made[client]) for client in here]
        newest = newest_rows(torch.tensor([entry.client for entry in entries]))
        new = novelty(generated, newest, [entry.vector for entry in entries])
        return {
            "rank": fitted.rank,
            "strength": self.steps_back(fitted),
            "distance_to_nearest_upload": round(float(new.nanmean()), 4),
        }


class PFedGPAOnce(Generation):
    """Generation once, after the last of FedAvg's rounds."""

    title = "pFedGPA, once"


class PFedGPAInverted(Generation):
    """The paper to the letter: invert from T and replay all stored noise.

    By the identity theorem the result is the upload projected onto the latent directions.
    """

    title = "pFedGPA, once, paper's inversion"
    ignored = ("inversion", "keep", "draws", "strength")

    def steps_back(self, fitted: WeightDistribution) -> int:
        return self.own_settings.diffusion_steps

    def decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        return fitted.generate("invert", strength=self.steps_back(fitted), keep=1.0)


class PFedGPASampled(Generation):
    """The paper's ablation: each client gets one sample decoded from pure noise."""

    title = "pFedGPA, once, without inversion"
    ignored = PFedGPAInverted.ignored

    def steps_back(self, fitted: WeightDistribution) -> int:
        return self.own_settings.diffusion_steps

    def decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        return fitted.generate("sample")
