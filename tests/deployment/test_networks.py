"""Slow, lossy and broken networks: the run ends like the undisturbed one, or says why not."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import networks
from tests.support.federations import PLAIN, federate, records, results

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("networks")]


@pytest.fixture(scope="module")
def prefix() -> str:
    if why := networks.missing():
        pytest.skip(why)
    return f"pfedgpa-{os.getpid()}-"


def test_a_cable_that_is_cut_in_the_middle_of_a_round(tmp_path: Path, prefix: str) -> None:
    """At 1 Mbit/s, with packets late, lost and out of order; no upload is lost or counted twice."""
    more: dict[str, Any] = {"num_clients": 2, "num_server_rounds": 2, "evaluate_every": 0}
    more |= {"method": "scaffold"}  # which would go wrong by an upload that is counted twice
    reference, _ = federate(tmp_path / "reference", **more)
    settings = PLAIN | {name.replace("_", "-"): value for name, value in more.items()}
    cable = networks.Cable(rate=1e6, delay=0.1, lost=0.05, overtaking=0.02)
    folder, failure = networks.over_networks(tmp_path, prefix, settings, cable, cut=20)
    assert not failure, (tmp_path / "log").read_text()
    assert records(folder) == records(reference)
    assert results(folder) == results(reference)
