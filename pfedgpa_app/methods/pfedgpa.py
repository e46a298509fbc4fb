"""pFedGPA (Lai et al., AAAI 2025): generate each client its own weights.

"pFedGPA: Diffusion-based Generative Parameter Aggregation for Personalized Federated Learning",
arXiv 2409.05701.

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

import math
from dataclasses import dataclass, field

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import RESULTS, ConfigError
from pfedgpa_app.core.uploads import Buffer, Upload
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.diffusion.distribution import rank_of
from pfedgpa_app.methods.averaging import with_momentum
from pfedgpa_app.methods.generation import (
    ROUNDS,
    UPLOADS,
    Generation,
    PFedGPASettings,
    RememberedState,
    RememberingFedAvg,
)


@dataclass
class PFedGPAState(RememberedState):
    """What pFedGPA's server knows beside the mean and the uploads.

    ``velocity`` is the server's momentum, ``rank`` the latent rank chosen before the first
    generation, ``generated`` what clients train from.
    """

    velocity: Weights = field(default_factory=dict)
    rank: int | None = None
    generated: dict[int, Weights] = field(default_factory=dict)


class PFedGPA(Generation, RememberingFedAvg):
    """FedAvg, maybe with momentum; then generation ends every round, and clients train on from it.

    These last rounds are gentle: at a small learning rate, clients fine-tune, but together with
    those whose weights are like theirs. What they upload differs by far more than its noise, so
    the distribution is learned from these rounds alone.
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

    @classmethod
    def first_generation(cls, config: Config) -> int:
        """The first round that ends with generation."""
        rounds = config.num_server_rounds
        return config.of(PFedGPASettings).generate_from or rounds - math.ceil(0.08 * rounds) + 1

    @classmethod
    def learning_rate(cls, config: Config, server_round: int = 1) -> float:
        generating = cls.first_generation(config) <= server_round <= config.num_server_rounds
        rate = super().learning_rate(config, server_round)
        return rate * (config.of(PFedGPASettings).round_rate if generating else 1)

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        first, state = self.first_generation(self.config), self.state
        before = state.global_weights
        if server_round >= first and not state.generated:
            self._prepare(first)
        super().aggregate(server_round, uploads)
        if server_round < first and self.own.momentum:
            state.global_weights, state.velocity = with_momentum(
                before, state.global_weights, state.velocity, self.own.momentum
            )
        if server_round >= first:
            layers = self.own.round_layers or self.own.layers
            fitted = self.fit(layers, self.own.round_denoiser)
            state.generated = self.whole(self.decoded(fitted))

    def _prepare(self, first: int) -> None:
        """Choose the rank by FedAvg's rounds, and forget them.

        Clients that train on from generated weights differ ever more along the directions that
        generation kept, so that a rank chosen by their uploads would only confirm itself.
        """
        buffer = self.state.buffer
        if self.own.rank is None and len(buffer):
            self.state.rank = rank_of(buffer, self.own.rank_rule, self.config.seed)
        buffer.drop_before(first)

    @property
    def chosen_rank(self) -> int | None:  # type: ignore[override]
        """By FedAvg's rounds."""
        return self.state.rank
