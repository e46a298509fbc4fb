"""A run that is killed goes on, and ends like one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from safetensors.torch import load_file

from pfedgpa_app import checkpoint, cli
from pfedgpa_app.checkpoint import MANIFEST, Checkpoint, CheckpointError
from pfedgpa_app.config import APP_DIR
from pfedgpa_app.diffusion.buffer import Buffer
from pfedgpa_app.experiment import CHECKPOINT
from pfedgpa_app.methods.cfl import Cluster
from pfedgpa_app.methods.fedavg import FedAvgState
from pfedgpa_app.settings import ConfigError
from tests.test_federation import SMALL, federate, records, summary

# federations whose server or clients keep something of their own between rounds
STATEFUL = ["fedavgm", "scaffold", "fedper", "fedala", "fedproto", "ditto", "pfedme", "cfl"]
STATEFUL += ["fedfomo", "pfedhn", "pfedgpa"]


class KilledError(RuntimeError):
    """What stands for a kill within this process."""


def killer(after: int) -> Any:
    """Clients that answer ``after`` messages, and no more."""
    answered = 0

    def tamper(message: Message, reply: Message) -> Message:
        nonlocal answered
        answered += 1
        if answered > after:
            raise KilledError
        return reply

    return tamper


def results(folder: Path) -> dict[str, Any]:
    """All figures and weights; times and memory are no figures."""
    rows = summary(folder)
    for row in rows.values():
        del row["server_seconds"], row["peak_memory_mib"]
    weights = {
        f"{path.stem}/{name}": tensor
        for path in sorted(folder.glob("weights/*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    return {
        "rows": rows,
        "metrics": records(folder),
        "clients": records(folder, "clients.jsonl"),
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
    }


def check_same(folder: Path, reference: Path) -> None:
    for kind, expected in results(reference).items():
        assert results(folder)[kind] == expected, kind
    assert not (folder / CHECKPOINT).exists()


@pytest.mark.parametrize("method", STATEFUL)
def test_every_method_ends_bit_for_bit_as_if_nothing_had_happened(
    method: str, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"method": method, "fraction_train": 0.75, "num_server_rounds": 3}
    reference, _ = federate(tmp_path / "reference", **how)
    for after in (9, 16):  # within the second round, and within the third
        out = tmp_path / str(after)
        with pytest.raises(KilledError):
            federate(out, killer(after), **how)
        folder, _ = federate(out, resume=True, **how)
        check_same(folder, reference)
        [resumed] = [e for e in records(folder, "events.jsonl") if e["kind"] == "resumed"]
        assert f"of {method}" in resumed["text"]


def test_between_federations_and_in_the_final_evaluation(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "fedavg,client-mean,fedper,pfedgpa-once"}
    how |= {"num_server_rounds": 2, "join_clients": 1, "join_iterations": 1}
    reference, grid = federate(tmp_path / "reference", **how)
    sent = sum(message.metadata.message_type != "query" for message in grid.sent)
    for after in (2, 13, 20, 26, 40, sent - 2):
        out = tmp_path / str(after)
        with pytest.raises(KilledError):
            federate(out, killer(after), **how)
        folder, _ = federate(out, resume=True, **how)
        check_same(folder, reference)
        assert records(folder, "joining.jsonl") == records(reference, "joining.jsonl")


def test_killed_again_and_again(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "pfedgpa", "num_server_rounds": 4, "evaluate_every": 9}
    reference, _ = federate(tmp_path / "reference", **how)
    for _ in range(4):
        with pytest.raises(KilledError):
            federate(tmp_path / "out", killer(9), resume=True, **how)
    folder, _ = federate(tmp_path / "out", resume=True, **how)
    check_same(folder, reference)


def test_a_killed_process(tmp_path: Path) -> None:
    """SIGKILL to everything that ``pfedgpa run`` started, at some moment of round 3."""
    settings = SMALL | {"method": "fedper,pfedgpa", "num-server-rounds": 5, "workers": 1}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "pfedgpa_app", "run", "--engine", "process", *words]
    env = os.environ | {"PYTHONPATH": str(APP_DIR)}

    def run(name: str, *more: str) -> list[str]:
        return [*command, f"out-dir={tmp_path}", f"run-name={name}", *more]

    subprocess.run(run("reference"), env=env, check=True, capture_output=True)
    process = subprocess.Popen(
        run("killed"), env=env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    events = tmp_path / "killed" / "events.jsonl"
    deadline = time.monotonic() + 600
    while not (events.exists() and "fedper round 3/5" in events.read_text()):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    refused = subprocess.run(run("killed"), env=env, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "resume=true" in refused.stderr
    done = subprocess.run(run("killed", "resume=true"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the run goes on after round" in done.stdout
    check_same(tmp_path / "killed", tmp_path / "reference")
    again = subprocess.run(run("killed", "resume=true"), env=env, capture_output=True, text=True)
    assert again.returncode == 0  # nothing is left to do


class TestRefused:
    def interrupted(self, out: Path) -> Path:
        with pytest.raises(KilledError):
            federate(out, killer(9), method="fedavg")
        return out / "run" / CHECKPOINT

    def test_other_settings(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path)
        with pytest.raises(ConfigError, match=r"learning-rate = 0\.\d+ there, 0\.5 here"):
            federate(tmp_path, method="fedavg", resume=True, learning_rate=0.5)
        federate(tmp_path, method="fedavg", resume=True, timeout=77.0)

    def test_no_name(self, tmp_path: Path) -> None:
        words = ["run", f"out-dir={tmp_path}", "resume=true"]
        assert cli.main(words) == 2

    def test_a_foreign_format(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": "pfedgpa-checkpoint-9"}))
        with pytest.raises(ConfigError, match="'pfedgpa-checkpoint-9', and this version reads"):
            federate(tmp_path, method="fedavg", resume=True)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
    def test_a_manifest_that_is_none(self, tmp_path: Path, content: bytes) -> None:
        folder = self.interrupted(tmp_path)
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(ConfigError, match=r"resume: .*checkpoint\.json: "):
            federate(tmp_path, method="fedavg", resume=True)

    def test_tensors_that_are_not_whole(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        newest = max(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
        newest.write_bytes(newest.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="is not whole"):
            federate(tmp_path, method="fedavg", resume=True)

    def test_half_written_files_are_never_read(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        (folder / (MANIFEST + ".new")).write_text("{")
        (folder / "77.safetensors.new").write_bytes(b"half")
        (folder / "78.safetensors").write_bytes(b"of a checkpoint without a manifest")
        federate(tmp_path, method="fedavg", resume=True)


def test_a_full_disk_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    reference, _ = federate(tmp_path / "reference", method="fedavg", num_server_rounds=2)
    monkeypatch.setattr(checkpoint, "save_file", full)
    folder, _ = federate(tmp_path / "full", method="fedavg", num_server_rounds=2)
    warnings = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
    assert any("No space left on device" in text for text in warnings)
    assert results(folder) == results(reference)


class TestCheckpoint:
    def test_round_trip(self, tmp_path: Path) -> None:
        weights = {"a.weight": torch.randn(2, 3), "b": torch.tensor(1.5, dtype=torch.float16)}
        buffer = Buffer(2)
        for server_round in (1, 2, 3):
            buffer.add(server_round, 5, weights)
            buffer.drop_old(server_round)
        state = FedAvgState(weights, buffer, labels={3: [1, 2]}, generated={5: weights})
        clusters = [Cluster([0, 2], weights, {0: torch.ones(2)}, {0: 10})]
        parts = {"state": state, "clusters": clusters, "numbers": np.array([1.5, np.nan])}
        parts["plain"] = {"x": [(1, "two"), None, True, float("inf")], 7: {}}
        Checkpoint(tmp_path).save(parts)
        found = Checkpoint(tmp_path)
        nodes = found.read()
        back = {name: found.restore(node) for name, node in nodes.items()}
        assert torch.equal(back["state"].global_weights["a.weight"], weights["a.weight"])
        assert back["state"].buffer.layout == buffer.layout
        assert list(back["state"].buffer.newest()) == [5]
        assert back["state"].buffer.stack()[2].tolist() == [2, 3]
        assert back["state"].generated[5]["b"].dtype == torch.float16
        assert back["state"].labels == {3: [1, 2]}
        assert back["clusters"][0].updates[0].tolist() == [1, 1]
        assert np.array_equal(back["numbers"], parts["numbers"], equal_nan=True)
        assert back["plain"] == parts["plain"]

    def test_what_is_there_is_not_written_again(self, tmp_path: Path) -> None:
        kept, size = Checkpoint(tmp_path), lambda: sum(p.stat().st_size for p in tmp_path.iterdir())
        big = {k: torch.randn(10_000) for k in range(5)}
        kept.save({"weights": big})
        once = size()
        assert once > 200_000
        kept.save({"weights": big | {9: torch.randn(100)}})
        assert size() < once + 5000
        kept = Checkpoint(tmp_path)
        big = kept.restore(kept.read()["weights"])
        kept.save({"weights": big | {10: torch.randn(100)}})  # nor after a resumption
        assert size() < once + 10_000
        big[0].add_(1)  # it is another tensor now
        kept.save({"weights": big})
        again = Checkpoint(tmp_path)
        assert torch.equal(again.restore(again.read()["weights"])[0], big[0])
        kept.save({"weights": {}})
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]

    def test_a_kill_between_two_files(self, tmp_path: Path) -> None:
        kept = Checkpoint(tmp_path)
        kept.save({"x": torch.ones(3)})
        before = tmp_path / "before"
        shutil.copytree(tmp_path, before)
        kept.save({"x": torch.zeros(3)})
        [newest] = [p for p in tmp_path.glob("*.safetensors") if not (before / p.name).exists()]
        shutil.copy(newest, before)  # the tensors are there, the manifest is not
        found = Checkpoint(before)
        assert found.restore(found.read()["x"]).tolist() == [1, 1, 1]

    def test_nothing_runs(self, tmp_path: Path) -> None:
        kept = Checkpoint(tmp_path)
        for name in ("subprocess:Popen", "pfedgpa_app.cli:main", "os:system"):
            with pytest.raises(CheckpointError):
                kept.restore(["data", name, {}])
        with pytest.raises(TypeError, match="cannot hold a object"):
            kept.save({"x": object()})
