"""Slow, lossy and broken networks: the run ends like the undisturbed one, or says why not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pfedgpa_app.core.paths import APP_DIR
from tests.support import networks
from tests.support.federations import PLAIN, federate, records, results

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("networks")]


@pytest.fixture(scope="module")
def prefix() -> str:
    if why := networks.missing():
        pytest.skip(why)
    return f"pfedgpa-{os.getpid()}-"


def over_networks(
    folder: Path, prefix: str, cut: float, rate: str = "1mbit", **more: Any
) -> tuple[Path, str]:
    """A run's folder, and why it did not complete, or ""."""
    named = {name.replace("_", "-"): value for name, value in more.items()}
    settings = PLAIN | named | {"out-dir": str(folder), "run-name": "run"}
    script = [sys.executable, "-m", "tests.support.networks", str(folder), prefix, str(cut)]
    with networks.namespaces(prefix, settings["num-clients"], rate):
        done = subprocess.run(
            ["ip", "netns", "exec", prefix + networks.SERVER, *script, json.dumps(settings)],
            cwd=APP_DIR,
            env=os.environ | {"PYTHONPATH": str(APP_DIR)},
            capture_output=True,
            text=True,
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    said: str = json.loads(done.stdout.splitlines()[-1])
    return folder / "run", said


def test_a_cable_that_is_cut_in_the_middle_of_a_round(tmp_path: Path, prefix: str) -> None:
    """At 1 Mbit/s and with packets lost; no upload is lost or counted twice."""
    more: dict[str, Any] = {"num_clients": 2, "num_server_rounds": 2, "evaluate_every": 0}
    more |= {"method": "scaffold"}  # which would go wrong by an upload that is counted twice
    reference, _ = federate(tmp_path / "reference", **more)
    folder, failure = over_networks(tmp_path, prefix, cut=20, **more)
    assert not failure, (tmp_path / "log").read_text()
    assert records(folder) == records(reference)
    assert results(folder) == results(reference)
