"""pFedGPA (Lai et al., AAAI 2025): generate each client its own weights.

"pFedGPA: Diffusion-based Generative Parameter Aggregation for Personalized Federated Learning",
arXiv 2409.05701.

shared: all weights · kept: nothing · client: as FedAvg, from the weights it is sent · server:
learns the distribution of the newest rounds' uploads with a diffusion model, inverts each
client's newest upload into it and denoises · evaluated: the generated weights, before and
after fine-tuning.

The paper describes the method in two ways. In its Algorithm 1 every round ends with generation,
and clients train on from what was generated for them: ``pfedgpa`` does so in the last rounds. In
the text on its experiments, the distribution is learned from the last rounds' uploads and weights
are generated once: ``pfedgpa-once``. What the paper leaves open is FedAvg here: the rounds before
generation, and the tensors that are not generated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import RESULTS, ConfigError
from pfedgpa_app.core.uploads import Buffer, Entry, Upload
from pfedgpa_app.core.weights import Layout, Weights
from pfedgpa_app.diffusion.directions import Likeness
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.methods.averaging import heading, with_momentum
from pfedgpa_app.methods.generation import (
    ROUNDS,
    UPLOADS,
    Generation,
    PFedGPASettings,
    RememberedState,
    RememberingFedAvg,
)

MEAN, GENERATED, OWN = "mean", "generated", "own"
_MOMENTUM = 0.7  # the server's, times the share of the loss that is left
_STRAIGHT_MOMENTUM = 0.9  # where all rounds' steps point the same way
_SHARE_MOMENTUM = 0.7  # the most where few clients take part in a round
_TURNING, _STRAIGHT = 0.5, 0.75  # cosines between which momentum grows to _STRAIGHT_MOMENTUM
_BEHIND = 0.1  # lag of the loss behind the rounds at which momentum is in full
_OWN_WEIGHT = 0.9  # posterior weight that clients' own uploads keep if no clients are alike


@dataclass
class PFedGPAState(RememberedState):
    """What pFedGPA's server knows beside the mean and the uploads.

    ``velocity``: the step that the server's momentum carries on. ``first_loss``: the clients'
    median training loss in the first round that reports one. ``generated``: the weights that each
    client trains from. ``losses``: each client's newest losses on its validation images under the
    mean, if it has such images. ``rivals``: weights generated without sharing, to be compared with
    ``generated``. ``chosen``: what clients' validation losses favour: the mean, generated weights
    or clients' own; "" as long as nothing is chosen.
    """

    velocity: Weights = field(default_factory=dict)
    first_loss: float | None = None
    generated: dict[int, Weights] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    rivals: dict[int, Weights] = field(default_factory=dict)
    chosen: str = ""


class PFedGPA(Generation, RememberingFedAvg):
    """FedAvg, maybe with momentum, whose last rounds generate weights that clients train on from.

    The first generation learns from the last rounds of FedAvg. The rounds after it are gentle: at
    a small learning rate each client fine-tunes, but together with the clients whose weights are
    like its own. Uploads then differ by far more than their noise, so the distribution is learned
    from these rounds alone.

    Uploads alone cannot tell clients that are alike, but each with some randomness of its own,
    from clients that are not alike at all. Clients' validation images can, if they have some: in
    the first gentle round, clients compare what was generated for them with the mean and with
    weights that are their own alone.
    """

    title = "pFedGPA"
    settings = PFedGPASettings
    parts = (RESULTS, UPLOADS, ROUNDS)
    tuned = ("momentum",)
    state: PFedGPAState

    @classmethod
    def check(cls, config: Config) -> None:
        super().check(config)
        first = config.of(PFedGPASettings).generate_from or 1
        if first > config.num_server_rounds:
            raise ConfigError(
                f"pfedgpa.generate-from = {first}: must be at most "
                f"num-server-rounds = {config.num_server_rounds}"
            )

    @classmethod
    def begin(cls, config: Config, initial: Weights) -> PFedGPAState:
        return PFedGPAState(initial, Buffer(config.of(PFedGPASettings).buffer_rounds))

    def download(self, client: int) -> Weights:
        return self.state.generated.get(client, self.state.global_weights)

    def rival(self, client: int) -> Weights | None:
        return self.state.rivals.get(client)

    @classmethod
    def first_gentle(cls, config: Config) -> int:
        """The first round in which clients train on from what was generated for them."""
        rounds = config.num_server_rounds
        last = max(2, rounds - math.ceil(0.08 * rounds) + 1)  # one round at least is plain FedAvg
        return config.of(PFedGPASettings).generate_from or last

    @classmethod
    def first_generation(cls, config: Config) -> int:
        """The first round ending with generation: the one before ``first_gentle``, or round 1."""
        return max(1, cls.first_gentle(config) - 1)

    @classmethod
    def settled(cls, config: Config) -> int:
        return min(super().settled(config), cls.first_generation(config))

    def rate(self, server_round: int) -> float:
        return self.own_settings.round_rate if self._is_gentle(server_round) else 1.0

    def _is_gentle(self, server_round: int) -> bool:
        return server_round >= self.first_gentle(self.config) and self.state.chosen != MEAN

    @classmethod
    def asks_validation(cls, config: Config, server_round: int) -> bool:
        own, first = config.of(PFedGPASettings), cls.first_gentle(config)
        last = cls.first_generation(config) + 1
        return own.rank is None and first - own.buffer_rounds <= server_round <= last

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        first, state = self.first_gentle(self.config), self.state
        before, sent = state.global_weights, {client: self.download(client) for client in uploads}
        if self._compare(uploads) in (MEAN, OWN):  # these uploads started from generated weights
            state.generated = self._generated()
            return
        if state.generated and state.chosen != OWN:
            generation = self.first_generation(self.config)
            state.buffer.drop_before(generation if generation in state.buffer.means else first)
        super().aggregate(server_round, uploads)
        if state.generated and state.chosen != OWN:
            self._keep_comparable(server_round, uploads, sent)
        if self.own_settings.momentum != 0 and not self._is_gentle(server_round):
            mean, velocity = state.global_weights, state.velocity
            if (beta := self.own_settings.momentum) is None:
                beta = self._momentum(server_round, uploads, heading(before, mean, velocity))
            state.global_weights, state.velocity = with_momentum(before, mean, velocity, beta)
        generation = self.first_generation(self.config)
        if server_round >= generation:
            if self.own_settings.rank is None and server_round == generation and state.losses:
                state.chosen = OWN
                state.rivals = self._generated()
                state.chosen = ""
            state.generated = self._generated()

    def _keep_comparable(
        self, server_round: int, uploads: dict[int, Upload], sent: dict[int, Weights]
    ) -> None:
        """After a gentle round, keep the uploads in it comparable to those of absent clients.

        The round's drift is set to the mean of what was generated for all clients, plus what the
        round's clients learned on average, from what they were ``sent``; the mean of their uploads
        would depend on which clients took part. For a client that has been in no gentle round yet,
        the first generation's result stands in for an upload.
        """
        buffer, generated = self.state.buffer, self.state.generated
        absent = generated.keys() - uploads.keys()
        if not absent and not buffer.means:
            return
        layout, generation = buffer.layout, self.first_generation(self.config)
        assert layout is not None
        shared = _mean(generated.values(), layout)
        learned = _mean([upload.weights for upload in uploads.values()], layout)
        learned -= _mean(sent.values(), layout)
        if generation not in buffer.means:
            newest = buffer.newest()
            for client in absent:
                if newest[client].server_round <= generation:
                    made = {name: generated[client][name] for name in layout.names}
                    buffer.add(generation, client, made)
            buffer.means[generation] = shared
        buffer.means[server_round] = shared + learned
        for client in uploads:
            buffer.forget(generation, client)

    def is_upload(self, entry: Entry) -> bool:
        generation = self.first_generation(self.config)
        return entry.server_round != generation or generation not in self.state.buffer.means

    def _momentum(self, server_round: int, uploads: dict[int, Upload], cosine: float) -> float:
        """The round's momentum, from the training losses, ``cosine`` and the share taking part."""
        by_share = momentum_by_share(self.config.fraction_train)
        if not (losses := [u.loss for u in uploads.values() if math.isfinite(u.loss)]):
            return by_share
        loss, state = statistics.median(losses), self.state
        if state.first_loss is None:
            state.first_loss = loss
        left = loss / state.first_loss if state.first_loss > 0 else 0.0
        rounds_left = 1 - server_round / self.first_generation(self.config)
        return max(by_share, _momentum_by_loss(left, rounds_left, cosine))

    def _compare(self, uploads: dict[int, Upload]) -> str:
        """Take in clients' validation losses; after the first generation, choose by them.

        Returns:
            the choice, in the round in which it is made; "" in all others.
        """
        state = self.state
        told = {c: upload.validation_losses for c, upload in uploads.items()}
        if not state.generated:
            state.losses |= {client: losses[0] for client, losses in told.items() if losses}
        elif state.rivals:
            all_three = {
                client: [state.losses[client], *losses]
                for client, losses in told.items()
                if len(losses) == 2 and client in state.losses
            }
            state.rivals = {}
            if all_three:
                state.chosen = _best(torch.tensor(list(all_three.values())))
                return state.chosen
        return ""

    def _generated(self) -> dict[int, Weights]:
        """The weights that each client trains from next; {} for the mean for all."""
        if self.state.chosen == MEAN:
            return {}
        layers = self.own_settings.round_layers or self.own_settings.layers
        fitted = self.fit(layers, self.own_settings.round_denoiser)
        return self.whole(fitted, self.decoded(fitted))

    def decoded(self, fitted: WeightDistribution) -> dict[int, Weights]:
        if self.state.chosen != MEAN:
            return super().decoded(fitted)
        common = {name: self.state.global_weights[name] for name in fitted.layout.names}
        return dict.fromkeys(fitted.newest, common)

    def join(self, uploads: dict[int, Upload]) -> dict[int, Weights]:
        if self.state.chosen == OWN:
            return RememberingFedAvg.join(self, uploads)
        if self.state.chosen == MEAN:
            return dict.fromkeys(uploads, self.state.global_weights)
        return super().join(uploads)

    def known(self) -> Likeness | None:
        """Which clients are alike by FedAvg's first rounds; None once nothing depends on it.

        Clients that train on from generated weights differ ever more along the directions that
        generation kept, so that their uploads would only confirm what was found first.
        """
        return None if self.state.chosen in (MEAN, OWN) else self.state.likeness

    def sharing(self) -> dict[str, Any]:
        if self.state.chosen == MEAN:
            return {"rank": 0}
        if self.state.chosen == OWN:
            clients = {entry.client for entry in self.state.buffer.entries()}
            return {"rank": len(clients) - 1, "own_weight": _OWN_WEIGHT, "strength": None}
        return {}

    def report(self) -> dict[str, Any]:
        return super().report() | {"chosen_by_validation": self.state.chosen or None}


