"""Sweeps: many runs on one machine, stopped and resumed."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from pfedgpa_app import cli
from pfedgpa_app.config.parse import argument
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.warning import warn_once
from pfedgpa_app.data.client import forget, load_dataset
from pfedgpa_app.engine import PARENT
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.results.log import SUMMARY, RunLog, is_done, say
from pfedgpa_app.results.tables import seeds_table
from pfedgpa_app.runs.checkpoint import CHECKPOINT, MANIFEST
from pfedgpa_app.runs.folder import CONFIG, locked
from pfedgpa_app.study import sweep
from pfedgpa_app.study.places import Here
from pfedgpa_app.study.plan import PlannedRun, TakenError, expand, read
from pfedgpa_app.study.progress import Lines
from pfedgpa_app.study.sweep import Sweep, shares, table
from pfedgpa_app.training import sgd
from tests.support.federations import PLAIN, federate
from tests.support.processes import alive, until

QUICK = PLAIN | {"method": "fedavg", "num-server-rounds": 2, "device": "cpu"}


def runs(tmp_path: Path, over: dict[str, list[Any]], **more: Any) -> list[PlannedRun]:
    return expand(QUICK | {k.replace("_", "-"): v for k, v in more.items()}, over, tmp_path)


class TestPlan:
    def test_every_combination_in_a_folder_of_its_own(self, tmp_path: Path) -> None:
        over: dict[str, list[Any]] = {"conf": ["demo"], "seed": [0, 1], "pfedgpa.rank": ["auto", 3]}
        planned = runs(tmp_path, over, method="pfedgpa")
        assert [run.name for run in planned] == [
            "demo_seed=0_pfedgpa.rank=auto",
            "demo_seed=0_pfedgpa.rank=3",
            "demo_seed=1_pfedgpa.rank=auto",
            "demo_seed=1_pfedgpa.rank=3",
        ]
        assert [run.config.seed for run in planned] == [0, 0, 1, 1]
        assert [run.config.of(PFedGPASettings).rank for run in planned] == [None, 3, None, 3]
        assert planned[0].settings["run-name"] == planned[0].folder.name
        (odd,) = runs(tmp_path, {"dataset": ["imagefolder:/my/images, of cats"]})
        assert odd.folder.parent == tmp_path  # whatever a value holds

    def test_methods_have_the_settings_that_they_go_by(self, tmp_path: Path) -> None:
        given = {"conf": "demo", "pfedgpa.momentum": 0.5, "batch-size": 7}
        over = {"method": ["fedavg,fedala", ["pfedgpa"], "fedavg, pfedgpa"]}
        averaged, generated, both = expand(given, over, tmp_path)
        assert both.config.of(PFedGPASettings).momentum == 0.5
        assert "pfedgpa.momentum" not in averaged.settings
        assert generated.config.of(PFedGPASettings).momentum == 0.5
        assert averaged.config.batch_size == generated.config.batch_size == 7
        with pytest.raises(ConfigError, match=r"fedprox.mu .* none of this run's methods"):
            expand(given | {"fedprox.mu": 1.0}, over, tmp_path)

    def test_partitions_have_the_settings_that_they_go_by(self, tmp_path: Path) -> None:
        given = {"conf": "demo", "dirichlet-alpha": 0.1}
        even, uneven = expand(given, {"partition": ["iid", "dirichlet"]}, tmp_path)
        assert "dirichlet-alpha" not in even.settings
        assert uneven.config.dirichlet_alpha == 0.1
        with pytest.raises(ConfigError, match=r"dirichlet-alpha .* partition=dirichlet"):
            expand(given, {"partition": ["iid", "shards"]}, tmp_path)

    def test_bad_plans_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="seed = -1"):
            runs(tmp_path, {"seed": [0, -1]})
        with pytest.raises(ConfigError, match="same run twice"):
            runs(tmp_path, {"seed": [0, 0]})
        for text, words in (
            ("over: {seed: 3}", "must be a list of values"),
            ("seeds: [1]", "may have settings: and over:, and nothing else"),
            ("over: [1]", "must map"),
            ("{", "not valid YAML"),
        ):
            (tmp_path / "plan.yaml").write_text(text)
            with pytest.raises(ConfigError, match=words):
                read(tmp_path / "plan.yaml")
        with pytest.raises(ConfigError, match="cannot be read"):
            read(tmp_path / "none.yaml")

    def test_what_is_not_ours_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "demo_seed=0").mkdir()
        runs(tmp_path, {"seed": [0]})  # empty: as a run leaves it that was killed at once
        (tmp_path / "demo_seed=0" / "thesis.tex").write_text("years of work")
        with pytest.raises(TakenError, match="not a run's folder"):
            runs(tmp_path, {"seed": [0]})
        refused = pytest.raises(ConfigError, match="another sweep")
        with locked(tmp_path, "another sweep"), refused, locked(tmp_path, "another sweep"):
            pass
        with locked(tmp_path, "another sweep"):
            pass

    def test_an_unfinished_run_of_other_settings_is_not_thrown_away(self, tmp_path: Path) -> None:
        [run] = runs(tmp_path, {"seed": [0]})
        folder = run.folder
        (folder / CHECKPOINT).mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(run.resolved.as_dict()))
        (folder / CHECKPOINT / MANIFEST).write_text("{}")
        runs(tmp_path, {"seed": [0]})
        other = {"learning-rate": 0.002}
        with pytest.raises(TakenError, match=r"other settings \(learning-rate = .* there"):
            runs(tmp_path, {"seed": [0]}, **other)
        RunLog(folder, 1, 1.0).failed(OSError(28, "No space left on device"))
        [again] = runs(tmp_path, {"seed": [0]})
        assert again.can_go_on()
        say(folder, "failed", "too hot", 0.5)
        assert not again.can_go_on()
        runs(tmp_path, {"seed": [0]}, **other)  # nothing is lost
        (folder / SUMMARY).write_text("[]")
        with pytest.raises(TakenError, match="other settings"):
            runs(tmp_path, {"seed": [0]}, **other)

    def test_results_of_other_data_are_not_mixed_in(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One seed's run is there when the partition's file is edited."""
        monkeypatch.chdir(tmp_path)
        digits = load_dataset(Config(dataset="digits"))
        lines = [f"train/{i},{i % 4}" for i in range(len(digits.train_labels))]
        lines += [f"test/{i},{i % 4}" for i in range(len(digits.test_labels))]
        Path("who.csv").write_text("\n".join(["sample,client", *lines]))
        dealt = {"dataset": "digits", "partition": "file:who.csv", "num-clients": 4}
        settings = QUICK | dealt | {"num-server-rounds": 1, "report": False}
        settings |= {"train-per-client": "auto", "test-per-client": "auto"}
        [first] = expand(settings, {"seed": [0]}, tmp_path / "out")
        federate(tmp_path, **{k.replace("-", "_"): v for k, v in first.settings.items()})
        lines[0] = "train/0,3"
        Path("who.csv").write_text("\n".join(["sample,client", *lines]))
        forget()  # as in a process of its own
        monkeypatch.setattr(sweep, "_run_all", lambda *_: pytest.fail("it ran"))
        words = ["sweep", "--over", "seed=0,1", "--out", "out"]
        words += [f"{k}={argument(v)}" for k, v in settings.items()]
        assert cli.main(words) == 2
        assert "seed=0 holds a run with other data" in capsys.readouterr().err

    def test_the_machine_is_shared_out_and_never_oversubscribed(self, tmp_path: Path) -> None:
        over = {"seed": list(range(10))}
        many, one = runs(tmp_path, over), runs(tmp_path, {"seed": [0]})
        assert shares(many, None, [4]) == (4, 1)
        assert shares(many, None, [32]) == (10, 3)
        assert shares(many, 3, [16]) == (3, 5)
        assert shares(one, None, [4]) == (1, 4)
        assert shares(runs(tmp_path, over, workers=2), None, [8]) == (4, None)
        assert shares(runs(tmp_path, over, engine="ray"), None, [8]) == (1, None)
        assert shares(runs(tmp_path, over, engine="batched"), None, [8]) == (1, None)
        assert shares(many, None, [2, 4]) == (6, 1)
        assert shares(one, None, [2, 4]) == (1, 2)  # no run is on two machines
        assert shares(runs(tmp_path, over, engine="batched"), None, [8, 8]) == (2, None)
        on_gpus = runs(tmp_path, over, device="cuda")  # of which this machine has none
        assert shares(on_gpus, None, [8, 8], here=False) == (2, None)
        for jobs in (None, 1, 2, 3, 8, 50):
            for cores in (1, 2, 8, 12):
                at_once, workers = shares(many, jobs, [cores])
                assert workers
                assert at_once * workers <= max(cores, jobs or 0)

    def test_time_left_is_by_what_was_done_since_it_began(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def say(progress: float) -> None:
            event = {"kind": "round", "text": "", "progress": progress}
            (run.folder / "events.jsonl").write_text(json.dumps(event) + "\n")

        (run,) = planned = runs(tmp_path, {"seed": [0]})
        run.folder.mkdir()
        monkeypatch.setattr(PlannedRun, "can_go_on", lambda _: True)
        monkeypatch.setattr("pfedgpa_app.study.places.subprocess.Popen", lambda *_, **__: None)
        now = iter([100.0, 110.0])
        monkeypatch.setattr("pfedgpa_app.study.sweep.time.monotonic", lambda: next(now))
        going = Sweep(planned, tmp_path, 1, None, Lines(Console(file=io.StringIO())))
        say(0.8)  # when it was stopped
        going._begin(going.waiting.pop())
        assert going.state() == "0/1 done"
        say(0.9)
        assert going.state() == "0/1 done, 0:10 left"

    def test_means_over_seeds(self) -> None:
        def row(title: str, a: float, b: float | None) -> dict[str, Any]:
            return {"title": title, "a": a, "b": b}

        seeds = [[row("x", 1.0, 2.0), row("y", 5.0, None)], [row("x", 3.0, 2.0), row("y", 5.0, 1)]]
        # mean 2, deviation sqrt(((1 − 2)² + (3 − 2)²) / (2 − 1)) = 1.41; nobody has a c
        assert seeds_table(seeds, {"A": "a", "B": "b", "C": "c"}).splitlines() == [
            "| method | A | B |",
            "| --- | --- | --- |",
            "| x | 2.00 ± 1.41 | 2.00 ± 0.00 |",
            "| y | 5.00 ± 0.00 | 1.00 |",
        ]
        assert seeds_table(seeds[:1], {"B": "b"}).splitlines()[2:] == ["| x | 2.00 |", "| y | – |"]

    def test_memory_is_the_processs_which_ran_earlier_methods_too(self) -> None:
        rows = [{"title": title, "peak_memory_mib": 5.0} for title in ("x", "y")]
        assert table([rows]).splitlines()[0] == "| method | peak MiB so far |"

    def test_clients_that_join_have_a_column_for_each_upload(self) -> None:
        seeds: list[list[dict[str, Any]]] = [
            [{"title": "x", "accuracy_of_joining_clients": [10.0, first]}, {"title": "y"}]
            for first in (20.0, 30.0)
        ]
        assert table(seeds).splitlines() == [
            "| method | joined | joined, after 1 |",
            "| --- | --- | --- |",
            "| x | 10.00 ± 0.00 | 25.00 ± 7.07 |",
            "| y | – | – |",
        ]


def command(*arguments: str, **settings: Any) -> list[str]:
    named = QUICK | {key.replace("_", "-"): value for key, value in settings.items()}
    words = [f"{key}={value}" for key, value in named.items()]
    return [sys.executable, "-m", "pfedgpa_app", "sweep", *words, *arguments, "--out", "out"]


@pytest.mark.slow
def test_a_sweep_skips_what_is_done_and_repeats_what_was_broken_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    federate(tmp_path, method="pfedgpa-once", num_server_rounds=1, run_name="before")
    again = command("--over", "seed=0,1", start_from="before")[3:]  # a path as seen from here
    assert cli.main(again) == 0
    said = capsys.readouterr().out
    assert "2/2 done" in said
    assert "left" in said
    first, second = (tmp_path / "out" / f"demo_seed={seed}" for seed in (0, 1))
    accuracies = [
        json.loads((f / "summary.json").read_text())[0]["accuracy_before_ft"]
        for f in (first, second)
    ]
    mean = sum(accuracies) / 2
    written = (tmp_path / "out" / "sweep.md").read_text()
    assert f"| FedAvg | {mean:.2f} ± " in written
    assert "Seeds 0, 1: means ± one standard deviation over them." in written
    assert "Not in these tables" not in written
    # one is broken off: its last event is gone, and half a line is left
    events = (second / "events.jsonl").read_text().splitlines(keepends=True)
    (second / "events.jsonl").write_text("".join(events[:-2]) + events[-2][:20])
    assert not is_done(second)
    old = (first / "events.jsonl").stat().st_mtime_ns
    results = (second / "metrics.jsonl").read_text()
    assert cli.main(again) == 0
    said = capsys.readouterr().out
    assert "1 of 2 runs are done already" in said
    assert "demo_seed=0: started" not in said
    assert (first / "events.jsonl").stat().st_mtime_ns == old
    assert is_done(second)
    assert (second / "metrics.jsonl").read_text() == results  # from its start, not appended
    assert cli.main(command("--over", "seed=1", start_from="before")[3:]) == 0
    assert "Not in these tables: 1 more finished runs in out/." in capsys.readouterr().out
    assert cli.main([*again, "learning-rate=0.5"]) == 2
    assert "learning-rate = 0.02 there, 0.5 here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # a learning rate that drives the weights to infinity: no usable upload
    monkeypatch.chdir(tmp_path)
    assert cli.main(command("--over", "learning-rate=0.02,1e30", "--jobs", "1")[3:]) == 1
    said = capsys.readouterr().out
    assert "1/2 done" in said
    assert "failed: pfedgpa: the run failed: round 1 of fedavg: none of 4 clients" in said
    assert is_done(tmp_path / "out" / "demo_learning-rate=0.02")
    written = (tmp_path / "out" / "sweep.md").read_text()
    assert "learning-rate = 0.02" in written
    assert "Without a result, so in no table: demo_learning-rate=1e+30." in written


def test_what_cannot_run_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, words in (
        (["--over", "sed=1"], "did you mean seed?"),
        (["--over", "seed=1,x"], "must be a whole number"),
        ([], "nothing to sweep over"),
        (["--over", "num-server-rounds=2,3"], "num-server-rounds=2: the sweep varies it over 2, 3"),
        (["--over", "seed=1", "--jobs", "0"], "--jobs 0"),
        (["--over", "seed=1", "run-name=mine"], "use --out"),
    ):
        assert cli.main(command(*arguments)[3:]) == 2, arguments
        assert words in capsys.readouterr().err
    assert cli.main(["sweep", "--over", "train-per-client=60,90000", "--out", "out"]) == 2
    assert "one client should hold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


NOISY = """
import sys

def load():
    sys.stderr.buffer.write(b"reading \\xff\\r" * 20_000)  # more than a pipe holds
    raise ValueError("no table there")
"""


@pytest.mark.slow
def test_a_run_is_not_held_up_by_what_the_users_own_code_says(tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    (run,) = runs(tmp_path, {"seed": [0]}, dataset="noisy:load", code_dir=str(tmp_path))
    going: Any = Here().start(run.settings, APP_DIR, run.folder, 1)
    try:
        until(lambda: going.status() is not None, 300)
    finally:
        going.process.kill()
    said = going.said()
    assert "reading" in said
    assert said.endswith(": no table there\n")


def test_what_is_told_of_a_failed_run_is_what_we_said(tmp_path: Path) -> None:
    class Failed:
        def status(self) -> int:
            return 1

        def said(self) -> str:
            return "reading 1\rreading 2\rpfedgpa: the run failed: no uploads\n"

        def event(self) -> dict[str, Any]:
            return {}

    place = Here()
    place.start = lambda *_: Failed()  # type: ignore[assignment, method-assign]
    (run,) = runs(tmp_path, {"seed": [0]})
    going = Sweep([run], APP_DIR, 1, 1, Lines(Console(file=io.StringIO())), place)
    going.run_all()
    assert going.failed == {run.name: "failed: pfedgpa: the run failed: no uploads"}


def test_a_precision_that_this_machine_must_emulate_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sgd, "bfloat16_is_emulated", lambda device: True)
    monkeypatch.setattr(sweep, "_run_all", lambda *_: True)
    warn_once.cache_clear()
    every = runs(tmp_path, {"precision": ["float32", "bfloat16"], "seed": [0, 1]})
    assert sweep.run_sweep(every, tmp_path, APP_DIR, 1)
    [said] = caplog.messages
    assert said.startswith("precision = bfloat16: this CPU has no instructions for it")


def stopped(folder: Path, sign: signal.Signals) -> int:
    """The exit status of a sweep that is sent ``sign`` after its run's third round.

    It leaves nothing running.
    """
    process = subprocess.Popen(
        command("--over", "seed=0", num_server_rounds=100),
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(APP_DIR)},
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    events = folder / "out" / "demo_seed=0" / "events.jsonl"
    while not (events.exists() and "round 3/100" in events.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    assert len(children) >= 3  # a run, its server and its worker
    process.send_signal(sign)
    status = process.wait(timeout=600)
    while any(map(alive, children)):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not is_done(events.parent)
    return status


@pytest.mark.slow
def test_a_sweep_that_is_stopped_goes_on_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stopped(tmp_path, signal.SIGTERM) == 130
    shutil.rmtree(tmp_path / "out")
    assert stopped(tmp_path, signal.SIGKILL) == -9
    assert PARENT not in os.environ
    monkeypatch.chdir(tmp_path)
    assert cli.main(command("--over", "seed=0", num_server_rounds=100)[3:]) == 0
    folder = tmp_path / "out" / "demo_seed=0"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    [resumed] = [event["text"] for event in events if event["kind"] == "resumed"]
    assert "the run goes on after round" in resumed
    rounds = [event["text"].split()[2] for event in events if event["kind"] == "round"]
    assert rounds[:3] == ["1/100", "2/100", "3/100"]
    assert rounds[-1] == "100/100"
    assert len(rounds) <= 101  # the one that was going on when it was killed comes twice
