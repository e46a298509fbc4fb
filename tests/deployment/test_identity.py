"""Nodes that come, go and change in the middle of a run: each client stays who it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data.client import forget
from pfedgpa_app.methods.ditto import Ditto
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.server.roster import Roster
from tests.support.federations import PLAIN, federate, records
from tests.support.local_grid import InProcessGrid

ROWS, LABELS = np.random.default_rng(0).normal(size=(40, 4)), np.arange(40) % 3


def table(path: Path, rows: np.ndarray = ROWS, labels: np.ndarray = LABELS) -> str:
    np.savez(path, x=rows, y=labels)
    return f"npz:{path}"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def federation(tmp_path: Path, **settings: Any) -> InProcessGrid:
    """Two sites, each with rows and a state-dir of its own."""
    config = PLAIN | {"dataset": "nodes", "num-clients": 2, "model": "mlp", "method": "fedavg"}
    config |= {"out-dir": str(tmp_path), "run-name": "run", "num-server-rounds": 3}
    grid = InProcessGrid(config | settings, 2)
    for site, context in enumerate(grid.contexts.values()):
        context.node_config["dataset"] = table(tmp_path / f"{site}.npz")
        context.node_config["state-dir"] = str(tmp_path / f"state-{site}")
    return grid


def start(grid: InProcessGrid) -> Path:
    forget()
    return run(grid, resolve(next(iter(grid.contexts.values())).run_config))


def arrived(grid: InProcessGrid, node: int, like: Context, dataset: str = "") -> None:
    """Have another node connect, with the partition-id of the one ``like`` which it is."""
    own = {"dataset": dataset} if dataset else {}
    config = {**like.node_config, **own}
    grid.contexts[node] = Context(like.run_id, node, config, RecordDict(), like.run_config)


def test_a_second_node_waits_until_the_first_with_its_id_has_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = federation(tmp_path)
    first, _ = grid.contexts
    roster = Roster(grid, 2, 0.5, True)
    arrived(grid, 7, grid.contexts[first])
    roster.poll()
    assert roster.node_of(0) == first
    said = f"node 7 has partition-id=0 like node {first}, which is still connected: it takes no"
    assert said in caplog.text
    del grid.contexts[first]
    roster.poll()
    assert roster.node_of(0) == 7


def test_one_that_was_killed_is_followed_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower takes a minute to notice; should the first come back, it serves its client again."""
    grid = federation(tmp_path)
    first, second = grid.contexts
    context = grid.contexts[first]
    roster = Roster(grid, 2, 0.5, True)
    arrived(grid, 7, context)
    serve = grid.serve

    def without_first(messages: list[Message], timeout: float | None) -> list[Message]:
        return serve([m for m in messages if m.metadata.dst_node_id != first], timeout)

    monkeypatch.setattr(grid, "serve", without_first)
    roster.poll()
    assert roster.node_of(0) == 7
    del grid.contexts[7]
    roster.poll()
    assert roster.node_of(0) == first
    del grid.contexts[first]
    roster.poll()
    assert not roster.is_here(0)
    assert roster.node_of(1) == second


def test_a_node_that_comes_with_other_classes_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = federation(tmp_path)
    first, _ = grid.contexts
    roster = Roster(grid, 2, 0.5, True)
    arrived(grid, 7, grid.contexts.pop(first), table(tmp_path / "new.npz", labels=LABELS % 2))
    roster.poll()
    assert not roster.is_here(0)
    assert "node 7 with partition-id=0 takes no part: nodes' data do not match" in caplog.text


def interrupted(grid: InProcessGrid, after: int) -> None:
    """Run until the end of round ``after``."""

    def cut(message: Message, reply: Message) -> Message:
        if message.content.config_records["config"]["round"] == after + 1:
            raise InterruptedError
        return reply

    grid.tamper = cut
    with pytest.raises(InterruptedError):
        start(grid)


