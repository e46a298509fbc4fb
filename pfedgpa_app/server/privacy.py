"""What a whole run tells of a client, where uploads have local differential privacy."""

from __future__ import annotations

import math
from collections import Counter

import torch

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import federations
from pfedgpa_app.server.strategy import sampled


def noise_multiplier(config: Config) -> float:
    """σ: the noise's deviation in units of how far two updates can be apart, √(2 ln(1.25/δ))/ε."""
    return math.sqrt(2 * math.log(1.25 / config.local_dp_delta)) / config.local_dp_epsilon


def epsilon_of(config: Config, uploads: int) -> float:
    """ε of so many of a client's uploads together, at one upload's δ.

    Exact: Gaussian releases of multiplier σ compose to one of σ/√uploads (Dong, Roth and Su 2022,
    Corollary 3.3), whose δ(ε) = Φ(μ/2 − ε/μ) − exp(ε) Φ(−μ/2 − ε/μ), μ = √uploads/σ (Balle and
    Wang 2018, Theorem 8). Whose turn it is, the server sees: sampling amplifies nothing.
    """
    mu = math.sqrt(uploads) / noise_multiplier(config)

    def delta(epsilon: float) -> float:
        ends = torch.tensor([mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu], dtype=torch.float64)
        near, far = torch.special.log_ndtr(ends).tolist()
        return math.exp(near) - math.exp(epsilon + far)

    low, high = 0.0, 1.0
    while delta(high) > config.local_dp_delta:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if delta(middle) > config.local_dp_delta else (low, middle)
    return high


def most_uploads(config: Config, rounds: int | None = None) -> int:
    """How often the client uploads that does so most, in all federations of the run."""
    counts: Counter[int] = Counter()
    for server_round in range(1, (config.num_server_rounds if rounds is None else rounds) + 1):
        counts.update(sampled(config, server_round))
    return max(counts.values(), default=0) * len(federations(config.method))


def in_words(config: Config) -> str:
    """What the run will have told of a client."""
    uploads, delta = most_uploads(config), config.local_dp_delta
    return (
        f"privacy: each upload is ({config.local_dp_epsilon:g}, {delta:g})-differentially private, "
        f"the {uploads} that a client makes at most ({epsilon_of(config, uploads):.3g}, {delta:g})"
    )


def check(config: Config) -> None:
    """Refuse a run that would spend more than ``max-epsilon``.

    Raises:
        ConfigError: it would; the text says how many rounds would not.
    """
    most = config.max_epsilon
    if not most:
        return
    if not config.local_dp_epsilon:
        raise ConfigError("max-epsilon: uploads are private with local-dp-epsilon only; set it")
    spent = epsilon_of(config, most_uploads(config))
    if spent <= most:
        return
    rounds = config.num_server_rounds
    while rounds and epsilon_of(config, most_uploads(config, rounds)) > most:
        rounds -= 1
    way = f"num-server-rounds={rounds} keeps within it" if rounds else "not even one round does"
    raise ConfigError(
        f"max-epsilon = {most:g}: the run would spend {spent:.3g} on a client that takes part most "
        f"often; {way}, or a smaller local-dp-epsilon, or fewer methods"
    )
