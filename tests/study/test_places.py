"""Sweeps on clusters: a Slurm of this machine (Ray's is in tests/engine/test_simulation.py)."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.study import places
from tests.support import slurm
from tests.support.federations import PLAIN, records
from tests.support.processes import until

pytest.importorskip("submitit")
ROUNDS = 60


def killed(group: int) -> None:
    """A job with all that it started."""
    leader = psutil.Process(group)
    for process in [leader, *leader.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


@pytest.mark.slow
def test_what_slurm_loses_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    home, out = tmp_path / "slurm", tmp_path / "out"
    slurm.install(home)
    settings = PLAIN | {"method": "fedavg", "num-server-rounds": ROUNDS, "evaluate-every": 0}
    settings |= {"checkpoint-every": 1, "device": "cpu", "report": "false"}
    command = [sys.executable, "-m", "pfedgpa_app", "sweep", "--over", "seed=0,1"]
    command += ["--on", "slurm", "--out", "out", *(f"{k}={v}" for k, v in settings.items())]
    sweep = subprocess.Popen(
        command,
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{home}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    events = out / "demo_seed=0" / "events.jsonl"

    def going() -> bool:
        return events.exists() and "round 2/" in events.read_text()

    until(lambda: sweep.poll() is not None or going())
    if sweep.poll() is None:
        killed(slurm.jobs(home)["1"])
    said, _ = sweep.communicate()
    assert sweep.returncode == 0, said
    assert "demo_seed=0: lost with its machine; it goes on" in said
    assert len(slurm.jobs(home)) == 3
    for seed in (0, 1):
        assert len({r["round"] for r in records(out / f"demo_seed={seed}")}) == ROUNDS
    kinds = [json.loads(line)["kind"] for line in events.read_text().splitlines()]
    assert "resumed" in kinds


def test_without_slurm_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="there is no sbatch on this machine"):
        places.place_of("slurm", tmp_path)


class Nodes:
    """What Ray says of a cluster."""

    def nodes(self) -> list[dict[str, Any]]:
        return [
            {"Alive": True, "Resources": {"CPU": 2.0}},
            {"Alive": True, "Resources": {}},
            {"Alive": False, "Resources": {"CPU": 9.0, "GPU": 1.0}},
        ]


@pytest.mark.parametrize(
    ("settings", "cores", "said"),
    [
        ({"workers": 4}, None, "workers = 4: no machine of the Ray cluster has as many cores now"),
        ({}, 3, "workers = 3: no machine"),
        ({"device": "cuda"}, None, "device = 'cuda': no machine of the Ray cluster has a GPU now"),
        ({"workers": 2}, None, ""),
    ],
)
def test_a_run_for_which_no_machine_is_large_enough_is_warned_of(
    settings: dict[str, Any], cores: int | None, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ray waits for one, which may be started on demand, without a word."""
    cluster = places.RayCluster.__new__(places.RayCluster)
    cluster.ray = Nodes()
    warn_once.cache_clear()
    cluster.check([Config(), Config(**settings)], cores)
    assert said in caplog.text
    assert bool(said) == bool(caplog.text)


def test_a_job_that_raised_is_not_taken_for_a_lost_machine(tmp_path: Path) -> None:
    import submitit

    class Job:
        def done(self) -> bool:
            return True

        def result(self) -> None:
            raise submitit.core.utils.FailedJobError("no GPU there")

    job = places._Job(submitit, Job(), tmp_path)
    assert job.status() == 1
    assert "no GPU there" in job.said()


def test_a_folder_comes_back_in_the_place_of_what_was_there(tmp_path: Path) -> None:
    made, there = tmp_path / "made", tmp_path / "there"
    (made / "weights").mkdir(parents=True)
    (made / "weights" / "a").write_text("1")
    there.mkdir()
    (there / "earlier").write_text("")
    places.unpack(places.pack(made), there)
    assert [str(p.relative_to(there)) for p in sorted(there.glob("**/*"))] == [
        "weights",
        "weights/a",
    ]
    assert list(tmp_path.iterdir()) in ([made, there], [there, made])
    places.unpack(places.pack(tmp_path / "none"), there)
    assert list(there.iterdir()) == []


def test_what_a_sweep_leaves_empty_is_not_given() -> None:
    assert places.command({"head": "", "seed": 1}, Path("app"))[-1] == "seed=1"
    assert not any("head=" in word for word in places.command({"head": ""}, Path("app")))
