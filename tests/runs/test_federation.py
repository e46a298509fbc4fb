"""Whole federations in this process: the real strategy and ClientApp over a local Grid."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    Context,
    Error,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.common.constant import ErrorCode
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.files import read_tensors, write_tensors
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.uploads import Buffer, Upload, weighted_mean
from pfedgpa_app.data.client import load_schema
from pfedgpa_app.diffusion import saved
from pfedgpa_app.diffusion.distribution import WeightDistribution
from pfedgpa_app.diffusion.saved import load
from pfedgpa_app.diffusion.settings import DiffusionSettings
from pfedgpa_app.engine.grid import identify
from pfedgpa_app.methods.generation import RememberingFedAvg
from pfedgpa_app.results import uploads
from pfedgpa_app.results.log import rows_of
from pfedgpa_app.runs import inspection, report
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.runs.folder import kept_config
from pfedgpa_app.runs.initial import initial_weights
from pfedgpa_app.server.roster import Roster
from pfedgpa_app.server.screening import (
    NoUploadsError,
    check_counts,
    check_upload,
    failure,
    too_large,
)
from pfedgpa_app.server.strategy import asked_in
from pfedgpa_app.study.sweep import table
from pfedgpa_app.training import sgd
from tests.support.federations import PLAIN, federate, records, results, summary, train_messages
from tests.support.local_grid import InProcessGrid


def uploaded(metrics: dict[str, Any]) -> tuple[Upload | None, str]:
    """What is made of a reply in round 3 that says ``metrics``, too."""
    identify()
    expected = {"w": torch.zeros(2)}
    told = MetricRecord({"num-examples": 10, "round": 3, **metrics})
    content = RecordDict({"arrays": ArrayRecord(expected), "metrics": told})
    reply = Message(content, dst_node_id=1, message_type="train")
    return check_upload(reply, expected, 3, classes=2)


class TestResults:
    def test_everything_is_written(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, report=True)
        files = {p.name for p in folder.iterdir()}
        assert files == {
            ".lock",
            "config.json",
            "metrics.jsonl",
            "events.jsonl",
            "clients.jsonl",
            "summary.json",
            "table.md",
            "model.json",
            "holdings.json",
            "latents.json",
            "report.html",
            "table.csv",
            "table.tex",
            "accuracy.png",
            "clients.png",
            "latents.png",
            "weights",
            "distribution.safetensors",
        }
        rows = summary(folder)
        assert list(rows) == ["local", "fedavg", "fedavg-ft", "client-mean", "pfedgpa"]
        for row in rows.values():
            assert 0 < row["accuracy_worst_client"] <= row["accuracy_after_ft"] <= 100
            assert (row["dataset"], row["num_clients"], row["rounds"]) == ("digits", 4, 4)
        # one record a round and client of each federation
        keys = [(r["federation"], r["round"], r["client"]) for r in records(folder)]
        assert len(set(keys)) == len(keys) == 3 * 4 * 4
        weights = load_file(folder / "weights" / "pfedgpa.safetensors")
        assert {name.split("/")[0] for name in weights} == {f"client-{c}" for c in range(4)}
        common = load_file(folder / "weights" / "fedavg.safetensors")
        assert {name.split("/")[0] for name in common} == {"global"}
        config = json.loads((folder / "config.json").read_text())
        assert config["num-clients"] == {"value": 4, "from": "run-config"}
        assert config["learning-rate"]["from"] == "demo.yaml"

    def test_same_seed_same_run(self, tmp_path: Path) -> None:
        one, _ = federate(tmp_path / "1", seed=3, num_server_rounds=2)
        two, _ = federate(tmp_path / "2", seed=3, num_server_rounds=2)
        other, _ = federate(tmp_path / "3", seed=4, num_server_rounds=2)
        for file in ("metrics.jsonl", "clients.jsonl"):
            assert records(one, file) == records(two, file)
            assert records(one, file) != records(other, file)
        names = ("fedavg", "pfedgpa")
        for weights in (f"weights/{name}.safetensors" for name in names):
            first, second = load_file(one / weights), load_file(two / weights)
            assert all(torch.equal(first[name], second[name]) for name in first)

    def test_clients_without_a_result_are_told(self, tmp_path: Path) -> None:
        class Deaf(InProcessGrid):
            """Client 1 does not answer when it is evaluated."""

            def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
                kinds = [m.metadata.message_type.partition(".")[0] for m in messages]
                heard = [
                    m
                    for m, kind in zip(messages, kinds, strict=True)
                    if kind != MessageType.EVALUATE or m.content["config"]["client"] != 1
                ]
                return super().serve(heard, timeout)

        settings = PLAIN | {"method": "fedavg", "num-server-rounds": 1, "num-clients": 3}
        settings |= {"out-dir": str(tmp_path), "run-name": "run", "timeout": 1.0}
        folder = run(Deaf(settings, 3), resolve(settings))
        assert summary(folder)["fedavg"]["clients_evaluated"] == 2
        table = (folder / "table.md").read_text()
        assert "FedAvg: figures cover 2 of 3 clients; the others" in table

    def test_clients_hosted_in_turn_get_the_same_results(self, tmp_path: Path) -> None:
        one, _ = federate(tmp_path / "1", num_server_rounds=2)
        two, grid = federate(tmp_path / "2", nodes=2, num_server_rounds=2)
        assert len(grid.contexts) == 2
        assert records(one) == records(two)

    def test_copies_of_uploads_are_told(self, tmp_path: Path) -> None:
        one, _ = federate(tmp_path / "1", method="fedavg,pfedgpa-once")
        own = {"pfedgpa.inversion": "identity", "pfedgpa.directions": "principal"}
        own["pfedgpa.rank"] = "40"  # all that uploads span
        two, _ = federate(tmp_path / "2", method="pfedgpa-once,pfedgpa", **own)
        assert summary(one)["fedavg"]["agreement_with_last_upload"] is None
        row = summary(one)["pfedgpa-once"]
        assert row["distance_to_nearest_upload"] > 0.1
        for method in ("pfedgpa-once", "pfedgpa"):  # the identity: the upload
            row = summary(two)[method]
            assert row["agreement_with_last_upload"] == 100
            assert row["distance_to_nearest_upload"] < 1e-4
            assert row["bytes_down"] == summary(two)["pfedgpa-once"]["bytes_down"]

    def test_generation_from_saved_uploads(self, tmp_path: Path) -> None:
        methods = "fedavg,client-mean,pfedgpa-once"
        # who is like whom is seen in round 20, whose uploads are not kept
        long: dict[str, Any] = {"num_server_rounds": 22, "pfedgpa.buffer-rounds": 1}
        one, _ = federate(tmp_path / "1", method=methods, save_uploads=True, **long)
        uploads = str(one / "uploads.safetensors")
        two, grid = federate(tmp_path / "2", method=methods, uploads=uploads, **long)
        assert not train_messages(grid)
        assert records(one, "clients.jsonl") == records(two, "clients.jsonl")
        for name in methods.split(","):
            for key in ("bytes_up", "bytes_down", "accuracy_before_ft"):
                assert summary(one)[name][key] == summary(two)[name][key]
        with pytest.raises(ValueError, match="learning-rate"):
            federate(tmp_path / "3", method=methods, uploads=uploads, learning_rate=0.5, **long)
        for other in ({"pfedgpa.rank-rule": "shrinkage"}, {"pfedgpa.buffer-rounds": 2}):
            with pytest.raises(ValueError, match=next(iter(other))):
                federate(tmp_path / "3", method=methods, uploads=uploads, **long | other)

    def test_saved_uploads_of_clients_that_left_the_window(self, tmp_path: Path) -> None:
        """Their newest ones count, and the class counts that clients share."""
        how: dict[str, Any] = {"num_server_rounds": 6, "pfedgpa.buffer-rounds": 1}
        how |= {"fraction_train": 0.5, "share_label_counts": True, "num_clients": 6}
        how |= {"pfedgpa.descriptor": "labels", "method": "last-upload,pfedgpa-once"}
        one, _ = federate(tmp_path / "1", save_uploads=True, **how)
        took_part = {r["client"] for r in records(one) if r["participated"]}
        newest = {r["client"] for r in records(one) if r["participated"] and r["round"] == 6}
        assert took_part > newest
        two, _ = federate(tmp_path / "2", uploads=str(one / "uploads.safetensors"), **how)
        assert records(one, "clients.jsonl") == records(two, "clients.jsonl")

    def test_keeping_uploads_changes_no_result(self, tmp_path: Path) -> None:
        """More layers are kept than ``pfedgpa.layers``, and no more are generated or averaged."""
        how: dict[str, Any] = {"method": "client-mean,last-upload,pfedgpa-once"}
        how |= {"num_server_rounds": 2, "pfedgpa.layers": 1}
        plain, _ = federate(tmp_path / "1", **how)
        keeping, _ = federate(tmp_path / "2", save_uploads=True, **how)
        file = str(keeping / "uploads.safetensors")
        again, _ = federate(tmp_path / "3", uploads=file, **how)
        for folder in (keeping, again):
            assert records(folder, "clients.jsonl") == records(plain, "clients.jsonl")
            told = [
                {n: v for n, v in row.items() if n.startswith(("accuracy", "agreement", "dist"))}
                for row in (summary(folder), summary(plain))
                for row in row.values()
            ]
            assert told[: len(told) // 2] == told[len(told) // 2 :]
        whole, _ = federate(tmp_path / "4", uploads=file, **how | {"pfedgpa.layers": 0})
        assert records(whole, "clients.jsonl") != records(plain, "clients.jsonl")

    def test_uploads_of_clients_that_held_other_examples(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "last-upload", "num_server_rounds": 1}
        one, _ = federate(tmp_path / "1", save_uploads=True, **how)
        held = json.loads((one / "holdings.json").read_text())
        held["train"] = held["train"][::-1]  # as an earlier version may have dealt them
        tensors, metadata = read_tensors(one / uploads.FILE, uploads.FORMAT)
        file = tmp_path / "moved.safetensors"  # it says itself what they held
        write_tensors(file, tensors, metadata | {"holdings": json.dumps(held)})
        with pytest.raises(DataError, match=r"moved.* its clients held other examples than they"):
            federate(tmp_path / "2", uploads=str(file), **how)
        del metadata["holdings"]  # as in earlier versions, where only the run's folder did
        write_tensors(one / uploads.FILE, tensors, metadata)
        (one / "holdings.json").write_text(json.dumps(held))
        with pytest.raises(DataError, match=r"1/run.*: its clients held other examples than they"):
            federate(tmp_path / "3", uploads=str(one / uploads.FILE), **how)

    def test_uploads_of_before_a_setting_was_there(self, tmp_path: Path) -> None:
        """They were made by what is now its default."""
        one, _ = federate(tmp_path / "1", method="fedavg", save_uploads=True, num_server_rounds=1)
        settings = {"num-server-rounds": 1, "method": "fedavg"}
        file, resolved = one / uploads.FILE, resolve(PLAIN | settings)
        tensors, metadata = read_tensors(file, uploads.FORMAT)
        kept = json.loads(metadata["settings"])
        del kept["classes"], kept["test-share"]
        metadata["settings"] = json.dumps(kept)
        write_tensors(file, tensors, metadata)
        initial = initial_weights(resolved.config, load_schema(resolved.config))
        uploads.load(file, RememberingFedAvg.begin(resolved.config, initial), resolved)
        other = resolve(PLAIN | settings | {"test-share": 0.3})
        with pytest.raises(ConfigError, match=r"test-share = 0\.2, but this run has 0\.3"):
            uploads.load(file, RememberingFedAvg.begin(other.config, initial), other)

    def test_damaged_uploads_are_refused(self, tmp_path: Path) -> None:
        one, _ = federate(tmp_path / "1", method="fedavg", save_uploads=True, num_server_rounds=1)
        with safe_open(one / "uploads.safetensors", "pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        resolved, bad = (
            resolve(PLAIN | {"num-server-rounds": 1, "method": "fedavg"}),
            tmp_path / "bad.safetensors",
        )
        initial = initial_weights(resolved.config, load_schema(resolved.config))
        state = RememberingFedAvg.begin(resolved.config, initial)
        vectors = tensors["vectors"]
        bias = tensors["global/fc2.bias"]
        for change, described in (
            ({}, {name: text for name, text in metadata.items() if name != "settings"}),
            ({}, metadata | {"costs": "{}"}),
            ({}, metadata | {"costs": "[[1]]"}),
            ({}, metadata | {"settings": "3"}),
            ({"vectors": vectors * float("nan")}, metadata),
            ({"vectors": vectors[:, 1:].contiguous()}, metadata),
            ({"vectors": vectors[1:]}, metadata),
            ({"vectors": torch.zeros(())}, metadata),
            ({"clients": tensors["clients"] + 100}, metadata),
            ({"likeness": tensors["likeness"] * float("nan")}, metadata),
            ({"likeness": torch.zeros(())}, metadata),
            ({"likeness-rank": torch.tensor(9)}, metadata),
            ({"likeness-clients": tensors["likeness-clients"][1:]}, metadata),
            ({"clients": torch.zeros(())}, metadata),
            ({"global/fc2.bias": bias * float("inf")}, metadata),
            ({"global/fc2.bias": bias[1:]}, metadata),
        ):
            save_file(tensors | change, bad, described)
            with pytest.raises(ConfigError, match=r"^uploads = .*bad.*: is (incomplete|damaged)"):
                uploads.load(bad, state, resolved)
        bad.write_bytes((one / "uploads.safetensors").read_bytes()[:-1])
        with pytest.raises(ConfigError, match=r"^uploads = .*bad.*: cannot be read"):
            uploads.load(bad, state, resolved)


class TestMethods:
    @pytest.mark.parametrize("method", ["pfedgpa", "pfedgpa-once"])
    def test_last_layers_alone_are_generated(self, tmp_path: Path, method: str) -> None:
        settings = {"pfedgpa.layers": 1}
        if method == "pfedgpa":
            settings |= {"pfedgpa.round-layers": 1, "pfedgpa.generate-from": 2}
        folder, grid = federate(tmp_path, method=f"fedavg,{method}", **settings)
        generated = load_file(folder / "weights" / f"{method}.safetensors")
        common = load_file(folder / "weights" / "fedavg.safetensors")
        names = {name.partition("/")[2] for name in generated}
        for name in names:  # what all share is there once
            assert (f"global/{name}" in generated) == (not name.startswith("fc2"))
            if name.startswith("fc2"):
                first, second = generated[f"client-0/{name}"], generated[f"client-1/{name}"]
                assert not torch.equal(first, second)
            elif method == "pfedgpa-once":
                assert torch.equal(generated[f"global/{name}"], common[f"global/{name}"])
        if method == "pfedgpa":  # the last round's clients trained from what was made for each
            last = [m.content.array_records["arrays"] for m in train_messages(grid, "pfedgpa")[-4:]]
            sent = [dict(record.to_torch_state_dict()) for record in last]
            assert not torch.equal(sent[0]["fc2.weight"], sent[1]["fc2.weight"])
            assert torch.equal(sent[0]["fc1.weight"], sent[1]["fc1.weight"])

    @pytest.mark.parametrize("mode", ["tweedie", "guided"])
    def test_clients_join_a_trained_federation(self, tmp_path: Path, mode: str) -> None:
        methods = "fedavg,client-mean,pfedgpa-once,pfedgpa"
        if mode == "tweedie":  # the others are welcomed alike in both
            methods += ",local,fedper,cfl,pfedhn"
        settings = {"pfedgpa.join-mode": mode, "pfedgpa.guidance": 0.5, "num-clients": 6}
        folder, grid = federate(tmp_path, method=methods, join_clients=2, **settings)
        asked: list[Any] = [m.content.config_records["config"] for m in train_messages(grid)]
        assert {c["client"] for c in asked if c["round"] <= 4} == {0, 1, 2, 3}
        joined = [c for c in asked if c["round"] > 4]
        assert {(c["client"], c["round"]) for c in joined} == {
            (c, 5 + i) for c in (4, 5) for i in range(3)
        }
        for row in summary(folder).values():
            assert len(row["accuracy_of_joining_clients"]) == 4
        clients = {r["client"] for r in records(folder, "clients.jsonl")}
        assert clients == {0, 1, 2, 3}
        lines = records(folder, "joining.jsonl")
        assert len(lines) == len(methods.split(",")) * 4 * 2
        # welcomed with the global weights; then each has weights of its own
        first = {(r["method"], r["client"]): r["accuracy"] for r in lines if r["iteration"] == 0}
        assert first["fedavg", 4] == first["pfedgpa-once", 4] == first["client-mean", 4]

    def test_a_joining_client_that_is_gone_is_not_said_to_be_slow(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def is_here(roster: Roster, client: int) -> bool:
            return client != 3

        monkeypatch.setattr(Roster, "is_here", is_here)
        folder, _ = federate(tmp_path, method="fedavg", join_clients=1, num_server_rounds=1)
        said = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert "fedavg round 2: client 3 is not connected" in said
        assert not any("did not answer" in text for text in said)

    @pytest.mark.parametrize("kind", ["labels", "learned"])
    def test_descriptors(self, tmp_path: Path, kind: str) -> None:
        settings = {"pfedgpa.descriptor": kind, "pfedgpa.guidance": 0.5, "num-clients": 6}
        share = kind == "labels"
        methods = {"method": "pfedgpa-once", "join_clients": 2, "share_label_counts": share}
        shared: list[Any] = []

        def watch(message: Message, reply: Message) -> Message:
            if message.metadata.message_type == "train":
                shared.append(reply.content.metric_records["metrics"].get("label-counts"))
            return reply

        folder, _ = federate(tmp_path / "1", tamper=watch, **methods, **settings)
        assert len(summary(folder)["pfedgpa-once"]["accuracy_of_joining_clients"]) == 4
        assert len(shared) == 4 * 4 + 2 * 3
        for counts in shared:  # only if clients are asked to
            assert sum(counts) == 48 if share else counts is None
        if share:
            with pytest.raises(ConfigError, match="share-label-counts"):
                federate(tmp_path / "2", method="pfedgpa-once", **settings)

    @pytest.mark.parametrize(
        ("labels", "wrong"),
        [([3, 7], ""), ([3], "2 classes"), ([0, 0], "2"), ([-1, 5], "whole")],
    )
    def test_label_counts_are_checked(self, labels: list[int], wrong: str) -> None:
        upload, reason = uploaded({"label-counts": labels})
        assert (upload is None) == bool(wrong)
        assert wrong in reason

    @pytest.mark.parametrize(
        ("losses", "wrong"),
        [
            ([1.0] * 6, ""),
            ([1.0] * 12, ""),
            ([1.0] * 5, "instead of 6 or 12"),
            (1.0, "instead"),
            ([1.0] * 5 + [math.nan], "instead of finite losses"),
            ([1.0] * 5 + [math.inf], "instead of finite losses"),
            ([1.0] * 5 + [-1.0], "instead of finite losses"),
        ],
    )
    def test_validation_losses_are_checked(self, losses: Any, wrong: str) -> None:
        upload, reason = uploaded({"validation-losses": losses})
        assert wrong in reason
        assert (upload is None) == bool(wrong)
        if upload is not None:
            assert upload.validation_losses == [[1.0] * 6] * (len(losses) // 6)

    def test_a_loss_is_a_number(self) -> None:
        upload, reason = uploaded({"loss": [0.5, 0.5]})  # which ended the server once
        assert upload is None
        assert "loss [0.5, 0.5] instead of a number" in reason
        for told, loss in (({"loss": 0.5}, 0.5), ({}, math.nan)):
            upload, reason = uploaded(told)
            assert upload is not None
            assert upload.loss == pytest.approx(loss, nan_ok=True)

    @pytest.mark.parametrize("share", [0.2, 0.0])
    def test_clients_compare_on_their_validation_images(self, tmp_path: Path, share: float) -> None:
        told: dict[int, set[int]] = {}

        def watch(message: Message, reply: Message) -> Message:
            if message.metadata.message_type == "train":
                config: Any = message.content.config_records["config"]
                losses: Any = reply.content.metric_records["metrics"].get("validation-losses", [])
                told.setdefault(int(config["round"]), set()).add(len(losses))
            return reply

        how: dict[str, Any] = {"method": "pfedgpa", "validation_share": share}
        row = summary(federate(tmp_path, tamper=watch, **how)[0])["pfedgpa"]
        if share:  # in round 4 they try what shares nothing, too, and are sent it
            assert told == {1: {6}, 2: {6}, 3: {6}, 4: {12}}
            assert row["chosen_by_validation"] in ("mean", "generated", "own")
            assert row["bytes_down"] == row["bytes_up"] * 6 / 4  # the last time to be evaluated
        else:
            assert told == {number: {0} for number in range(1, 5)}
            assert row["chosen_by_validation"] is None
            assert row["bytes_down"] == row["bytes_up"] * 5 / 4

    def test_a_saved_distribution_starts_another_federation(self, tmp_path: Path) -> None:
        one, _ = federate(tmp_path / "1", method="pfedgpa-once", evaluate_every=1)
        saved_to = one / "distribution.safetensors"
        settings = {"method": "fedavg,fedper,local", "evaluate_every": 1, "seed": 1}
        two, grid = federate(tmp_path / "2", start_from=str(one), **settings)  # its folder
        first = train_messages(grid)[0].content.array_records["arrays"].to_torch_state_dict()
        mean = load(saved_to)
        assert torch.equal(mean.layout.flatten(dict(first)), mean.anchor)
        cold, _ = federate(tmp_path / "3", **settings)
        warm_rounds = [r["accuracy"] for r in records(two) if r["federation"] == "fedavg"]
        cold_rounds = [r["accuracy"] for r in records(cold) if r["federation"] == "fedavg"]
        assert sum(warm_rounds[:4]) > sum(cold_rounds[:4])  # all clients after the first round
        assert summary(two)["fedavg"]["rounds_to_95_percent_of_peak"] in (1, 2, 3, 4)
        assert (
            summary(two)["local"]["accuracy_before_ft"]
            == summary(cold)["local"]["accuracy_before_ft"]
        )
        said = [e["text"] for e in records(two, "events.jsonl")]
        assert f"rounds begin with the mean of what {one} learned" in "\n".join(said)
        alone, _ = federate(tmp_path / "4", start_from=str(one), method="local")
        said = [e["text"] for e in records(alone, "events.jsonl")]
        assert "rounds begin" not in "\n".join(said)
        assert any(text.startswith("start-from has no effect on local-only's") for text in said)

    def test_a_saved_distribution_has_what_normalisation_layers_have_seen(
        self, tmp_path: Path
    ) -> None:
        schema = Schema("numbers", ("a", "b"), (4,))
        (tmp_path / "nets.py").write_text(
            "from torch import nn\ndef build(classes, shape):\n    return nn.Sequential("
            "nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, classes))\n"
        )
        own: dict[str, Any] = {"model": "nets:build", "code-dir": str(tmp_path)}
        initial = initial_weights(resolve(own).config, schema)
        trained = {n: t for n, t in initial.items() if not n.startswith("1.running")}
        buffer = Buffer(2)
        for client in range(3):
            buffer.add(1, client, {n: t + client for n, t in trained.items()})
        fitted = WeightDistribution(buffer, DiffusionSettings(fit_steps=2), 0, torch.device("cpu"))
        seen = {"1.running_mean": torch.ones(3), "1.running_var": torch.full((3,), 2.0)}
        saved.save(fitted, tmp_path / "new", seen)
        saved.save(fitted, tmp_path / "old")
        start = resolve(own | {"start-from": str(tmp_path / "new")}).config
        begun = initial_weights(start, schema)
        assert all(torch.equal(begun[name], tensor) for name, tensor in seen.items())
        with pytest.raises(ConfigError, match=r"lacks what normalisation .*1.running_mean"):
            initial_weights(resolve(own | {"start-from": str(tmp_path / "old")}).config, schema)

    def test_it_starts_none_with_other_frozen_weights(self, tmp_path: Path) -> None:
        """A seed draws them, and no client trains them: the mean was learned around them."""
        (tmp_path / "frozen_nets.py").write_text(
            "from torch import nn\ndef build(classes, shape):\n"
            "    body = nn.Linear(64, 16).requires_grad_(False)\n"
            "    return nn.Sequential(nn.Flatten(), body, nn.ReLU(), nn.Linear(16, classes))\n"
        )
        how: dict[str, Any] = {"model": "frozen_nets:build", "code_dir": str(tmp_path)}
        how |= {"num_server_rounds": 1, "seed": 1}
        one, _ = federate(tmp_path / "1", method="pfedgpa-once", **how)
        federate(tmp_path / "2", method="fedavg", start_from=str(one), **how)
        with pytest.raises(ConfigError, match=r"around another 1\.weight.*set seed and model-we"):
            federate(tmp_path / "3", method="fedavg", start_from=str(one), **how | {"seed": 2})

    def test_a_start_from_other_classes_is_told(self, tmp_path: Path) -> None:
        rows, names = np.random.default_rng(0).normal(size=(600, 4)), np.array(["a", "b", "c"])
        how: dict[str, Any] = {"model": "mlp", "num_server_rounds": 1, "partition": "iid"}
        for file, classes in (("one", names), ("two", names[::-1])):
            np.savez(tmp_path / f"{file}.npz", x=rows, y=np.arange(600) % 3, classes=classes)
        made = {"dataset": f"npz:{tmp_path / 'one.npz'}", "method": "pfedgpa-once"}
        one, _ = federate(tmp_path / "1", **made, **how)
        made = {"dataset": f"npz:{tmp_path / 'two.npz'}", "method": "fedavg"}
        two, _ = federate(tmp_path / "2", start_from=str(one), **made, **how)
        said = [e["text"] for e in records(two, "events.jsonl") if e["kind"] == "warning"]
        [text] = [each for each in said if each.startswith("start-from = ")]
        assert "learned from the classes a, b, c," in text
        assert text.endswith("in order, c, b, a")

    def test_a_distribution_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="start-from"):
            federate(tmp_path / "4", start_from=str(tmp_path / "none"), method="fedavg")

    def test_weighted_mean(self) -> None:
        uploads = {
            0: Upload({"w": torch.tensor([1.0, 2.0])}, 30),
            1: Upload({"w": torch.tensor([5.0, 0.0])}, 10),
        }
        assert weighted_mean(uploads)["w"].tolist() == [2.0, 1.5]

    def test_bytes_are_fedavgs(self, tmp_path: Path) -> None:
        folder, grid = federate(tmp_path, method="fedavg,pfedgpa-once")
        rows = summary(folder)
        assert rows["pfedgpa-once"]["bytes_up"] == rows["fedavg"]["bytes_up"]
        assert rows["pfedgpa-once"]["bytes_down"] == rows["fedavg"]["bytes_down"]
        # counted apart: 5,510 float32 and what NumPy's format adds, down in every round and once
        # at the end, up in every round
        one = 4 * 5510
        assert 4 * 4 * one < rows["pfedgpa-once"]["bytes_up"] < 4 * 4 * one * 1.05
        assert 5 * 4 * one < rows["pfedgpa-once"]["bytes_down"] < 5 * 4 * one * 1.05
        # nothing but the network's own tensors ever travels
        names = set(load_file(folder / "weights" / "fedavg.safetensors"))
        for message in grid.sent:
            for record in message.content.array_records.values():
                assert {f"global/{name}" for name in record} == names

    def test_generating_every_round_costs_no_more_bytes(self, tmp_path: Path) -> None:
        settings = {"pfedgpa.generate-from": 2, "pfedgpa.round-layers": 3, "validation-share": 0.0}
        folder, grid = federate(tmp_path, method="fedavg,pfedgpa", **settings)
        rows = summary(folder)
        assert rows["pfedgpa"]["bytes_up"] == rows["fedavg"]["bytes_up"]
        assert rows["pfedgpa"]["bytes_down"] == rows["fedavg"]["bytes_down"]
        assert rows["pfedgpa"]["accuracy_mean_of_last_five_rounds"] is not None
        # from round 2 on every client trains from weights of its own
        sent: dict[int, set[bytes]] = {}
        for message in train_messages(grid, "pfedgpa"):
            server_round: Any = message.content.config_records["config"]["round"]
            weight = message.content.array_records["arrays"]["fc1.weight"]
            sent.setdefault(server_round, set()).add(weight.data)
        assert [len(sent[r]) for r in (1, 2, 3, 4)] == [1, 4, 4, 4]

    def test_who_keeps_something_is_known_whether_its_upload_counts_or_not(
        self, tmp_path: Path
    ) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            asked: Any = message.content.config_records["config"]
            if message.metadata.message_type == "train" and asked["client"] == 1:
                sent = reply.content.array_records["arrays"].to_torch_state_dict()
                reply.content["arrays"] = ArrayRecord({n: t * math.nan for n, t in sent.items()})
            return reply

        _, grid = federate(tmp_path, method="fedper", num_server_rounds=2, tamper=spoil)
        asked: list[Any] = [m.content.config_records["config"] for m in grid.sent]
        assert {c["keeps"] for c in asked if c.get("round") == 2 and c["client"] in (0, 1)} == {
            True
        }

    def test_local_only_sends_nothing_and_keeps_its_state(self, tmp_path: Path) -> None:
        folder, grid = federate(tmp_path, method="local")
        row = summary(folder)["local"]
        assert row["bytes_up"] == row["bytes_down"] == 0
        losses = [r["train_loss"] for r in records(folder) if r["client"] == 0]
        assert losses == sorted(losses, reverse=True)
        assert all("local." in key for c in grid.contexts.values() for key in c.state.array_records)

    @pytest.mark.parametrize(("head", "told"), [(1, 0), (99, 1)])
    def test_a_method_that_shares_nothing_is_told(
        self, head: int, told: int, tmp_path: Path
    ) -> None:
        how: dict[str, Any] = {"method": "fedper,local", "num_server_rounds": 1}
        folder, _ = federate(tmp_path, **how, **{"fedper.head-layers": head})
        alone = [e["text"] for e in records(folder, "events.jsonl") if "learns alone" in e["text"]]
        assert [text.split(":")[0] for text in alone] == ["FedPer"] * told

    def test_controls(self, tmp_path: Path) -> None:
        methods = "fedavg,last-upload,client-mean,group-mean,pfedgpa-inverted,pfedgpa-sampled"
        folder, _ = federate(tmp_path, method=methods, save_uploads=True, num_clients=6)
        stored = load_file(folder / "uploads.safetensors")
        mine = stored["clients"] == 5  # groups repeat after five clients: 5 is with 0
        group = mine | (stored["clients"] == 0)
        last = mine & (stored["rounds"] == 4)
        for name, rows in (("client-mean", mine), ("group-mean", group), ("last-upload", last)):
            weights = load_file(folder / "weights" / f"{name}.safetensors")
            names = [k.removeprefix("global/") for k in stored if k.startswith("global/")]
            sizes = {k: stored[f"global/{k}"].numel() for k in names}
            order = [k.split("/")[1] for k in weights if k.startswith("client-5/")]
            assert set(order) == set(sizes)
            total = sum(float(weights[f"client-5/{k}"].double().sum()) for k in names)
            assert total == pytest.approx(
                float(stored["vectors"][rows].mean(0).double().sum()), abs=1e-3
            )
        assert summary(folder)["group-mean"]["analysis_only"]
        assert summary(folder)["pfedgpa-inverted"]["strength"] == 1000  # the whole schedule
        assert summary(folder)["pfedgpa-sampled"]["strength"] == 1000

    def test_partial_participation(self, tmp_path: Path) -> None:
        settings = {"fraction_train": 0.3, "num_clients": 6, "method": "fedavg,pfedgpa-once"}
        folder, grid = federate(tmp_path, **settings)
        assert len(train_messages(grid)) == 4 * 2
        evaluated = [r for r in records(folder) if r["round"] == 4]
        assert len(evaluated) == 6  # all clients, not the participants alone
        assert sum(r["participated"] for r in evaluated) == 2
        seen = {r["client"] for r in records(folder) if r["participated"]}
        weights = load_file(folder / "weights" / "pfedgpa-once.safetensors")
        own = {name.split("/")[0] for name in weights} - {"global"}
        assert own == {f"client-{c}" for c in seen}  # the others are served FedAvg's model
        assert ("global/fc1.weight" in weights) == (len(seen) < 6)

    def test_the_better_by_validation_is_kept(self, tmp_path: Path) -> None:
        # a fine-tuning that destroys: before must be kept wherever validation shows it
        settings = {"fine_tune_learning_rate": 50.0, "fine_tune_epochs": 2, "method": "fedavg"}
        folder, _ = federate(tmp_path, num_server_rounds=8, **settings)
        row = summary(folder)["fedavg"]
        assert row["accuracy_after_ft"] < 0.6 * row["accuracy_before_ft"]
        assert row["accuracy_kept"] > row["accuracy_before_ft"] - 5


def reply_with(message: Message, arrays: dict[str, Array], **metrics: Any) -> Message:
    asked: Any = message.content.config_records["config"]
    content = RecordDict(
        {
            "arrays": ArrayRecord(arrays),
            "metrics": MetricRecord(
                {"num-examples": 10, "loss": 1.0, "round": asked["round"]} | metrics
            ),
        }
    )
    return Message(content, reply_to=message)


def spoil(kind: str, message: Message, reply: Message) -> Message | None:
    """The reply of client 1 in round 4 (others untouched), made bad in one way."""
    config = message.content.config_records["config"]
    if message.metadata.message_type != "train" or config["client"] != 1 or config["round"] != 4:
        return reply
    arrays = dict(reply.content.array_records["arrays"])
    weight = arrays["fc1.weight"].numpy().copy()
    if kind == "silent":
        return None
    if kind == "missing":
        del arrays["fc1.bias"]
    elif kind == "extra":
        arrays["fc9.bias"] = arrays["fc1.bias"]
    elif kind == "shape":
        arrays["fc1.weight"] = Array(weight[:5].copy())
    elif kind == "dtype":
        arrays["fc1.weight"] = Array(weight.astype("float64"))
    elif kind in ("nan", "inf"):
        weight[0, 0] = float(kind)
        arrays["fc1.weight"] = Array(weight)
    elif kind == "garbage":
        arrays["fc1.weight"] = Array(
            dtype="float32", shape=(20, 256), stype="numpy.ndarray", data=b"no array"
        )
    elif kind == "huge":
        arrays = {name: Array(array.numpy() * np.float32(1e9)) for name, array in arrays.items()}
    elif kind == "large":
        arrays["fc1.weight"] = Array(np.zeros((2000, 2560), np.float32))
    elif kind == "empty":
        arrays = {}
    wrong = {"examples": {"num-examples": 0}, "claims": {"num-examples": 2**60}}
    wrong["replayed"] = {"round": 3}
    return reply_with(message, arrays, **wrong.get(kind, {}))


BAD = {
    "silent": "did not answer",
    "missing": "missing names ['fc1.bias']",
    "extra": "extra names ['fc9.bias']",
    "shape": "fc1.weight of shape [5, 256], not [20, 256]",
    "dtype": "fc1.weight as torch.float64",
    "nan": "fc1.weight with numbers that are not finite",
    "inf": "fc1.weight with numbers that are not finite",
    "garbage": "cannot be read",
    "examples": "num-examples 0",
    "claims": "num-examples 1152921504606846976 instead of a whole number from 1 to 2^53",
    "huge": "1e+09 times as large as usual",
    "large": "fc1.weight in 20480128 bytes, where 20480 are enough",
    "empty": "missing names",
    "replayed": "an upload of round 3",
}


class TestBadUploads:
    @pytest.mark.parametrize("kind", BAD)
    def test_is_rejected_by_name_and_the_round_goes_on(
        self, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[WeightDistribution] = []
        original = WeightDistribution.__init__

        def spy(self: WeightDistribution, *args: Any, **more: Any) -> None:
            original(self, *args, **more)
            seen.append(self)

        monkeypatch.setattr(WeightDistribution, "__init__", spy)
        folder, _ = federate(tmp_path, lambda m, r: spoil(kind, m, r), method="pfedgpa-once")
        warnings = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert len(warnings) == 1
        assert "round 4: client 1 " in warnings[0]
        assert BAD[kind] in warnings[0]
        # nothing of it entered the buffer, and client 1 is served from its upload of round 3
        buffered = set(zip(seen[0].rounds.tolist(), seen[0].clients.tolist(), strict=True))
        assert buffered == {(r, c) for r in range(1, 5) for c in range(4)} - {(4, 1)}
        assert seen[0].newest == [0, 1, 2, 3]
        assert torch.isfinite(seen[0].latents).all()

    def test_training_that_diverges_everywhere_says_what_to_do(self, tmp_path: Path) -> None:
        said = r"none of 4 clients .* not finite: their training has diverged: lower learning-rate"
        with pytest.raises(NoUploadsError, match=said):
            federate(tmp_path, method="fedavg", learning_rate=1e20)
        own: dict[str, Any] = {"pfedme.personal_learning_rate": 1e20, "pfedme.lam": 0.0}
        with pytest.raises(NoUploadsError, match=r"lower pfedme.learning-rate or pfedme.personal"):
            federate(tmp_path / "own", method="pfedme", **own)
        with pytest.raises(NoUploadsError, match=r"lower learning-rate or fedproto.lam, or scale"):
            federate(tmp_path / "step", method="fedproto", **{"fedproto.lam": 1e30})

    def test_no_uploads_at_all_ends_the_run_with_results_on_disk(self, tmp_path: Path) -> None:
        def fail(message: Message, reply: Message) -> Message | None:
            config = message.content.config_records["config"]
            late = config["round"] == 3 and config["method"] == "fedavg"
            return None if late and message.metadata.message_type == "train" else reply

        said = r"round 3 of fedavg: none of 4 clients .*; the first: clients 0, 1, 2, 3: did not "
        with pytest.raises(NoUploadsError, match=said):
            federate(tmp_path, fail, method="local,fedavg")
        folder = tmp_path / "run"
        assert list(summary(folder)) == ["local"]
        assert max(r["round"] for r in records(folder) if r["federation"] == "fedavg") == 2
        assert records(folder, "events.jsonl")[-1]["kind"] == "failed"

    def test_a_minimum_of_uploads_and_going_on_after_it(self, tmp_path: Path) -> None:
        reference, _ = federate(tmp_path / "reference", method="fedavg", min_uploads=3)

        def fail(message: Message, reply: Message) -> Message | None:
            config: Any = message.content.config_records["config"]
            trains = message.metadata.message_type == "train"
            return None if trains and config["round"] == 3 and config["client"] > 1 else reply

        with pytest.raises(NoUploadsError, match=r"only 2 of 4 .* min-uploads is 3"):
            federate(tmp_path, fail, method="fedavg", min_uploads=3)
        folder, _ = federate(tmp_path, method="fedavg", min_uploads=3, resume=True)
        assert records(folder) == records(reference)

    @pytest.mark.parametrize("limit", [100.0, 0.0])
    def test_too_large(self, limit: float) -> None:
        """Median norm of 1, 2 and 1000 is 2; of two uploads nobody knows, so 3 is expected."""
        uploads = {i: Upload({"w": torch.tensor([x])}, 1) for i, x in enumerate((1.0, 2.0, 1e3))}
        expected = {"w": torch.tensor([3.0])}
        assert set(too_large(uploads, expected, limit)) == ({2} if limit else set())
        del uploads[0]
        assert set(too_large(uploads, expected, limit)) == ({2} if limit else set())
        assert not too_large(uploads, expected, 400.0)
        assert not too_large({0: Upload({}, 1)}, {}, limit)

    def test_evaluations_that_cannot_be(self, tmp_path: Path) -> None:
        def lie(message: Message, reply: Message) -> Message:
            config = message.content.config_records["config"]
            if config["client"] == 2 and message.metadata.message_type != "train":
                final = message.metadata.message_type == "evaluate.final"
                wrong = {"test": [10**9]} if final else {"correct": 10**9}
                reply.content["metrics"] = MetricRecord(
                    dict(reply.content.metric_records["metrics"]) | wrong
                )
            if config["client"] == 3 and message.metadata.message_type == "evaluate.final":
                del reply.content["metrics"]
            return reply

        folder, _ = federate(tmp_path, lie, method="fedavg", num_server_rounds=2)
        assert {r["client"] for r in records(folder, "clients.jsonl")} == {0, 1}
        assert {r["client"] for r in records(folder) if r["accuracy"] is not None} == {0, 1, 3}
        texts = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert sum("an impossible evaluation" in text for text in texts) == 4

    @pytest.mark.parametrize(
        ("change", "fine_tunings", "good"),
        [
            ({}, 1, True),
            ({"test": [3]}, 1, False),  # of two
            ({"validation": [1, 1, 1]}, 1, False),
            ({"agreement": [3.5]}, 1, False),
            ({"agreement": 11}, 1, False),
            ({"test-images": 0, "test": [0, 0], "agreement": 0}, 1, False),
            ({"correct": 3, "images": 10, "loss": 0.5}, None, True),
            ({"correct": 3, "images": 10}, None, False),  # without a loss
            ({}, None, False),  # a final one in a round
        ],
    )
    def test_counts_are_checked(
        self, change: dict[str, Any], fine_tunings: int | None, good: bool
    ) -> None:
        final = {"test": [3, 4], "test-images": 10, "validation": [1, 2], "validation-images": 5}
        wrong = check_counts(final | {"agreement": 9} | change, fine_tunings)
        assert ("an impossible evaluation" in wrong) != good
        assert (wrong == "") == good

    def test_a_node_that_leaves_and_comes_back_by_another_name(self, tmp_path: Path) -> None:
        """Node of client 1 is away in round 2 and back from round 3, without its state."""

        class Wandering(InProcessGrid):
            def get_node_ids(self) -> Any:
                sent = train_messages(self, "fedper")
                asked: Any = [message.content.config_records["config"] for message in sent]
                latest = max((config["round"] for config in asked), default=0)
                nodes = list(self.contexts)
                if latest == 1:
                    return nodes[:1] + nodes[2:]
                if latest == 2 and 77 not in self.contexts:
                    old = self.contexts.pop(nodes[1])
                    self.contexts[77] = Context(
                        run_id=old.run_id,
                        node_id=77,
                        node_config=old.node_config,
                        state=RecordDict(),
                        run_config=old.run_config,
                    )
                return list(self.contexts)

        run_config = PLAIN | {"method": "fedper", "out-dir": str(tmp_path), "run-name": "run"}
        folder = run(Wandering(run_config, 4), resolve(run_config))
        texts = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert "fedper round 2: client 1 is not connected" in texts
        trained = {(r["round"], r["client"]) for r in records(folder) if r["participated"]}
        assert trained == {(r, c) for r in range(1, 5) for c in range(4)} - {(2, 1)}

    def test_messages_that_wait_for_their_node_live_longer(self, tmp_path: Path) -> None:
        """Flower drops a message ``ttl`` s after it was made, and ends a run that sends it then."""
        how: dict[str, Any] = {"method": "fedavg", "num_clients": 5, "num_server_rounds": 1}
        _, grid = federate(tmp_path, nodes=2, timeout=60.0, **how)
        assert [m.metadata.ttl for m in train_messages(grid)] == [60, 60, 120, 120, 180]

    def test_a_failing_client_is_named(self, tmp_path: Path) -> None:
        folder, grid = federate(tmp_path, method="fedavg", num_server_rounds=1)
        message = train_messages(grid)[0]
        bad = Message(RecordDict({"other": ArrayRecord()}), reply_to=message)
        upload, reason = check_upload(bad, {}, 1)
        assert upload is None
        assert "['other']" in reason
        raised = "<class 'pfedgpa_app.core.settings.DataError'>:<'dataset npz:a: has one class'>"
        lost = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, raised), reply_to=message)
        assert failure(lost).endswith(": DataError: dataset npz:a: has one class")
        traceback = 'ray::run() (pid=7)\n  File "a.py", line 3\n    f()\n    ^^^\n'
        traceback += "mine.own.OddError: no such scale\n  in run\n    ^^^^^"
        lost = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, traceback), reply_to=message)
        assert failure(lost).endswith(": OddError: no such scale")
        assert folder.exists()


@pytest.mark.parametrize(
    ("precision", "emulated", "warns"),
    [("bfloat16", True, True), ("bfloat16", False, False), ("float32", True, False)],
)
def test_warns_of_a_precision_that_the_machine_must_emulate(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    emulated: bool,
    warns: bool,
) -> None:
    monkeypatch.setattr(sgd, "bfloat16_is_emulated", lambda device: emulated)
    settings = {"method": "fedavg", "num_server_rounds": 1, "precision": precision}
    folder, _ = federate(tmp_path, **settings)
    warned = [r["text"] for r in records(folder, "events.jsonl") if r["kind"] == "warning"]
    assert any(text.startswith("precision = bfloat16") for text in warned) == warns


@pytest.mark.parametrize(
    ("method", "epochs", "warns"),
    [("fedavg-ft-tuned", 0, True), ("fedavg-ft-tuned", 1, False), ("fedavg,fedavg-ft", 0, False)],
)
def test_tuned_fine_tuning_without_a_grid_is_told(
    tmp_path: Path, method: str, epochs: int, warns: bool
) -> None:
    how: dict[str, Any] = {"num_server_rounds": 1, "fine_tune_grid_epochs": epochs}
    folder, _ = federate(tmp_path, method=method, **how)
    warned = [r["text"] for r in records(folder, "events.jsonl") if r["kind"] == "warning"]
    assert any("FedAvg-FT (tuned) tunes nothing" in text for text in warned) == warns
    assert any("fine-tune-grid-epochs=" in text for text in warned) == warns


def test_what_nobody_could_tell_is_null(tmp_path: Path) -> None:
    """JSON has no word for NaN, and other programs read it."""

    def silent(message: Message, reply: Message) -> Message | None:
        config = message.content.config_records["config"]
        joins = message.metadata.message_type == "evaluate" and config["client"] == 3
        return None if joins else reply

    how: dict[str, Any] = {"join_clients": 1, "join_iterations": 1, "num_server_rounds": 1}
    folder, _ = federate(tmp_path / "a", tamper=silent, method="fedavg", **how)
    other, _ = federate(tmp_path / "b", method="fedavg", seed=1, **how)

    def refuse(word: str) -> None:
        raise AssertionError(word)

    for path in folder.glob("*.json*"):
        text = path.read_text()
        for part in text.splitlines() if path.suffix == ".jsonl" else [text]:
            json.loads(part, parse_constant=refuse)
    assert summary(folder)["fedavg"]["accuracy_of_joining_clients"] == [None, None]
    said = [record["text"] for record in records(folder, "events.jsonl")]
    assert "FedAvg: clients that join: – → – %" in said
    known = summary(other)["fedavg"]["accuracy_of_joining_clients"]
    means = table([rows_of(folder), rows_of(other)])
    assert all(f" {accuracy:.2f} " in means for accuracy in known)
    assert "fedavg" in "\n".join(inspection.lines_about(folder))
    assert "FedAvg" in report.write([folder, other], tmp_path / "report.html").read_text()


def test_clients_join_where_what_is_trained_from_is_no_network(tmp_path: Path) -> None:
    methods = "scaffold,fedproto,fedfomo"
    folder, _ = federate(tmp_path, method=methods, join_clients=1, join_iterations=1)
    for row in summary(folder).values():
        assert all(0 <= accuracy <= 100 for accuracy in row["accuracy_of_joining_clients"])


class TestMissing:
    """Clients that drop out of a round or are late, in simulations."""

    @pytest.mark.parametrize("method", ["fedavg", "scaffold", "pfedgpa"])
    def test_they_have_no_part_in_the_round(self, method: str, tmp_path: Path) -> None:
        how: dict[str, Any] = {"dropout_share": 0.25, "straggler_share": 0.25}
        folder, grid = federate(tmp_path, method=method, num_server_rounds=4, num_clients=8, **how)
        config = kept_config(folder)
        for server_round in range(1, 5):
            asked, late = asked_in(config, server_round)
            dropped = set(range(8)) - set(asked)
            assert (len(dropped), len(late), len(dropped & late)) == (2, 2, 0)
            here = {
                r["client"]
                for r in records(folder)
                if r["participated"] and r["round"] == server_round
            }
            assert here == set(range(8)) - dropped - late
        accuracies = {r["client"]: r["before_ft"] for r in records(folder, "clients.jsonl")}
        mean = sum(accuracies[client] for client in here) / len(here)
        told = summary(folder)[method]["accuracy_before_ft_participants"]
        assert told == pytest.approx(mean, abs=1e-3)
        # whoever is late has trained, whoever drops out was not even asked
        assert len(train_messages(grid, method)) == 4 * 6
        assert len({tuple(asked_in(config, r)[0]) for r in range(1, 5)}) > 1
        said = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert not any("client" in text for text in said)

    def test_whose_upload_is_refused_is_no_participant(self, tmp_path: Path) -> None:
        def tamper(message: Message, reply: Message) -> Message:
            asked: Any = message.content.config_records["config"]
            if message.metadata.message_type == "train" and asked["client"] == 2:
                reply.content.metric_records["metrics"]["num-examples"] = -1
            return reply

        folder, _ = federate(tmp_path, tamper, method="pfedgpa", num_server_rounds=2)
        accuracies = {r["client"]: r["before_ft"] for r in records(folder, "clients.jsonl")}
        mean = sum(accuracies[client] for client in (0, 1, 3)) / 3
        told = summary(folder)["pfedgpa"]["accuracy_before_ft_participants"]
        assert told == pytest.approx(mean, abs=1e-3)
        assert told != pytest.approx(sum(accuracies.values()) / 4, abs=1e-3)

    def test_who_is_late_is_to_the_server_as_who_drops_out(self, tmp_path: Path) -> None:
        """Where clients keep nothing, or take it back: a table is of both (docs/deploy.md)."""
        how: dict[str, Any] = {"method": "fedavg,scaffold,pfedgpa", "num_server_rounds": 4}
        dropped, _ = federate(tmp_path / "dropped", dropout_share=0.5, **how)
        late, _ = federate(tmp_path / "late", straggler_share=0.5, **how)
        found, expected = (results(folder)["weights"] for folder in (late, dropped))
        assert found == expected

    def test_as_many_as_a_round_needs_are_left(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"dropout_share": 0.8, "straggler_share": 0.8, "min_uploads": 2}
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=2, **how)
        times = Counter(r["round"] for r in records(folder) if r["participated"])
        assert times == {1: 2, 2: 2}

    def test_real_nodes_fail_by_themselves(self) -> None:
        with pytest.raises(ConfigError, match="are for simulations"):
            resolve({"dataset": "nodes", "dropout-share": 0.2})
        with pytest.raises(ConfigError, match="attack = scale: is for simulations"):
            resolve({"dataset": "nodes", "attack": "scale"})