@pytest.mark.parametrize("state_dir", [True, False])
def test_a_supernode_that_starts_again_with_other_data(tmp_path: Path, state_dir: bool) -> None:
    """With the same key it is the same node, and is not asked again who it is."""
    grid = federation(tmp_path, **{"checkpoint-every": 0})  # so the run gives it no folder
    second = list(grid.contexts.values())[1]
    if not state_dir:
        del second.node_config["state-dir"]
    other = table(tmp_path / "x.npz", ROWS[::-1]) if state_dir else ""  # the same classes
    other = other or table(tmp_path / "x.npz", labels=LABELS % 2)

    def again(message: Message, reply: Message) -> Message:
        if message.content.config_records["config"]["round"] == 2:
            second.node_config["dataset"] = other
            second.state = RecordDict()
            forget()
        return reply

    grid.tamper = again
    folder = start(grid)
    said = " ".join(event["text"] for event in records(folder, "events.jsonl"))
    what = "differ from what it has read before" if state_dir else "have other classes"
    assert f"round 3: client 1 failed (code 2): DataError: this node's data {what}" in said
    assert {(r["round"], r["client"]) for r in records(folder) if r["participated"]} >= {(3, 0)}


def test_a_resumed_run_leaves_out_a_site_whose_examples_have_changed(tmp_path: Path) -> None:
    """Among its test examples are some that were trained on."""
    interrupted(federation(tmp_path, **{"checkpoint-every": 1}), after=2)
    grid = federation(tmp_path, **{"checkpoint-every": 1, "resume": True, "timeout": 1.5})
    table(tmp_path / "1.npz", ROWS[::-1])
    folder = start(grid)
    said = " ".join(event["text"] for event in records(folder, "events.jsonl"))
    assert "partition-id=1: this node's data differ from what it has read before" in said
    assert "the run goes on without partition-id 1" in said


def test_a_state_dir_that_cannot_be_written_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grid = federation(tmp_path)
    for context in grid.contexts.values():
        (tmp_path / "a-file").touch()
        context.node_config["state-dir"] = str(tmp_path / "a-file")
    assert records(start(grid))
    assert "cannot be written" in caplog.text


def test_a_resumed_run_refuses_other_classes_at_every_site(tmp_path: Path) -> None:
    interrupted(federation(tmp_path, **{"checkpoint-every": 1}), after=2)
    grid = federation(tmp_path, **{"checkpoint-every": 1, "resume": True})
    for site, context in enumerate(grid.contexts.values()):
        del context.node_config["state-dir"]
        table(tmp_path / f"{site}.npz", labels=np.array(["x", "y", "z"])[LABELS])
    with pytest.raises(ConfigError, match=r"resume: the run began with .*0, 1, 2.*x, y, z"):
        start(grid)


def test_a_state_that_was_never_kept_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients whose own networks go to infinity keep none."""
    monkeypatch.setattr(Ditto, "check", lambda config: None)  # which refuses this
    folder, _ = federate(tmp_path, method="ditto", num_server_rounds=2, **{"ditto.lam": 1e4})
    assert not [e for e in records(folder, "events.jsonl") if "no longer has" in e["text"]]


def test_what_a_site_has_lost_is_told(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "fedper", "checkpoint-every": 1, "evaluate-every": 0}
    interrupted(federation(tmp_path, **how), after=2)
    shutil.rmtree(tmp_path / "state-1")
    grid = federation(tmp_path, **how, resume=True)
    folder = start(grid)
    said = [event["text"] for event in records(folder, "events.jsonl")]
    [text] = [each for each in said if "no longer has what it kept" in each]
    assert text.startswith("fedper round 3: client 1 no longer has what it kept between rounds")


def test_nobody_is_evaluated_without_what_it_kept(tmp_path: Path) -> None:
    grid = federation(tmp_path, **{"method": "fedper", "evaluate-every": 0})
    second = list(grid.contexts.values())[1]

    def lose(message: Message, reply: Message) -> Message:
        if message.content.config_records["config"]["round"] == 3:
            shutil.rmtree(tmp_path / "state-1", ignore_errors=True)
            second.state = RecordDict()
        return reply

    grid.tamper = lose
    folder = start(grid)
    said = " ".join(event["text"] for event in records(folder, "events.jsonl"))
    assert "last evaluation: client 1 failed" in said
    assert "no longer has what it kept for FedPer" in said
    assert {row["client"] for row in records(folder, "clients.jsonl")} == {0}
