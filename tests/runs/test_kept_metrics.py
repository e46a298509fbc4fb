"""A change of the code's shape changes no figure: one method a family, as it was kept.

``kept_metrics.json`` is of the run below on the process engine. It was renewed when the images that
rounding leaves of each class became a seeded draw, which deals other images; until then its figures
went back to before the package was laid out in floors, but for SCAFFOLD's and pFedGPA's own. The
latter's was renewed when what a client learns came to be measured from what it had been sent. CPUs
differ in floats' last digits, which may turn one image's prediction.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.federations import federate, records, summary

KEPT: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parent / "kept_metrics.json").read_text()
)
SETTINGS: dict[str, Any] = {
    "num-clients": 5,
    "num-server-rounds": 3,
    "fraction-train": 0.4,
    "train-per-client": 60,
    "test-per-client": 40,
    "validation-share": 0.2,
    "batch-size": 20,
    "join-clients": 1,
    "join-iterations": 1,
    "pfedgpa.fit-steps": 20,
    "pfedgpa.width": 16,
    "pfedgpa.draws": 4,
    "pfedgpa.momentum": 0.0,  # as it was
}
ONE_IMAGE = 100 / 40 / 4  # of one client, in the mean of those that are evaluated


def test_as_it_was_kept(tmp_path: Path) -> None:
    folder, _ = federate(tmp_path, method=",".join(KEPT), **SETTINGS)
    rows, every = summary(folder), records(folder)
    for method, kept in KEPT.items():
        accuracy = rows[method]["accuracy_before_ft"]
        assert accuracy == pytest.approx(kept["accuracy_before_ft"], abs=ONE_IMAGE), method
        losses: dict[int, list[float]] = {}
        for record in every:
            if record["federation"] == method and record["train_loss"] is not None:
                losses.setdefault(record["round"], []).append(record["train_loss"])
        means = [sum(each) / len(each) for _, each in sorted(losses.items())]
        assert means == pytest.approx(kept.get("train_loss", []), rel=1e-3), method
