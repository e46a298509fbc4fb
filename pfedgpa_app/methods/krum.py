"""Krum (Blanchard et al. 2017), by Flower's function.

"Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent", arXiv 1703.02757.

shared: all weights · kept: nothing · client: as FedAvg · server: the one upload whose n − f − 2
nearest others are nearest, f being how many clients may be malicious; with ``select`` > 1 the
mean of so many (Multi-Krum), weighted by training images · evaluated: the global weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.multikrum import select_multikrum

from pfedgpa_app.core.settings import MethodSettings, setting
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.methods.averaging import Averaging, Shared


@dataclass(frozen=True)
class KrumSettings(MethodSettings):
    """What it guards against."""

    malicious: int = setting(2, "f: so many clients may be malicious", low=0)
    select: int = setting(1, "so many uploads are averaged; above 1: Multi-Krum", low=1)


class Krum(Averaging[Shared]):
    """The most central uploads only."""

    title = "Krum"
    settings = KrumSettings
    is_defence = True

    def aggregate(self, server_round: int, uploads: dict[int, Upload]) -> None:
        own = self.config.of(KrumSettings)
        contents = [
            RecordDict(
                {"arrays": ArrayRecord(u.weights), "metrics": MetricRecord({"client": client})}
            )
            for client, u in uploads.items()
        ]
        chosen = select_multikrum(contents, own.malicious, own.select)
        clients = sorted(int(c.metric_records["metrics"]["client"]) for c in chosen)  # type: ignore[arg-type]
        self.state.global_weights = weighted_mean({c: uploads[c] for c in clients})
