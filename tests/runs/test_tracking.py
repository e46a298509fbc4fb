"""``track=`` and ``pfedgpa export-metrics``: a run's figures in the dashboards people use."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from pfedgpa_app import cli
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.results import log, tracking
from pfedgpa_app.runs.summary import Summary
from tests.support.federations import federate, records, summary

HOW: dict[str, Any] = {"method": "fedavg,client-mean", "num_server_rounds": 3}


def curve(folder: Path, name: str, key: str) -> dict[int, float]:
    """{round: value}, as TensorBoard reads it."""
    loading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = loading.EventAccumulator(str(folder / "tensorboard" / name))
    events.Reload()
    return {point.step: point.value for point in events.Scalars(key)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorboard", reason="needs pip install 'pfedgpa-app[tensorboard]'")
    return federate(tmp_path_factory.mktemp("tracked"), track="tensorboard", **HOW)[0]


class TestTensorBoard:
    def test_is_told_every_round_and_what_the_methods_came_to(self, folder: Path) -> None:
        losses = curve(folder, "fedavg", "loss/train")
        assert sorted(losses) == [1, 2, 3]
        rounds = log.rounds_of(folder)["fedavg"]
        wanted = tracking.figures_of(rounds[2])["loss/train"]
        assert losses[2] == pytest.approx(wanted, rel=1e-6)
        for method, row in summary(folder).items():
            (kept,) = curve(folder, method, "results/accuracy_kept").values()
            assert kept == pytest.approx(row["accuracy_kept"], rel=1e-6)

    def test_a_client_that_took_no_step_hides_no_loss(self) -> None:
        told = [{"train_loss": loss, "participated": True} for loss in (1.0, math.nan)]
        figures = tracking.figures_of(told)
        assert figures["loss/train"] == 1.0

    def test_a_run_without_track_is_told_afterwards(self, folder: Path, tmp_path: Path) -> None:
        done = federate(tmp_path, **HOW)[0]
        assert not (done / "tensorboard").exists()
        for _ in range(2):  # told anew, not twice
            assert cli.main(["export-metrics", str(done), "--to", "tensorboard"]) == 0
        for key in ("loss/train", "results/accuracy_kept"):
            assert curve(done, "fedavg", key) == curve(folder, "fedavg", key)


class TestOtherDashboards:
    def test_mlflow(self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        client = pytest.importorskip("mlflow.tracking").MlflowClient
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place := f"sqlite:///{tmp_path / 'mlflow.db'}")
        for _ in range(2):  # told anew, not twice
            assert cli.main(["export-metrics", str(folder), "--to", "mlflow"]) == 0
        kept = client(place)
        experiment = kept.get_experiment_by_name("pfedgpa").experiment_id
        runs = {run.data.tags["method"]: run for run in kept.search_runs([experiment])}
        assert set(runs) == {"fedavg", "client-mean"}
        assert runs["fedavg"].data.params["num-server-rounds"] == "3"
        told = kept.get_metric_history(runs["fedavg"].info.run_id, "loss/train")
        wanted = curve(folder, "fedavg", "loss/train")
        assert {point.step: pytest.approx(point.value) for point in told} == wanted

    @pytest.mark.parametrize("status", ["FINISHED", "FAILED"])
    def test_mlflow_says_how_a_run_ended(
        self, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        client = pytest.importorskip("mlflow.tracking").MlflowClient
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place := f"sqlite:///{tmp_path / 'mlflow.db'}")
        ended: Any = contextlib.nullcontext()
        if status == "FAILED":
            ended = pytest.raises(OSError, match="disk")
            monkeypatch.setattr(Summary, "finish", Mock(side_effect=OSError("the disk is full")))
        with ended:
            federate(tmp_path, track="mlflow", **HOW)
        kept = client(place)
        experiment = kept.get_experiment_by_name("pfedgpa").experiment_id
        assert {run.info.status for run in kept.search_runs([experiment])} == {status}

    def test_the_first_runs_of_a_sweep_make_mlflows_file_together(
        self, folder: Path, tmp_path: Path
    ) -> None:
        client = pytest.importorskip("mlflow.tracking").MlflowClient
        environment = {n: v for n, v in os.environ.items() if n != "MLFLOW_TRACKING_URI"}
        program = [sys.executable, "-m", "pfedgpa_app", "export-metrics"]
        names = ["o'brien", "second"]
        for name in names:
            shutil.copytree(folder, tmp_path / name)
        told = [
            subprocess.Popen([*program, str(tmp_path / name), "--to", "mlflow"], env=environment)
            for name in names
        ]
        assert [each.wait() for each in told] == [0, 0]
        kept = client(f"sqlite:///{tmp_path / 'mlflow.db'}")
        experiment = kept.get_experiment_by_name("pfedgpa").experiment_id
        runs = [Path(run.data.tags["folder"]).name for run in kept.search_runs([experiment])]
        assert sorted(runs) == sorted(2 * names)

    def test_wandb_without_an_account(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("wandb", reason="needs pip install 'pfedgpa-app[wandb]'")
        monkeypatch.setenv("WANDB_MODE", "offline")
        assert cli.main(["export-metrics", str(folder), "--to", "wandb"]) == 0
        runs = list((folder / "wandb").glob("offline-run-*/run-*.wandb"))
        assert len(runs) == 2
        assert all(run.stat().st_size for run in runs)


class TestWhatGoesWrong:
    def test_a_missing_library_is_refused_before_anything_starts(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tracking, "find_spec", lambda kind: None)
        with pytest.raises(ConfigError, match=r"pip install 'pfedgpa-app\[mlflow\]'"):
            tracking.require_installed(["mlflow"])

    def test_a_tracker_that_fails_does_not_stop_the_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        closed: list[str] = []

        class Breaks:
            def __init__(self, folder: Path, name: str, settings: Any) -> None:
                self.name = name

            def log(self, figures: tracking.Figures, server_round: int) -> None:
                if self.name == "fedrep":
                    raise OSError("no route to host")

            def close(self, done: bool) -> None:
                closed.append(self.name)
                raise OSError("cannot be closed either")

        monkeypatch.setitem(tracking.TRACKERS, "tensorboard", Breaks)
        told: list[tuple[str, str]] = []
        broken = tracking.Tracking(
            tmp_path, ["tensorboard"], {}, lambda kind, why: told.append((kind, why))
        )
        record = {"accuracy": 50.0, "train_loss": 1.0, "participated": True}
        for federation in ("fedavg", "fedrep", "fedrep"):
            broken.round(federation, 1, [record])
        broken.close(done=True)
        assert told == [("tensorboard", "OSError: no route to host")]
        assert closed == ["fedavg", "fedrep"]  # what it has of the others is kept
        how = {"method": "fedrep", "num_server_rounds": 1, "track": "tensorboard"}
        folder, _ = federate(tmp_path / "ünï cöde", **how)
        [text] = [e["text"] for e in records(folder, "events.jsonl") if "track =" in e["text"]]
        command = shlex.split(text.partition("afterwards: ")[2])
        assert command == ["pfedgpa", "export-metrics", str(folder), "--to", "tensorboard"]
