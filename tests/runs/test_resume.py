"""A run that is killed goes on, and ends like one that was not."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from rich.console import Console
from safetensors.torch import save_file
from torch import nn

from pfedgpa_app import cli, load_client
from pfedgpa_app.cli.options import parse_overrides
from pfedgpa_app.config.resolve import Resolved, resolve
from pfedgpa_app.core import files
from pfedgpa_app.core.files import replacing
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.uploads import Buffer, Entry
from pfedgpa_app.core.weights import Layout
from pfedgpa_app.diffusion.network import fit_network
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.diffusion.settings import DiffusionSettings
from pfedgpa_app.methods.cfl import Cluster
from pfedgpa_app.methods.pfedgpa import PFedGPAState
from pfedgpa_app.results.log import Records, RunLog, is_done, last_event
from pfedgpa_app.runs import checkpoint
from pfedgpa_app.runs import summary as summary_module
from pfedgpa_app.runs.checkpoint import CHECKPOINT, MANIFEST, Checkpoint, CheckpointError
from pfedgpa_app.runs.folder import is_running, locked, run_folder
from pfedgpa_app.runs.launcher import watched
from pfedgpa_app.server.screening import NoUploadsError
from tests.support.federations import SMALL, federate, records, results, small

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


def flip(path: Path) -> None:
    """One bit of its last digit or tensor; a float's 17th digit may change nothing."""
    content = path.read_bytes()
    for place in reversed(range(len(content))):
        changed = bytearray(content)
        changed[place] ^= 1
        if path.suffix == ".json":
            is_digit = chr(content[place]).isdigit()
            if not is_digit or json.loads(bytes(changed)) == json.loads(content):
                continue
        path.write_bytes(changed)
        return


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
    out = tmp_path / "out"
    for _ in range(2):  # within the second round, and within the third
        with pytest.raises(KilledError):
            federate(out, killer(9), resume=True, **how)
    folder, _ = federate(out, resume=True, **how)
    check_same(folder, reference)
    resumed = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "resumed"]
    assert [f"of {method}" in text for text in resumed] == [True, True]


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "fedper", "num_server_rounds": 3}
    reference, _ = federate(tmp_path / "reference", **how)
    with pytest.raises(KilledError):
        federate(tmp_path / "out", killer(9), resume=True, **how)
    path = tmp_path / "out" / "run" / CHECKPOINT / MANIFEST
    manifest = json.loads(path.read_text())
    for name in ("keeping", "partitions", "weights"):
        del manifest["parts"][name]
    content = {part: manifest[part] for part in ("files", "parts")}
    manifest["checksum"] = checkpoint._checksum(content)
    path.write_text(json.dumps(manifest))
    folder, _ = federate(tmp_path / "out", resume=True, **how)
    check_same(folder, reference)


@pytest.mark.parametrize("setting", ["start_from", "model_weights"])
def test_a_file_that_a_setting_names_must_be_as_it_was(setting: str, tmp_path: Path) -> None:
    """The federations to come would begin by others than those before."""
    for seed in (0, 1):
        how: dict[str, Any] = {"method": "pfedgpa-once", "num_server_rounds": 1, "seed": seed}
        made, _ = federate(tmp_path / str(seed), **how)
        network = load_client(made, 0).network.state_dict()
        save_file(network, tmp_path / str(seed) / "model_weights.safetensors")
        (made / "distribution.safetensors").rename(made.parent / "start_from.safetensors")
    file = tmp_path / "given.safetensors"
    shutil.copy(tmp_path / "0" / f"{setting}.safetensors", file)
    how = {"method": "fedavg,fedrep", "num_server_rounds": 2, setting: str(file)}
    with pytest.raises(KilledError):
        federate(tmp_path / "out", killer(12), resume=True, **how)
    shutil.copy(tmp_path / "1" / f"{setting}.safetensors", file)
    with pytest.raises(DataError, match=r"the file has changed since .*run began: restore it"):
        federate(tmp_path / "out", resume=True, **how)
    shutil.copy(tmp_path / "0" / f"{setting}.safetensors", file)
    federate(tmp_path / "out", resume=True, **how)


@pytest.mark.parametrize("saving", [True, False])
def test_uploads_may_be_kept_no_longer_but_not_from_the_middle(
    saving: bool, tmp_path: Path
) -> None:
    """Of ``pfedgpa.layers`` alone the rounds before have kept no others."""
    how: dict[str, Any] = {"method": "client-mean,pfedgpa-once", "num_server_rounds": 3}
    how |= {"pfedgpa.layers": 1, "save_uploads": saving}
    reference, _ = federate(tmp_path / "reference", **how)
    with pytest.raises(KilledError):
        federate(tmp_path / "out", killer(10), **how)  # in round 3
    how |= {"save_uploads": not saving, "resume": True}
    if saving:
        folder, _ = federate(tmp_path / "out", **how)
        assert records(folder, "clients.jsonl") == records(reference, "clients.jsonl")
        return
    with pytest.raises(ConfigError, match=r"^save-uploads: earlier rounds .*: go on without"):
        federate(tmp_path / "out", **how)


