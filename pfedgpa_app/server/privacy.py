"""What a whole run reveals of a client if its uploads have local differential privacy."""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from pfedgpa_app.core.files import sync
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.methods import federations, rounds_class
from pfedgpa_app.methods.base import NOTHING, OTHER
from pfedgpa_app.results.log import append, end_whole, record_in
from pfedgpa_app.server.strategy import asked_in


def noise_multiplier(config: Config) -> float:
    """Return σ = √(2 ln(1.25/δ))/ε.

    This is the noise's deviation, in units of how far two updates can be apart.
    """
    return math.sqrt(2 * math.log(1.25 / config.local_dp_delta)) / config.local_dp_epsilon


def epsilon_of(config: Config, uploads: int) -> float:
    """Return ε of ``uploads`` uploads of one client together, at one upload's δ.

    It is exact: Gaussian releases of multiplier σ compose to one of σ/√uploads (Dong, Roth and Su
    2022, Corollary 3.3), whose δ(ε) = Φ(μ/2 − ε/μ) − exp(ε) Φ(−μ/2 − ε/μ), μ = √uploads/σ (Balle
    and Wang 2018, Theorem 8). Sampling clients does not lower ε: the server sees who is sampled.
    """
    if not uploads:
        return 0.0
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


FILE = "asked.jsonl"  # in a run's folder: the clients that each round asked for an upload
Done = tuple[str, int]  # a federation, and how many of its rounds are done


class Uploads:
    """How often clients upload in a run: the uploads asked for so far, and those to come.

    Each upload has noise of its own. So rounds that a resumed run repeats, because it was killed
    before it kept them, count again: the clients that a round asks are written to ``file`` first.
    """

    def __init__(
        self,
        config: Config,
        file: Path | None = None,
        finished: Sequence[str] = (),
        going: Done = ("", 0),
    ) -> None:
        """Count the uploads of a whole run, or of one resumed from its ``file`` and checkpoint.

        Args:
            finished: federations that are done.
            going: the federation in progress, and how many of its rounds are done.
        """
        self._file = file
        self.counts: Counter[int] = Counter()
        if file is not None and file.exists():
            for clients in _asked(file, config.num_clients):
                self.counts.update(clients)
        else:  # no record, as of a run that an earlier version began: all of it counts
            finished, going = (), ("", 0)
        for name, methods in federations(config.method).items():
            if name not in finished and rounds_class(name).sends != NOTHING:
                done = going[1] if name == going[0] else 0
                for server_round in range(done + 1, config.num_server_rounds + 1):
                    asked, _ = asked_in(config, server_round)
                    self.counts.update(asked)
                for _ in range(config.join_iterations * len(methods)):
                    self.counts.update(range(config.initial_clients, config.num_clients))

    @property
    def most(self) -> int:
        """The number of uploads of the client that uploads most often."""
        return max(self.counts.values(), default=0)

    def record_asked(self, federation: str, server_round: int, clients: Iterable[int]) -> None:
        """Write down that ``clients`` are asked for an upload."""
        if self._file is None or rounds_class(federation).sends == NOTHING:
            return
        line = {"federation": federation, "round": server_round, "clients": sorted(clients)}
        append(self._file, line)
        sync(self._file)


def _asked(file: Path, clients: int) -> Iterator[list[int]]:
    """Yield the clients that each round asked, from ``file``.

    A last line that was not written to its end may have asked any client. It counts as all
    ``clients``, and is replaced by a line that says so.

    Raises:
        ConfigError: another line is damaged.
    """
    *whole, torn = file.read_bytes().split(b"\n")
    if torn:
        end_whole(file)
        append(file, {"clients": list(range(clients))})
        yield list(range(clients))
    for number, line in enumerate(whole, start=1):
        found = record_in(line).get("clients")
        if not isinstance(found, list) or not all(isinstance(client, int) for client in found):
            raise ConfigError(
                f"{file}: line {number} is damaged, so what the run has spent is unknown; "
                "start it anew under another run-name"
            )
        yield found


def in_words(config: Config, uploads: int) -> str:
    """Say how private one upload is, and all ``uploads`` that a client makes in the run."""
    one, every = (f"({epsilon_of(config, n):.3g}, {config.local_dp_delta:g})" for n in (1, uploads))
    return (
        f"privacy: each upload is {one}-differentially private, and a client's {uploads} "
        f"together at most {every}; the losses and accuracies that clients report have no noise"
    )


def check(config: Config, uploads: Uploads | None = None) -> None:
    """Refuse a run that would spend more than ``max-epsilon``, or whose uploads take no noise.

    Args:
        uploads: those of a run that is resumed.

    Raises:
        ConfigError: it would; for a new run, the text says how many rounds would not.
    """
    most = config.max_epsilon
    if not config.local_dp_epsilon:
        if most:
            raise ConfigError("max-epsilon: uploads are private only with local-dp-epsilon; set it")
        return
    for method in config.method:
        if rounds_class(method).sends == OTHER:
            raise ConfigError(
                f"local-dp-epsilon: {method} uploads tensors other than weights that were trained "
                "from those it is sent, and only the change of such weights takes noise; leave it "
                "out"
            )
    spent = epsilon_of(config, (uploads or Uploads(config)).most)
    if not most or spent <= most:
        return
    if uploads is not None:
        raise ConfigError(
            f"max-epsilon = {most:g}: the run would spend {spent:.3g}, since lost rounds are "
            "repeated and upload again: raise it, or leave the run as it is"
        )
    way = _way_to_keep(config, most)
    raise ConfigError(
        f"max-epsilon = {most:g}: the run would spend {spent:.3g} on a client that takes part most "
        f"often; {way} a smaller local-dp-epsilon, or use fewer methods"
    )


def _way_to_keep(config: Config, most: float) -> str:
    """Say how many rounds, or iterations of joining clients, spend no more than ``most``."""
    for field in ("num_server_rounds", "join_iterations"):

        def spent(fewer: int, field: str = field) -> float:
            changed: Config = dataclasses.replace(config, **{field: fewer})  # type: ignore[arg-type]
            return epsilon_of(config, Uploads(changed).most)

        if kept := bisect.bisect_right(range(1, getattr(config, field)), most, key=spent):
            return f"set {field.replace('_', '-')}={kept} to keep within it, or"
    return "even one round exceeds it: set"
