"""Krum (Blanchard et al. 2017), by Flower's function.

"Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", arXiv 1703.02757.

shared: all weights · kept: nothing · client: as FedAvg · server: the upload whose n − f − 2
nearest others are closest to it, where f clients may be malicious; with ``select`` > 1 the mean
of that many uploads (Multi-Krum), weighted by training images · evaluated: the global weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.methods.averaging import Defence


@dataclass(frozen=True)
class KrumSettings(MethodSettings):
    """What it guards against."""

    malicious: int | None = setting(
        None,
        "f, the number of malicious clients to withstand; auto: 2, or with fewer than 7 "
        "uploads per round as many as Krum is known to withstand",
        low=0,
    )
    select: int = setting(1, "number of uploads that are averaged; above 1: Multi-Krum", low=1)


def malicious(config: Config) -> int:
    """f, how many clients may be malicious; auto is 2, or as many as Krum withstands if fewer.

    n >= 2f + 3 clients withstand f malicious ones (Blanchard et al., Proposition 4.2).
    """
    own = config.of(KrumSettings).malicious
    return max(0, min(2, (config.round_uploads - 3) // 2)) if own is None else own


class Krum(Defence):
    """FedAvg of the most central uploads only."""

    title = "Krum"
    settings = KrumSettings

    @classmethod
    def check(cls, config: Config) -> None:
        own, uploads, most = config.of(KrumSettings), config.round_uploads, malicious(config)
        if most > uploads - 3:
            way = f"set it to at most {uploads - 3}"
            if uploads < 3:
                way = "Krum needs 3 or more: raise num-clients or fraction-train"
                way += ", or let fewer drop out" if uploads < config.round_clients else ""
            raise ConfigError(
                f"krum.malicious = {most}: each upload is compared with all but "
                f"{most} + 2 of a round's, but a round has {_many(uploads)}; {way}"
            )
        if own.select > uploads:
            raise ConfigError(
                f"krum.select = {own.select}: a round has {_many(uploads)}; set it to at "
                f"most {uploads}"
            )

    @classmethod
    def doubts(cls, config: Config) -> Iterator[str]:
        own, uploads, most = config.of(KrumSettings), config.round_uploads, malicious(config)
        wanted = max(1, most)
        if uploads < 2 * wanted + 3:
            yield (
                f"krum.malicious = {most}: Krum is known to withstand {wanted} malicious of "
                f"{2 * wanted + 3} or more uploads a round; of the {uploads} here, "
                f"{max(0, (uploads - 3) // 2)}"
            )
        if (beyond := own.select + most - uploads) > 0:
            yield (
                f"krum.select = {own.select}: if {most} of the {uploads} uploads of a "
                f"round are malicious, {beyond} or more of them are averaged too"
            )

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        own, before = self.config.of(KrumSettings), self.state.global_weights
        # changes are as far apart as weights are, but large weights lose that to float32 rounding
        contents = [
            RecordDict(
                {
                    "arrays": ArrayRecord({n: w - before[n] for n, w in u.weights.items()}),
                    "metrics": MetricRecord({"client": client}),
                }
            )
            for client, u in uploads.items()
        ]
        chosen = select_multikrum(contents, malicious(self.config), own.select)
        clients = sorted(int(c.metric_records["metrics"]["client"]) for c in chosen)  # type: ignore[arg-type]
        self.state.global_weights = weighted_mean({c: uploads[c] for c in clients})


def _many(uploads: int) -> str:
    return f"{uploads} upload" + ("s" if uploads != 1 else "")