def test_checkpoints_that_are_rounds_apart(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "scaffold", "num_server_rounds": 6, "checkpoint_every": 3}
    how |= {"evaluate_every": 0}
    reference, _ = federate(tmp_path / "reference", **how)
    with pytest.raises(KilledError):
        federate(tmp_path / "out", killer(22), **how)  # in round 6, whose clients have moved on
    folder, _ = federate(tmp_path / "out", resume=True, **how)
    check_same(folder, reference)


def test_checkpoints_may_come_more_often_after_a_kill(tmp_path: Path) -> None:
    """What clients had kept in rounds that were to come does not push out what they kept since."""
    how: dict[str, Any] = {"method": "scaffold", "num_server_rounds": 7, "evaluate_every": 0}
    reference, _ = federate(tmp_path / "reference", **how)
    out = tmp_path / "out"
    with pytest.raises(KilledError):
        federate(out, killer(26), checkpoint_every=4, **how)  # in round 7, after round 4's
    with pytest.raises(KilledError):
        federate(out, killer(6), resume=True, **how)  # in round 6, after round 5's
    folder, _ = federate(out, resume=True, **how)
    check_same(folder, reference)


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


def test_no_room_for_what_clients_keep_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise it would go on with those clients whose state was written before."""
    write, full = files.write_tensors, [True]

    def until_full(path: Path, *what: Any) -> None:
        if full[0] and path.name.startswith("scaffold.2@3"):
            raise OSError(28, "No space left on device", str(path))
        write(path, *what)

    monkeypatch.setattr("pfedgpa_app.client.memory.write_tensors", until_full)
    how: dict[str, Any] = {"method": "scaffold", "num_server_rounds": 4, "checkpoint_every": 1}
    with pytest.raises(OSError, match="No space left on device"):
        federate(tmp_path, **how)
    end = last_event(tmp_path / "run")
    assert "checkpoint/clients: No space left on device: make room there, then go on" in end["text"]
    full[0] = False
    folder, _ = federate(tmp_path, **how, resume=True)
    whole, _ = federate(tmp_path / "whole", **how)
    assert records(folder) == records(whole)


def test_killed_again_and_again(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "pfedgpa", "num_server_rounds": 4, "evaluate_every": 9}
    reference, _ = federate(tmp_path / "reference", **how)
    for _ in range(4):
        with pytest.raises(KilledError):
            federate(tmp_path / "out", killer(9), resume=True, **how)
    folder, _ = federate(tmp_path / "out", resume=True, **how)
    check_same(folder, reference)


def test_between_gentle_rounds_in_which_not_all_take_part(tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": "pfedgpa", "fraction_train": 0.5, "evaluate_every": 0}
    how |= {"num_server_rounds": 5, "pfedgpa.generate-from": 3}
    reference, _ = federate(tmp_path / "reference", **how)
    for after in (7, 9):  # in the fourth round of two uploads each, and in the fifth
        out = tmp_path / str(after)
        with pytest.raises(KilledError):
            federate(out, killer(after), **how)
        folder, _ = federate(out, resume=True, **how)
        check_same(folder, reference)


def test_a_killed_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGKILL to everything that ``pfedgpa run`` started, at some moment of round 3."""
    settings = SMALL | {"method": "fedper,pfedgpa", "num-server-rounds": 5, "workers": 1}
    words = [f"{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "pfedgpa_app", "run", "--engine", "process", *words]
    env = os.environ | {"PYTHONPATH": str(APP_DIR)}

    def run(name: str, *more: str) -> list[str]:
        return [*command, f"out-dir={tmp_path}", f"run-name={name}", *more]

    how = {"method": "fedper,pfedgpa", "num_server_rounds": 5}
    reference, _ = federate(tmp_path / "reference", **how)
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
    while is_running(tmp_path / "killed"):  # its server, which dies in its own time
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert cli.main(run("killed")[3:]) == 2
    assert "resume=true" in capsys.readouterr().err
    done = subprocess.run(run("killed", "resume=true"), env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "the run goes on after round" in done.stdout
    check_same(tmp_path / "killed", reference)
    assert cli.main(run("killed", "resume=true")[3:]) == 0
    assert "nothing is left to do" in capsys.readouterr().out


class TestRefused:
    def interrupted(self, out: Path) -> Path:
        with pytest.raises(KilledError):
            federate(out, killer(9), method="fedavg")
        return out / "run" / CHECKPOINT

    @pytest.mark.parametrize("file", ["metrics.jsonl", "clients.jsonl"])
    @pytest.mark.parametrize("left", [-1, 300])
    def test_records_that_are_shorter_than_they_were(
        self, file: str, left: int, tmp_path: Path
    ) -> None:
        how: dict[str, Any] = {"method": "fedavg,local", "num_server_rounds": 1}
        with pytest.raises(KilledError):  # FedAvg is done, and has its records in both
            federate(tmp_path, killer(13), **how)
        path = tmp_path / "run" / file
        if left < 0:
            path.unlink()
        else:
            os.truncate(path, left)
        with pytest.raises(ConfigError, match=rf"{file} has \d+ bytes, but the checkpoint rec"):
            federate(tmp_path, resume=True, **how)
        assert not path.exists() or path.stat().st_size == left

    @pytest.mark.parametrize("file", ["metrics.jsonl", "clients.jsonl"])
    def test_records_that_are_not_what_they_were(self, file: str, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg,local", "num_server_rounds": 1}
        with pytest.raises(KilledError):
            federate(tmp_path, killer(13), **how)
        path = tmp_path / "run" / file
        content = bytearray(path.read_bytes())
        content[20:40] = bytes(20)  # as a power cut leaves them
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=rf"{file} is damaged: .* run anew under another"):
            federate(tmp_path, resume=True, **how)

    @pytest.mark.parametrize("damage", ["missing", "damaged"])
    def test_weights_that_were_made_and_are_lost(self, damage: str, tmp_path: Path) -> None:
        """No reason to train again: the figures are there."""
        how: dict[str, Any] = {"method": "fedavg,local", "num_server_rounds": 1}
        with pytest.raises(KilledError):
            federate(tmp_path, killer(13), **how)
        path = tmp_path / "run" / "weights" / "fedavg.safetensors"
        if damage == "missing":
            path.unlink()
        else:
            flip(path)
        folder, _ = federate(tmp_path, resume=True, **how)
        [text] = [e["text"] for e in records(folder, "events.jsonl") if "put it back" in e["text"]]
        assert text.startswith(f"{path}, weights of a method that is done, is {damage}")

    @pytest.mark.parametrize("damage", ["missing", "damaged"])
    def test_clients_without_what_they_kept(self, damage: str, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "scaffold", "evaluate_every": 0}
        with pytest.raises(KilledError):
            federate(tmp_path, killer(9), **how)
        [kept] = (tmp_path / "run" / CHECKPOINT / "clients").glob("run-*/scaffold.2@2.safetensors")
        if damage == "missing":
            kept.unlink()
        else:
            flip(kept)
        with pytest.raises(ConfigError, match=rf"scaffold\.2@2\.safetensors, .* is {damage}"):
            federate(tmp_path, resume=True, **how)

    @pytest.mark.parametrize("pattern", ["*.safetensors", MANIFEST])
    def test_a_flipped_bit(self, pattern: str, tmp_path: Path) -> None:
        for file in self.interrupted(tmp_path).glob(pattern):
            flip(file)
        with pytest.raises(ConfigError, match=r"is damaged: .*; put it back, or run anew"):
            federate(tmp_path, method="fedavg", resume=True)

    @pytest.mark.parametrize("file", ["holdings.json", "model.json"])
    @pytest.mark.parametrize("content", ["{", "[1]"])
    def test_what_it_kept_of_data_and_code_is_torn(
        self, file: str, content: str, tmp_path: Path
    ) -> None:
        kept = self.interrupted(tmp_path).parent / file
        kept.write_text(content)
        with pytest.raises(ConfigError, match=rf"{file}:? cannot be read: .*: put it back, or run"):
            federate(tmp_path, method="fedavg", resume=True)
        kept.unlink()
        federate(tmp_path, method="fedavg", resume=True)

    def test_other_data_before_anything_starts(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kept = self.interrupted(tmp_path).parent / "holdings.json"
        held = json.loads(kept.read_text())
        held["data"]["labels"] += 1
        kept.write_text(json.dumps(held))
        how = {"out-dir": tmp_path, "run-name": "run", "method": "fedavg", "resume": "true"}
        words = [f"{name}={value}" for name, value in small(how).items()]
        assert cli.main(["run", *words]) == 2
        said = f"the data have changed since {tmp_path / 'run'} began: restore them, or run anew"
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("on_nodes", [False, True])
    def test_without_its_settings(self, on_nodes: bool, tmp_path: Path) -> None:
        config = self.interrupted(tmp_path).parent / "config.json"
        config.unlink()
        if on_nodes:  # then it keeps no record of the data
            (config.parent / "holdings.json").unlink()
        with pytest.raises(ConfigError, match=r"has no config\.json, .* put it back, or run anew"):
            run_folder(resolve({"out-dir": str(tmp_path), "run-name": "run", "resume": True}))

    def test_other_settings(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path)
        with pytest.raises(ConfigError, match=r"learning-rate = 0\.\d+ there, 0\.5 here"):
            federate(tmp_path, method="fedavg", resume=True, learning_rate=0.5)
        federate(tmp_path, method="fedavg", resume=True, timeout=77.0)

    def test_no_more_checkpoints(self, tmp_path: Path) -> None:
        self.interrupted(tmp_path)
        with pytest.raises(ConfigError, match="checkpoint-every = 0: a resumed run"):
            federate(tmp_path, resume=True, method="fedavg", checkpoint_every=0)

    def test_no_name(self, tmp_path: Path) -> None:
        words = ["run", f"out-dir={tmp_path}", "resume=true"]
        assert cli.main(words) == 2

    def test_a_run_whose_last_record_was_lost_is_not_begun_anew(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="fedavg")
        events = folder / "events.jsonl"
        kept = events.read_bytes()[:-40]
        events.write_bytes(kept)
        before = {path: path.read_bytes() for path in folder.glob("*.json*") if path != events}
        assert not is_done(folder)
        federate(tmp_path, method="fedavg", resume=True)
        assert is_done(folder)
        assert before == {path: path.read_bytes() for path in before}
        assert [e["kind"] for e in records(folder, "events.jsonl")].count("start") == 1

    def test_a_foreign_format(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        manifest = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps(manifest | {"format": "pfedgpa-checkpoint-9"}))
        with pytest.raises(ConfigError, match="'pfedgpa-checkpoint-9', but this version reads"):
            federate(tmp_path, method="fedavg", resume=True)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[]"])
    def test_a_manifest_that_is_none(self, tmp_path: Path, content: bytes) -> None:
        folder = self.interrupted(tmp_path)
        (folder / MANIFEST).write_bytes(content)
        with pytest.raises(ConfigError, match=r"resume: .*checkpoint\.json: .* run anew under"):
            federate(tmp_path, method="fedavg", resume=True)

    def test_tensors_that_are_not_whole(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        newest = max(folder.glob("*.safetensors"), key=lambda path: int(path.stem))
        newest.write_bytes(newest.read_bytes()[:-100])
        with pytest.raises(ConfigError, match="is damaged"):
            federate(tmp_path, method="fedavg", resume=True)

    def test_half_written_files_are_never_read(self, tmp_path: Path) -> None:
        folder = self.interrupted(tmp_path)
        (folder / (MANIFEST + ".new")).write_text("{")
        (folder / "77.safetensors.new").write_bytes(b"half")
        (folder / "78.safetensors").write_bytes(b"of a checkpoint without a manifest")
        federate(tmp_path, method="fedavg", resume=True)


def test_a_run_that_failed_in_its_first_round_leaves_its_name_free(tmp_path: Path) -> None:
    """The launcher asks for the folder, and then the server's process does."""
    with pytest.raises(NoUploadsError):
        federate(tmp_path, method="fedavg", learning_rate=1e20)
    again, mine = resolve({"out-dir": str(tmp_path), "run-name": "run"}), tmp_path / "run" / "notes"
    mine.touch()
    with pytest.raises(ConfigError, match="choose another name"):
        run_folder(again)
    assert (tmp_path / "run" / "events.jsonl").exists()
    mine.unlink()
    for _ in range(2):
        assert run_folder(again) == tmp_path / "run"
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {".lock"}
    federate(tmp_path, method="fedavg", num_server_rounds=1)


def test_a_full_disk_costs_the_checkpoint_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    reference, _ = federate(tmp_path / "reference", method="fedavg", num_server_rounds=2)
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    folder, _ = federate(tmp_path / "full", method="fedavg", num_server_rounds=2)
    warnings = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
    assert any("No space left on device" in text for text in warnings)
    assert results(folder) == results(reference)


def test_a_disk_that_is_full_at_the_end_is_named_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, *_: Any, **__: Any) -> None:
        with replacing(path):
            raise OSError(28, "No space left on device")

    how: dict[str, Any] = {"method": "fedavg", "num_server_rounds": 2}
    reference, _ = federate(tmp_path / "reference", **how)
    with monkeypatch.context() as patched:
        patched.setattr(summary_module, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            federate(tmp_path / "full", **how)
    folder = tmp_path / "full" / "run"
    said = records(folder, "events.jsonl")[-1]["text"]
    assert said.startswith(f"{folder}/summary.json: No space left on device: make room there")
    assert said.endswith("resume=true")
    federate(tmp_path / "full", **how, resume=True)
    assert results(folder) == results(reference)


class TestCheckpoint:
    def test_round_trip(self, tmp_path: Path) -> None:
        weights = {"a.weight": torch.randn(2, 3), "b": torch.tensor(1.5, dtype=torch.float16)}
        buffer = Buffer(2)
        for server_round in (1, 2, 3):
            buffer.add(server_round, 5, weights)
            buffer.drop_old(server_round)
        state = PFedGPAState(weights, buffer, labels={3: [1, 2]}, generated={5: weights})
        clusters = [Cluster([0, 2], weights, {0: torch.ones(2)}, {0: 10})]
        parts: dict[str, Any] = {
            "state": state,
            "clusters": clusters,
            "numbers": np.array([1.5, np.nan]),
        }
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
        layout = Layout(("x",), (torch.Size([10_000]),), (torch.float32,))

        def upload(client: int, size: int = 10_000) -> Entry:
            return Entry(1, client, torch.randn(size), layout)

        kept, size = Checkpoint(tmp_path), lambda: sum(p.stat().st_size for p in tmp_path.iterdir())
        big = {client: upload(client) for client in range(5)}
        kept.save({"uploads": big})
        once = size()
        assert once > 200_000
        kept.save({"uploads": big | {9: upload(9, 100)}})
        assert size() < once + 5000
        kept = Checkpoint(tmp_path)
        big = kept.restore(kept.read()["uploads"])
        kept.save({"uploads": big | {10: upload(10, 100)}})  # nor after a resumption
        assert size() < once + 10_000
        big[0].vector.add_(1)  # it is another tensor now
        kept.save({"uploads": big})
        again = Checkpoint(tmp_path)
        assert torch.equal(again.restore(again.read()["uploads"])[0].vector, big[0].vector)
        kept.save({"uploads": {}})
        assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]

    def test_what_was_written_past_its_version_is_kept(self, tmp_path: Path) -> None:
        kept, sums = Checkpoint(tmp_path), torch.zeros(3)
        for _ in range(2):
            kept.save({"sums": sums})
            sums.data.add_(1)
            sums.numpy()[0] = 7
        kept.save({"sums": sums})
        again = Checkpoint(tmp_path)
        assert again.restore(again.read()["sums"]).tolist() == [7, 2, 2]

    def test_modules_in_containers_are_loaded(self, tmp_path: Path) -> None:
        def made() -> dict[str, Any]:
            return {"by client": {3: nn.Linear(2, 1)}, "in a row": [nn.Linear(2, 1), 5]}

        kept, old, new = Checkpoint(tmp_path), made(), made()
        kept.save({"state": old})
        back = kept.restore(kept.read()["state"], new)
        assert back["by client"][3] is new["by client"][3]
        assert torch.equal(back["by client"][3].weight, old["by client"][3].weight)
        assert torch.equal(back["in a row"][0].weight, old["in a row"][0].weight)
        assert back["in a row"][1] == 5
        with pytest.raises(CheckpointError, match="holds a module that the state before"):
            kept.restore(kept.read()["state"], {"by client": {}, "in a row": []})

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

    def test_nothing_runs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        kept = Checkpoint(tmp_path)
        (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
        monkeypatch.syspath_prepend(str(tmp_path))
        for name in ("evil:x", "pfedgpa_app.evil:x", "pfedgpa_app.strategy:asdict", "x", ""):
            with pytest.raises(CheckpointError, match="no dataclass of this package"):
                kept.restore(["data", name, {}])
        for node in ([], ["dtype", "hub"], ["tensor", ["../1", "0"]]):
            with pytest.raises(CheckpointError, match="is incomplete"):
                kept.restore(node)
        with pytest.raises(CheckpointError, match="holds a module that"):
            kept.restore(["module", ["dict", []]])
        for name in ("subprocess:Popen", "pfedgpa_app.cli:main", "os:system"):
            with pytest.raises(CheckpointError):
                kept.restore(["data", name, {}])
        with pytest.raises(ConfigError, match="cannot hold a object"):
            kept.save({"x": object()})


class TestLog:
    TORN = (b'{"kind": "round", "te', b"\0" * 40, b'{"kind": "r\xff\xfe"}', b"[1]", b"7")

    @pytest.mark.parametrize("torn", TORN)
    def test_torn_lines_are_passed_over(self, torn: bytes, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        path.write_bytes(b'{"kind": "start"}\n' + torn + b'\n{"kind": "done"}\n' + torn)
        assert [event["kind"] for event in Records(path).new()] == ["start", "done"]
        assert is_done(tmp_path)
        path.write_bytes(torn)
        assert last_event(tmp_path) == {}

    def test_records_are_read_once_and_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "events.jsonl"
        records = Records(path)
        assert list(records.new()) == []
        path.write_text('{"a": 1}\n{"b":')
        assert list(records.new()) == [{"a": 1}]
        with path.open("a") as out:
            out.write(' "é"}\n')
        assert list(records.new()) == [{"b": "é"}]
        assert list(records.new()) == []

    def test_the_newest_event_of_a_long_log(self, tmp_path: Path) -> None:
        long = "".join(json.dumps({"n": n, "text": "x" * 50}) + "\n" for n in range(1000))
        (tmp_path / "events.jsonl").write_text(long + "x" * 9000)  # more than is read at first
        assert last_event(tmp_path)["n"] == 999

    @pytest.mark.parametrize("torn", TORN)
    def test_a_run_goes_on_behind_a_torn_line(self, torn: bytes, tmp_path: Path) -> None:
        log = RunLog(tmp_path, 3, 3.0)
        log.event("start", "one")
        with (tmp_path / "events.jsonl").open("ab") as out:
            out.write(torn)
        RunLog(tmp_path, 3, 3.0).event("resumed", "two")
        assert [event["text"] for event in records(tmp_path, "events.jsonl")] == ["one", "two"]

    def test_time_left_is_by_the_pace_of_this_process(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter([0.0, 10.0, 20.0])
        monkeypatch.setattr("pfedgpa_app.results.log.time.monotonic", lambda: next(clock))
        log = RunLog(tmp_path, 100, 100.0)
        curves = {"fedavg": [(1, 50.0, 40.0)]}  # an older checkpoint's
        log.restore({"curves": curves, "done": 90.0, "sizes": {}})
        assert log.curves == {"fedavg": [(1, 50.0)]}
        assert log.advance(1) == 90.0
        assert log.advance(1) == 80.0

    def test_a_round_that_nobody_evaluated_has_no_accuracy(self, tmp_path: Path) -> None:
        log = RunLog(tmp_path, 2, 2.0)
        log.round("fedavg", 1, {0: {"train_loss": 1.0}}, {0: {"accuracy": 50.0}}, 1.0)
        log.round("fedavg", 2, {0: {"train_loss": 1.0}}, {}, 1.0)
        said = [event["text"] for event in records(tmp_path, "events.jsonl")]
        assert ["accuracy 50.0 %" in text for text in said] == [True, False]

    def test_the_last_step_says_how_far_it_is(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = iter([0.0, 1.0, 2.0, 2.0, 52.0, 54.5])
        monkeypatch.setattr("pfedgpa_app.results.log.time.monotonic", lambda: next(clock))
        log = RunLog(tmp_path, 2, 3.0, {"pfedgpa": 30.0})
        log.advance(1)
        assert log.advance(1) == 1.0 + 30.0  # a final evaluation, and the making of the weights
        tell = log.watch("pfedgpa", "pFedGPA: making weights")
        tell(0.1)  # what goes before the first step, 50 s, says nothing of the others
        tell(0.6)  # 2.5 s for half of it
        first, then = records(tmp_path, "events.jsonl")
        assert (first["kind"], first["text"]) == ("status", "pFedGPA: making weights")
        assert (then["kind"], then["text"]) == (
            "progress",
            "pFedGPA: making weights: 60%  0:03 left",
        )

    def test_fitting_tells_its_progress(self) -> None:
        shares: list[float] = []
        latents = torch.randn(8, 2)
        settings = DiffusionSettings(fit_steps=4, width=4, blocks=1, fit_batch_size=4)
        schedule, device = Schedule(10), torch.device("cpu")
        fit_network(latents, schedule, settings, 0, device, progress=shares.append)
        assert shares == [0.25, 0.5, 0.75, 1.0]

    def test_the_run_passes_it_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        told: dict[str, list[float]] = {}

        def watch(log: RunLog, federation: str, what: str, *_: float) -> Callable[[float], None]:
            return told.setdefault(what, []).append

        monkeypatch.setattr(RunLog, "watch", watch)
        how: dict[str, Any] = {"method": "fedavg,pfedgpa-once", "num_server_rounds": 2}
        federate(tmp_path, evaluate_every=0, **how)
        assert told["FedAvg: making clients' weights"] == []
        assert told["pFedGPA, once: making clients' weights"][-1] == 1.0
        for title in ("FedAvg", "pFedGPA, once"):
            assert told[f"{title}: evaluating clients' weights"] == [0.25, 0.5, 0.75, 1.0]


class TestStopped:
    def stop(self, *_: Any) -> str:
        raise KeyboardInterrupt

    @pytest.mark.parametrize("kept", [True, False])
    def test_a_run_says_how_it_goes_on(
        self,
        kept: bool,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def first(_: Path, settings: dict[str, Any], *more: Any) -> str:
            if kept:
                place = Path(settings["out-dir"]) / settings["run-name"]
                (place / "config.json").write_text(json.dumps(resolve(settings).as_dict()))
                (place / CHECKPOINT).mkdir()
                (place / CHECKPOINT / MANIFEST).touch()
            return self.stop()

        monkeypatch.setattr("pfedgpa_app.runs.launcher.local.run", first)
        what = "to continue" if kept else "to start again (it kept no checkpoint)"
        words = [f"{key}={value}" for key, value in SMALL.items()]
        words += [f"out-dir={tmp_path}/my results", "--engine", "process"]
        assert cli.main(["run", *words]) == 130
        [folder] = (tmp_path / "my results").iterdir()
        stopped, again = capsys.readouterr().err.splitlines()
        assert stopped == f"stopped: results so far are in {folder}"
        assert again.startswith(f"{what}: pfedgpa run num-clients=4 ")
        given: list[Any] = []

        def stop(*arguments: Any) -> str:
            given.append(arguments)
            return self.stop()

        monkeypatch.setattr("pfedgpa_app.runs.launcher.local.run", stop)
        repeated = shlex.split(again.removeprefix(f"{what}: pfedgpa "))
        assert cli.main(repeated) == 130
        config = resolve(given[0][1]).config
        assert (config.resume, config.run_name, config.num_clients) == (True, folder.name, 4)
        assert capsys.readouterr().err.splitlines()[1] == again  # and again

    def test_a_folder_that_is_gone_is_not_pointed_to(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def gone(_: Path, settings: dict[str, Any], *more: Any) -> str:
            shutil.rmtree(settings["out-dir"])
            return "the server ended"

        monkeypatch.setattr("pfedgpa_app.runs.launcher.local.run", gone)
        assert cli.main(["run", f"out-dir={tmp_path / 'out'}", "run-name=run"]) == 1
        said = f"the server ended\nThe run's folder, {tmp_path / 'out' / 'run'}, is gone"
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize("option", [["-c"], ["--run-config"], []])
    def test_a_word_that_holds_several_settings(
        self,
        option: list[str],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """As Flower's --run-config has them."""
        monkeypatch.setattr("pfedgpa_app.runs.launcher.local.run", self.stop)
        several = f"run-name=again num-clients=4 out-dir={tmp_path}/my results seed=3"
        assert cli.main(["run", *option, several]) == 130
        again = capsys.readouterr().err.splitlines()[1].partition("pfedgpa run ")[2]
        kept = ["num-clients=4", f"out-dir={tmp_path}/my results", "seed=3"]
        assert shlex.split(again) == [*kept, "run-name=again", "resume=true"]

    @pytest.mark.parametrize("command", ["sweep", "compare", "tune"])
    def test_many_runs_go_on_by_the_same_command(
        self,
        command: str,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("pfedgpa_app.study.sweep.Sweep.run_all", self.stop)
        monkeypatch.setattr("pfedgpa_app.study.sweep.preflight", lambda *_: None)
        words = {
            "sweep": ["sweep", "--over", "seed=0,1"],
            "compare": ["compare", "--conf", "demo", "--methods", "local"],
            "tune": ["tune", "--conf", "demo", "--methods", "local"],
        }[command]
        words += ["num-server-rounds=2", "--out", str(tmp_path / "out")]
        assert cli.main(words) == 130
        assert capsys.readouterr().err.splitlines() == [
            f"stopped: results so far are in {tmp_path / 'out'}",
            f"to continue: pfedgpa {shlex.join(words)}",
        ]

    def test_a_run_that_goes_on_shows_what_is_new(self, tmp_path: Path) -> None:
        def run_it(poll: Callable[[], None]) -> str:
            poll()
            log.event("done", "the end")
            return ""

        log = RunLog(tmp_path, 3, 3.0)
        log.event("round", "round 1, 9:99 left")
        log.event("failed", "by a full disk")
        said = io.StringIO()
        assert watched(tmp_path, Console(file=said), Config(), run_it) == ""
        assert said.getvalue() == "the end\n"
        assert (
            watched(tmp_path, Console(file=said), Config(), lambda _: "it was killed")
            == "it was killed"
        )


class TestFolder:
    def resolved(self, out: Path, **more: Any) -> Resolved:
        return resolve({"out-dir": str(out)} | {k.replace("_", "-"): v for k, v in more.items()})

    def test_runs_without_a_name_never_meet(self, tmp_path: Path) -> None:
        folders = {run_folder(self.resolved(tmp_path)) for _ in range(12)}
        assert len(folders) == 12
        assert {folder.parent for folder in folders} == {tmp_path}

    @pytest.mark.parametrize(
        "name", ["..", ".", ".lock", "../up", "/abs", "a/b", "a//b", "a\\b", " ", "a\nb"]
    )
    def test_names_that_leave_their_place(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"run-name = .* must be the plain name"):
            run_folder(self.resolved(tmp_path / "out", run_name=name))
        assert list(tmp_path.rglob("*")) == [tmp_path / "out"]

    def test_places_that_cannot_be(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for out, name, words in (
            (tmp_path, "x" * 300, "File name too long"),
            (tmp_path, "file", "File exists"),
            (tmp_path / "file", "run", "File exists"),
            (tmp_path / "file" / "below", "", "Not a directory"),
        ):
            with pytest.raises(ConfigError, match=f"out-dir = .* cannot be written there: {words}"):
                run_folder(self.resolved(out, run_name=name))

    def test_a_foreign_folder_is_left_alone(self, tmp_path: Path) -> None:
        mine = tmp_path / "mine"
        mine.mkdir()
        assert run_folder(self.resolved(tmp_path, run_name="mine")) == mine
        (mine / "flower.log").write_text("of a run that never began")
        assert run_folder(self.resolved(tmp_path, run_name="mine")) == mine
        (mine / "metrics.jsonl").write_text("my own")
        for resume in (False, True):
            with pytest.raises(ConfigError, match="not a run's folder"):
                run_folder(self.resolved(tmp_path, run_name="mine", resume=resume))
        for config in ("[]", "{", "{}", '{"name": "a web page"}'):
            (mine / "config.json").write_text(config)
            with pytest.raises(ConfigError, match=r"mine/config\.json"):
                run_folder(self.resolved(tmp_path, run_name="mine", resume=True))
        assert (mine / "metrics.jsonl").read_text() == "my own"

    def test_a_run_refused_before_its_first_round_does_not_keep_its_name(
        self, tmp_path: Path
    ) -> None:
        refused = tmp_path / "run"
        for seed in (0, 1):  # the second run has other settings, and begins in the same folder
            with pytest.raises(KilledError):
                federate(tmp_path, killer(0), method="fedavg", seed=seed)
        assert [e["kind"] for e in records(refused, "events.jsonl")].count("failed") == 1
        with pytest.raises(KilledError):
            federate(tmp_path, killer(9), method="fedavg")  # in round 2
        with pytest.raises(ConfigError, match="holds another run's results"):
            federate(tmp_path, method="fedavg")

    def test_nor_one_whose_clients_or_nodes_had_written_already(self, tmp_path: Path) -> None:
        folder = tmp_path / "run"
        with pytest.raises(KilledError):  # in round 1, when the first client keeps its state
            federate(tmp_path, killer(1), method="scaffold", checkpoint_every=1)
        assert list((folder / CHECKPOINT / "clients").rglob("*.safetensors"))
        (folder / "node-0.log").write_text("as a rehearsal leaves it")
        (folder / "notes.txt").write_text("my own")
        with pytest.raises(ConfigError, match=r"failed before .*, but notes\.txt is there, too"):
            federate(tmp_path, method="fedavg")
        (folder / "notes.txt").unlink()
        federate(tmp_path, method="fedavg")
        [row] = json.loads((folder / "summary.json").read_text())
        assert row["method"] == "fedavg"
        assert not (folder / "node-0.log").exists()

    def test_one_that_learned_from_kept_uploads_does(self, tmp_path: Path) -> None:
        """It has no round, but results."""
        run = tmp_path / "run"
        run.mkdir()
        (run / "config.json").write_text(json.dumps(self.resolved(tmp_path).as_dict()))
        (run / "summary.json").write_text("[]")
        RunLog(run, 1, 1.0).failed(ValueError("too hot"))
        with pytest.raises(ConfigError, match="holds another run's results"):
            run_folder(self.resolved(tmp_path, run_name="run"))
        assert (run / "summary.json").exists()

    def test_a_run_that_goes_on_is_left_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        how: dict[str, Any] = {"method": "fedavg", "num_server_rounds": 2}
        words = [
            "run",
            *(f"{key}={value}" for key, value in small({"method": "fedavg"}).items()),
        ]
        words += ["num-server-rounds=2", f"out-dir={tmp_path}", "run-name=run", "resume=true"]
        refused: list[int] = []

        def meanwhile(message: Message, reply: Message) -> Message:
            if message.metadata.message_type == "train" and not refused:
                refused.append(cli.main(words))
            return reply

        folder, _ = federate(tmp_path, meanwhile, **how)
        assert refused == [2]
        said = capsys.readouterr().err
        assert f"{folder}: a run is going on there (process {os.getpid()}, since 20" in said
        assert "wait until it ends, stop it, or choose another run-name" in said
        rounds = [(r["round"], r["client"]) for r in records(folder)]
        assert len(rounds) == len(set(rounds)) == 2 * 4
        assert not is_running(folder)

    def test_of_two_that_begin_at_once_one_is_refused(self, tmp_path: Path) -> None:
        with locked(tmp_path, ""), pytest.raises(ConfigError, match="a run is going on there"):
            watched(tmp_path, Console(file=io.StringIO()), Config(), lambda _: "the server ended")

    @pytest.mark.parametrize("name", ["7", "2026-11-26", "true", "1e3", "'7'"])
    def test_a_name_may_look_like_something_else(self, name: str) -> None:
        parsed = parse_overrides([f"run-name={name}", "seed=7"])
        assert parsed == {"run-name": name.strip("'"), "seed": 7}
