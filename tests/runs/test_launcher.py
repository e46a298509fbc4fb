"""What the user is told while a run goes on, and when it no longer does."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.engine import local
from pfedgpa_app.results.log import EVENTS, is_done
from pfedgpa_app.runs import launcher
from pfedgpa_app.runs.launcher import Patience, Watcher, watched
from tests.support.federations import PLAIN, records


def test_how_to_go_on_can_be_pasted() -> None:
    assert "with 'run-name=my run' resume" in launcher.advice(
        resolve({"run-name": "my run"}).config
    )


def test_an_experiment_s_name_is_not_taken_for_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").write_text("notes")
    monkeypatch.chdir(tmp_path)
    settings = {"conf": "demo"}
    there = launcher.with_absolute_paths(settings, resolve(settings).config)
    assert resolve(there).config.conf == "demo"


def test_what_is_printed_is_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = "imagefolder:brain in results/sw[a]: 3 of 4, [bold]all[/bold] " + 90 * "x"
    launcher.plain_console().print(text)
    assert capsys.readouterr().out == text + "\n"


class TestPatience:
    def test_before_the_first_round_a_client_has_its_timeout_but_two_minutes_at_most(self) -> None:
        for timeout, limit in ((30.0, 30.0), (3600.0, 120.0)):
            patience = Patience(timeout, now=0.0)
            patience.hear("start", 5.0)
            assert not patience.is_over(5.0 + limit)
            assert patience.is_over(5.1 + limit)

    def test_then_it_is_a_multiple_of_the_slowest_round(self) -> None:
        patience = Patience(3600.0, now=0.0)
        for now in (100.0, 140.0, 150.0):  # the slowest takes 100 s
            patience.hear("round", now)
        assert not patience.is_over(150.0 + 500.0)
        assert patience.is_over(150.0 + 501.0)
        patience.hear("round", 1000.0)  # it took so long: from now on that is usual
        assert not patience.is_over(1000.0 + 4000.0)

    def test_quick_rounds_are_no_reason_to_be_impatient(self) -> None:
        patience = Patience(3600.0, now=0.0)
        patience.hear("round", 0.1)
        assert not patience.is_over(60.0)
        assert patience.is_over(60.2)

    def test_it_is_said_again_when_the_silence_is_twice_as_long(self) -> None:
        patience = Patience(10.0, now=0.0)
        said = [now for now in range(100) if patience.is_over(float(now))]
        assert said == [11, 23, 47, 95]


class TestWatcher:
    def watcher(self, folder: Path) -> tuple[Watcher, Console]:
        console = Console(record=True, width=500, file=(folder / "out").open("w"))
        return Watcher(
            folder / EVENTS, console, Patience(0.0, time.monotonic() - 95), "stop"
        ), console

    def test_it_says_who_waits_for_whom_and_how_to_go_on(self, tmp_path: Path) -> None:
        watcher, console = self.watcher(tmp_path)
        watcher.poll(lambda: "the server waits for client 3")
        watcher.poll()
        text = console.export_text()
        assert "nothing has happened for 1:35; the server waits for client 3; stop" in text
        assert [e["kind"] for e in records(tmp_path, EVENTS)] == ["stalled"]  # for sweeps, too
        assert watcher.last == ""  # it is no word of the run's

    def test_not_where_the_run_goes_on_in_the_meantime(self, tmp_path: Path) -> None:
        watcher, console = self.watcher(tmp_path)

        def explain() -> str:
            event = {"kind": "round", "text": "round 1"}
            (tmp_path / EVENTS).write_text(json.dumps(event) + "\n")
            return "the server waits for nobody"

        watcher.poll(explain)
        assert "nothing has happened" not in console.export_text()

    def test_a_run_that_is_done_stays_done(self, tmp_path: Path) -> None:
        watcher, _ = self.watcher(tmp_path)
        (tmp_path / EVENTS).write_text(json.dumps({"kind": "done", "text": "done"}) + "\n")
        watcher.poll()
        watcher.patience.heard -= 1000.0
        watcher.poll()
        assert is_done(tmp_path)


def served() -> list[psutil.Process]:
    """The server and its workers, copies of a fork server, in the order of their starts."""
    children = psutil.Process().children()  # there may be Flower's, too
    servers = [child for child in children if "forkserver" in " ".join(child.cmdline())]
    copies = [copy for server in servers for copy in server.children()]
    return sorted(copies, key=psutil.Process.create_time)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["worker", "server"])
def test_a_run_that_stands_still_is_explained_and_ends_when_it_is_told_to(
    who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker, or its server, is stopped as if it waited for something that never comes."""
    monkeypatch.setattr(launcher.Patience, "LEAST", 2.0)
    monkeypatch.setattr(launcher.Patience, "MOST_AT_FIRST", 600.0)
    monkeypatch.setattr(local, "_PATIENCE", 1.0)
    settings = PLAIN | {"method": "fedavg", "num-server-rounds": 100_000, "workers": 1}
    settings |= {"out-dir": str(tmp_path), "run-name": "run"}
    config, folder = resolve(settings).config, tmp_path / "run"
    folder.mkdir()
    console = Console(record=True, width=2000, file=(tmp_path / "out").open("w"))
    frozen: list[psutil.Process] = []

    def run_it(poll: Any) -> str:
        def freeze(explain: Callable[[], str] = lambda: "") -> None:
            poll(explain)
            begun = (folder / EVENTS).exists()
            kinds = [event["kind"] for event in records(folder, EVENTS)] if begun else []
            if kinds.count("round") >= 2 and not frozen:
                server, *_, worker = served()
                frozen.append(worker if who == "worker" else server)
                frozen[0].suspend()
            if "stalled" in kinds:
                raise KeyboardInterrupt

        return local.run(APP_DIR, settings, tmp_path / "log", freeze)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        watched(folder, console, config, run_it)
    assert time.monotonic() - started < 300
    event, *_ = [e for e in records(folder, EVENTS) if e["kind"] == "stalled"]
    assert "nothing has happened for 0:" in event["text"]
    assert "run-name=run resume=true" in event["text"]
    if who == "worker":
        assert f"(process {frozen[0].pid}, 0 % CPU, for 0:" in event["text"]
    else:
        assert f"the server (process {frozen[0].pid}, 0 % CPU) does not answer" in event["text"]
    psutil.wait_procs(served(), timeout=10)  # workers end soon after their server
    assert not served()