def _mean(several: Collection[Weights], layout: Layout) -> Tensor:
    """The mean of ``several`` clients' weights, of the tensors in ``layout``, as one vector [P]."""
    vectors = (layout.flatten({n: w[n] for n in layout.names}) for w in several)
    return sum(vectors, torch.zeros(())) / len(several)


def momentum_by_share(share: float) -> float:
    """The momentum for a federation in which a ``share`` of the clients takes part in a round.

    Momentum averages over 1 / (1 − momentum) rounds: as many as it takes to hear every client.
    A client that takes part in few of them does not memorise its own images.
    """
    return min(_SHARE_MOMENTUM, 1 - share)


def _momentum_by_loss(left: float, rounds_left: float, cosine: float) -> float:
    """The momentum of a round by how far the training loss lags behind the rounds.

    It serves a loss that falls more slowly than the rounds pass. What few images have to teach is
    learned without momentum, too; with it, clients would memorise their images before generation
    begins, which then has nothing left to share. Momentum is larger where rounds' steps point in
    the same direction as those before.

    Args:
        left: the share of the first training loss that is left after the round.
        rounds_left: the share of FedAvg's rounds that is left.
        cosine: of the angle between this round's step and those before it (``heading``).
    """
    left, rounds_left = min(1.0, max(0.0, left)), max(0.0, rounds_left)
    straight = min(1.0, max(0.0, (cosine - _TURNING) / (_STRAIGHT - _TURNING)))
    behind = min(1.0, max(0.0, (left - rounds_left) / _BEHIND))
    return max(_MOMENTUM * left, _STRAIGHT_MOMENTUM * straight) * behind


def _best(losses: Tensor) -> str:
    """Which of the mean, generated weights and clients' own is best for most clients.

    Each is judged at the temperature at which it is best for all clients together. The mean, which
    would end all sharing among like clients, must be best on average, too: a few images a client
    tell little.

    Args:
        losses: [clients, 3, temperatures], in the order mean, generated, own.
    """
    coolest = losses.mean(0).argmin(1)
    mean, made, own = (losses[:, i, at] for i, at in enumerate(coolest.tolist()))
    name, mine = (OWN, own) if 2 * int((own < made).sum()) > len(own) else (GENERATED, made)
    for_most = 2 * int((mean < mine).sum()) > len(mine)
    return MEAN if for_most and mean.mean() < mine.mean() else name
