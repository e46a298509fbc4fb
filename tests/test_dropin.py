"""``from pfedgpa_app import PFedGPA`` in somebody's Flower app."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping as ClientSide
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping as ServerSide
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedMedian, Krum
from safetensors import safe_open
from safetensors.torch import load_file

from pfedgpa_app import PFedGPA
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.dropin.network import Network, like_uploads, whole_networks
from pfedgpa_app.dropin.personal import Personal
from pfedgpa_app.engine.grid import FIRST_NODE, NODE_STEP
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.methods.generation import PFedGPASettings
from pfedgpa_app.methods.pfedgpa import PFedGPA as Server
from pfedgpa_app.server.screening import NoUploadsError
from tests.support.local_grid import InProcessGrid

QUICKSTART = Path(__file__).parent / "support" / "quickstart"
QUICK = PFedGPASettings(fit_steps=20, width=16, draws=4)
RUN = {"local-epochs": 1, "batch-size": 32}
ARRAYS = {"w": torch.zeros(4, 3), "b": torch.zeros(3)}


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Somebody's app, importable."""
    monkeypatch.syspath_prepend(QUICKSTART)
    from quickstart import client_app, task  # type: ignore[import-not-found]

    yield client_app.app, task.Net
    for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
        del sys.modules[name]


def weights_app() -> ClientApp:
    """Clients that reply with what they were sent, plus their partition's number."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Any) -> Message:
        sent = message.content.array_records["arrays"].to_torch_state_dict()
        mine = context.node_config["partition-id"]
        arrays = {n: (t + mine if n.startswith("w") else t) for n, t in sent.items()}
        metrics = MetricRecord({"num-examples": 10 * (mine + 1), "loss": float(mine)})
        content = RecordDict({"model": ArrayRecord(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Any) -> Message:
        mine = context.node_config["partition-id"]
        metrics = MetricRecord({"num-examples": 10 * (mine + 1), "loss": float(mine)})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def partition_of(message: Message) -> int:
    return (FIRST_NODE - message.metadata.dst_node_id) // -NODE_STEP


def start(
    arrays: dict[str, torch.Tensor],
    tamper: Any = None,
    *,
    nodes: int = 4,
    rounds: int = 2,
    settings: PFedGPASettings = QUICK,
    **how: Any,
) -> tuple[PFedGPA, Any]:
    how = {"min_train_nodes": 1, "min_available_nodes": 1, "fraction_evaluate": 0.0} | how
    strategy = PFedGPA(settings=settings, **how)
    grid = InProcessGrid({}, nodes, tamper, weights_app())
    return strategy, strategy.start(grid, ArrayRecord(arrays), rounds)


def own(strategy: PFedGPA) -> list[dict[str, torch.Tensor]]:
    return [dict(record.to_torch_state_dict()) for record in strategy.personal.values()]


class TestQuickstart:
    def test_every_node_is_sent_weights_of_its_own(self, quickstart: Any, tmp_path: Path) -> None:
        app, net = quickstart
        grid = InProcessGrid(RUN, 6, app=app)
        strategy = PFedGPA(settings=QUICK, save_dir=tmp_path)
        torch.manual_seed(0)
        result = strategy.start(
            grid, ArrayRecord(net().state_dict()), 5, train_config=ConfigRecord({"lr": 0.1})
        )
        assert set(strategy.personal) == set(range(6))
        sent = [m for m in grid.sent if m.metadata.message_type == "train"]
        rates = [m.content.config_records["config"]["lr"] for m in sent]
        assert rates == pytest.approx([0.1] * 24 + [0.01] * 6)
        last = [m for m in grid.sent if m.metadata.message_type == "evaluate"][-6:]
        for message in last:
            mine = partition_of(message)
            got = message.content.array_records["arrays"].to_torch_state_dict()
            own = strategy.personal[mine].to_torch_state_dict()
            saved = load_file(tmp_path / "run-1" / f"client-{mine}.safetensors")
            like = net().state_dict()
            assert list(got) == list(own) == list(like)
            for name, tensor in like.items():
                assert torch.equal(got[name], own[name])
                assert torch.equal(saved[name], own[name])
                assert own[name].shape == tensor.shape
                assert own[name].dtype == tensor.dtype
            # tied weights stay tied, variances positive, counters count
            assert torch.equal(own["inner.weight"], own["again.weight"])
            assert (own["norm.running_var"] > 0).all()
            assert own["norm.num_batches_tracked"] == 5 * 4  # 120 images in batches of 32
        first, second = (
            strategy.personal[node].to_torch_state_dict()["out.weight"]
            for node in list(strategy.personal)[:2]
        )
        assert not torch.equal(first, second)
        accuracies: list[Any] = [m["eval_acc"] for m in result.evaluate_metrics_clientapp.values()]
        assert accuracies[-1] > max(0.5, accuracies[0])

    def test_before_generation_it_is_fedavg(self, quickstart: Any) -> None:
        app, net = quickstart
        torch.manual_seed(0)
        initial = net().state_dict()
        means = []
        for kind in (FedAvg, PFedGPA):
            quick: Any = {"settings": PFedGPASettings(fit_steps=20)} if kind is PFedGPA else {}
            strategy = kind(fraction_evaluate=0.0, **quick)
            config = ConfigRecord({"lr": 0.1})
            grid = InProcessGrid(RUN, 3, app=app)
            strategy.start(grid, ArrayRecord(initial), 3, train_config=config)
            second = grid.sent[5]  # of three a round; after it weights are generated
            means.append(second.content.array_records["arrays"].to_torch_state_dict())
        assert list(means[0]) == list(means[1])
        for name, tensor in means[1].items():
            assert tensor.dtype == initial[name].dtype  # FedAvg's counters become float64
            if tensor.is_floating_point():
                assert torch.allclose(means[0][name].float(), tensor, atol=1e-6)

    @pytest.mark.slow
    @pytest.mark.xdist_group("simulation")
    def test_in_flowers_simulation(self, simulation: Simulation, tmp_path: Path) -> None:
        """``flwr run`` on the app as it lies there."""
        federation = "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=1"
        given = {"out": str(tmp_path), "fit-steps": 20}
        run_id = simulation.run(QUICKSTART, given, "--federation-config", federation)
        simulation.follow(run_id, tmp_path / "log").wait(timeout=1200)
        status, _ = simulation.status(run_id)
        log = (tmp_path / "log").read_text(errors="replace")
        assert status.startswith("finished:completed"), log[-3000:]
        assert len(list(tmp_path.glob(f"run-{run_id}/client-[0-3].safetensors"))) == 4
        assert "round 3: generated for 4 nodes" in log
        accuracies = json.loads((tmp_path / "accuracies.json").read_text())
        assert set(accuracies) == {"1", "2", "3"}
        assert accuracies["3"] > accuracies["1"]


@pytest.mark.parametrize("wrapper", [ServerSide, ClientSide])
def test_central_privacy_around_it_is_refused_in_words(wrapper: Any) -> None:
    """It would put its noise on the mean, and none on what is generated for a node."""
    inner = PFedGPA(settings=QUICK, min_train_nodes=1, min_available_nodes=1)
    around = wrapper(inner, noise_multiplier=1.0, clipping_norm=1.0, num_sampled_clients=4)
    with pytest.raises(ConfigError, match="does not work inside another strategy"):
        around.start(InProcessGrid({}, 4, app=weights_app()), ArrayRecord(ARRAYS), 2)
    # nor where it had been started by itself before
    inner.start(InProcessGrid({}, 4, app=weights_app()), ArrayRecord(ARRAYS), 1)
    with pytest.raises(ConfigError, match="does not work inside another strategy"):
        around.start(InProcessGrid({}, 4, app=weights_app()), ArrayRecord(ARRAYS), 2)


def test_the_example_for_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its ServerApp as it is, with fewer rounds and a quicker fit."""
    monkeypatch.syspath_prepend(APP_DIR / "examples" / "tabular")
    from tabular import client_app, server_app  # type: ignore[import-not-found]

    monkeypatch.setattr(server_app, "PFedGPA", functools.partial(PFedGPA, settings=QUICK))
    config = {"num-server-rounds": 6, "learning-rate": 0.1, "local-epochs": 2}
    run_config: Any = config | {"out": str(tmp_path)}
    context = Context(1, 1, {}, RecordDict(), run_config)
    server_app.app(InProcessGrid(config, 6, app=client_app.app), context)
    assert len(list(tmp_path.glob("run-1/client-[0-5].safetensors"))) == 6


class TestArrays:
    def test_half_precision_and_scalars(self) -> None:
        arrays = {"w": torch.zeros(3, dtype=torch.float16), "w0": torch.tensor(0.0)}
        strategy, _ = start(arrays)
        for mine in own(strategy):
            assert mine["w"].dtype == torch.float16
            assert mine["w0"].shape == ()
            assert mine["w"][0].item() == pytest.approx(mine["w0"].item(), abs=1e-2)

    def test_whole_numbers_are_the_largest_clients(self) -> None:
        arrays = {"w": torch.zeros(3), "w counter": torch.tensor(0), "w mask": torch.tensor([1])}
        _, result = start(arrays)
        found = result.arrays.to_torch_state_dict()
        assert found["w counter"] == 6  # partition 3 adds 3 in each of two rounds
        assert found["w mask"].dtype == torch.int64

    @pytest.mark.parametrize(
        "other",
        [
            torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]),  # a causal mask
            torch.tensor([torch.nan, 1.0]),
            torch.tensor([1e300, 2.0], dtype=torch.float64),  # not finite in float32
            torch.tensor([1 + 2j, -3j]),
            torch.tensor([1 + 2j], dtype=torch.complex128),
            torch.zeros(0, 3),
            torch.zeros(0),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("name", ["w other", "other"])  # that clients change, that they do not
    def test_what_cannot_be_generated_is_flowers_mean(self, other: torch.Tensor, name: str) -> None:
        arrays = ArrayRecord({"w": torch.zeros(2, 3), name: other})
        flower = FedAvg(fraction_evaluate=0.0).start(
            InProcessGrid({}, 4, None, weights_app()), arrays, 2
        )
        strategy, result = start(dict(arrays.to_torch_state_dict()))
        mean = flower.arrays.to_torch_state_dict()[name].to(other.dtype)
        for found in [result.arrays.to_torch_state_dict(), *own(strategy)]:
            assert torch.allclose(found[name], mean, equal_nan=True)
            assert found[name].dtype == other.dtype
        values = {mine["w"][0, 0].item() for mine in own(strategy)}
        assert len(values) == 4  # generated beside it

    @pytest.mark.parametrize(
        "only", [torch.zeros(3, dtype=torch.int64), torch.zeros(0), torch.tensor(torch.inf)]
    )
    def test_nothing_to_generate_is_refused(self, only: torch.Tensor) -> None:
        with pytest.raises(ConfigError, match="floating-point"):
            start({"w": only})


class TestHostileNodes:
    """Partition 3 of 0..3, or 2 and 3, misbehave; the rest is served as if they were not there."""

    def test_a_bad_upload_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            if partition_of(message) == 3:
                array = Array(torch.full((3,), torch.nan).numpy())
                reply.content["model"] = ArrayRecord({"w": array})
            return reply

        strategy, result = start({"w": torch.zeros(3)}, spoil)
        assert len(strategy.personal) == 3
        assert torch.isfinite(result.arrays.to_torch_state_dict()["w"]).all()
        assert "not finite" in caplog.text

    @pytest.mark.parametrize(
        "examples",
        [1e308, 10**400, 2**54, torch.inf, torch.nan, 0, -1.0, [10], None],
        ids="{!r:.9}".format,
    )
    def test_impossible_counts(self, examples: Any, caplog: pytest.LogCaptureFixture) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            metrics = reply.content.metric_records["metrics"]
            if partition_of(message) > 1:
                del metrics["num-examples"]
                if examples is not None:
                    metrics["num-examples"] = examples
            return reply

        strategy, result = start({"w": torch.zeros(1)}, spoil, fraction_evaluate=1.0)
        # partitions 0 and 1 of 10 and 20 examples add 0 and 1 in each of two rounds
        assert result.arrays.to_torch_state_dict()["w"].item() == pytest.approx(4 / 3)
        assert len(strategy.personal) == 2
        for metrics in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
            assert metrics[2]["loss"] == pytest.approx(2 / 3)
        assert f"sent num-examples {examples!r}"[:100] in caplog.text

    @pytest.mark.parametrize("odd", [{}, {"loss": 9.0, "more": 1.0}, {"loss": [9.0]}])
    def test_metrics_of_another_form(
        self, odd: dict[str, Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """Flower's FedAvg ends the run; here the upload counts, and the metrics do not."""

        def spoil(message: Message, reply: Message) -> Message:
            if partition_of(message) == 3:
                metrics = MetricRecord({"num-examples": 40, **odd})
                reply.content["metrics"] = metrics
            return reply

        strategy, result = start({"w": torch.zeros(1)}, spoil, fraction_evaluate=1.0)
        # in the second round nodes train on from what was generated for them
        assert result.arrays.to_torch_state_dict()["w"].item() == pytest.approx(4.0, abs=0.05)
        assert len(strategy.personal) == 4
        for metrics in (result.train_metrics_clientapp, result.evaluate_metrics_clientapp):
            assert dict(metrics[1]) == {"loss": pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)}
        bad = FIRST_NODE + 3 * NODE_STEP
        assert f"round 1, train: node {bad} sent metrics unlike those of most nodes" in caplog.text

    def test_warnings_name_the_partition_that_a_node_told(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def tell(message: Message, reply: Message) -> Message:
            metrics: Any = reply.content["metrics"]
            metrics["partition-id"] = 7
            if partition_of(message) == 1:
                metrics["num-examples"] = (
                    -1 if message.content["config"]["server-round"] == 2 else 1
                )
            return reply

        start({"w": torch.zeros(1)}, tell)
        node = FIRST_NODE + NODE_STEP
        assert f"round 2, train: partition-id 7 (node {node}) sent num-examples -1" in caplog.text

    @pytest.mark.parametrize(("key", "warns"), [("train_loss", True), ("loss", False)])
    def test_losses_that_nobody_tells(
        self, key: str, warns: bool, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = dataclasses.replace(QUICK, momentum=None)
        start({"w": torch.zeros(1)}, settings=settings, loss_key=key)
        said = f"no reply's metrics have a number named '{key}', the training loss"
        assert caplog.text.count(said) == int(warns)

    @pytest.mark.parametrize(("share", "momentum"), [(1.0, 0.0), (0.5, 0.5), (0.1, 0.7)])
    def test_momentum_goes_by_who_takes_part(self, share: float, momentum: float) -> None:
        settings = dataclasses.replace(QUICK, momentum=None)
        strategy, _ = start({"w": torch.zeros(1)}, settings=settings, fraction_train=share)
        server: Any = strategy._server
        assert server._momentum(1, {}, cosine=0.0) == momentum  # where nobody tells a loss

    @pytest.mark.parametrize("nodes", [2, 4])
    @pytest.mark.parametrize("limit", [100.0, 0.0, math.inf])
    def test_a_huge_upload_in_the_last_round(
        self, nodes: int, limit: float, caplog: pytest.LogCaptureFixture
    ) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            config: Any = message.content.config_records["config"]
            if partition_of(message) == nodes - 1 and config["server-round"] == 2:
                sent = reply.content.array_records["model"].to_torch_state_dict()
                huge = {name: tensor * 1e30 for name, tensor in sent.items()}
                reply.content["model"] = ArrayRecord(huge)
            return reply

        arrays = {"w": torch.ones(3), "w spectrum": torch.ones(2, dtype=torch.complex64)}
        how: Any = {} if limit == 100 else {"max_upload_norm": limit}
        strategy, result = start(arrays, spoil, nodes=nodes, **how)
        found = [result.arrays.to_torch_state_dict(), *own(strategy)]
        left_out = limit == 100
        assert (max(float(t.abs().max()) for f in found for t in f.values()) < 100) == left_out
        assert ("max_upload_norm is 100" in caplog.text) == left_out

    def test_weighting_and_metrics_are_fedavgs(self) -> None:
        _, result = start({"w": torch.zeros(1)}, weighted_by_key="num-examples")
        # partitions 0..3 with 10(p + 1) examples add p: (0·1 + 1·2 + 2·3 + 3·4)/10 = 2
        assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(2.0)

    @pytest.mark.parametrize(
        ("key", "expected"), [("train_loss", [1, 2.9, 5.61]), ("another", [1, 2, 3])]
    )
    def test_momentum_goes_by_the_training_loss(self, key: str, expected: list[float]) -> None:
        def telling(message: Message, reply: Message) -> Message:
            reply.content.metric_records["metrics"][key] = 0.5
            return reply

        seen: list[float] = []

        def look(server_round: int, arrays: ArrayRecord) -> MetricRecord:
            seen.append(float(arrays.to_torch_state_dict()["w"][0]))
            return MetricRecord({})

        strategy = PFedGPA(
            settings=dataclasses.replace(QUICK, generate_from=4),
            min_train_nodes=1,
            min_available_nodes=1,
            fraction_evaluate=0.0,
        )
        grid = InProcessGrid({}, 3, telling, weights_app())
        strategy.start(grid, ArrayRecord({"w": torch.zeros(3)}), 4, evaluate_fn=look)
        mean = (0 * 10 + 1 * 20 + 2 * 30) / 60  # of what the clients add to what they are sent
        assert seen[1:4] == pytest.approx([mean * each for each in expected])


class TestRounds:
    @pytest.mark.parametrize("empty", [{1}, {2}, {3}, {4}, {3, 4}, {1, 2, 3}], ids=str)
    def test_a_round_without_uploads_is_passed_over(self, empty: set[int]) -> None:
        def spoil(message: Message, reply: Message) -> Message | None:
            config: Any = message.content.config_records["config"]
            return None if config["server-round"] in empty else reply

        settings = dataclasses.replace(QUICK, generate_from=3)
        strategy, result = start({"w": torch.ones(3)}, spoil, rounds=4, settings=settings)
        assert set(result.train_metrics_clientapp) == {1, 2, 3, 4} - empty
        assert len({mine["w"][0].item() for mine in own(strategy)}) == 4

    def test_generation_may_begin_late(self) -> None:
        """After a first generating round without uploads, FedAvg's are forgotten all the same."""

        def spoil(message: Message, reply: Message) -> Message | None:
            config: Any = message.content.config_records["config"]
            return None if config["server-round"] == 3 else reply

        settings = dataclasses.replace(QUICK, generate_from=3)
        strategy, _ = start({"w": torch.ones(3)}, spoil, rounds=4, settings=settings)
        buffered = strategy._server.state.buffer.entries()
        assert {entry.server_round for entry in buffered} == {4}

    def test_no_usable_upload_at_all(self) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            reply.content["more"] = reply.content["model"]
            return reply

        words = (
            rf"none of 2 .* in round 2: node \d+ sent 2 array records.*; node {FIRST_NODE - 7} sent"
        )
        with pytest.raises(NoUploadsError, match=words):
            start({"w": torch.zeros(3)}, spoil)
        with pytest.raises(NoUploadsError, match=r"in round 2: node \d+ did not answer"):
            start({"w": torch.zeros(3)}, lambda message, reply: None)

    def test_one_node_alone(self) -> None:
        strategy, _ = start({"w": torch.ones(2, 2)}, nodes=1, rounds=1)
        assert own(strategy)[0]["w"].tolist() == [[1.0, 1.0]] * 2

    def test_a_second_start_begins_anew(self) -> None:
        strategy, _ = start({"w": torch.zeros(3)})
        sent = []
        grid = InProcessGrid({}, 4, lambda m, r: sent.append(m), weights_app())
        with pytest.raises(NoUploadsError):
            strategy.start(grid, ArrayRecord({"v": torch.zeros(2)}), 1)
        assert all(list(m.content.array_records["arrays"]) == ["v"] for m in sent)
        assert not strategy.personal


class TestPersonal:
    """What is left for each node."""

    @staticmethod
    def telling(message: Message, reply: Message) -> Message:
        reply.content.metric_records["metrics"]["partition-id"] = partition_of(message)
        return reply

    def test_what_there_was_when_the_server_was_stopped(self, tmp_path: Path) -> None:
        """As by Ctrl-C in the last of six rounds; weights are generated from the fifth on."""

        def stop(message: Message, reply: Message) -> Message:
            config: Any = message.content.config_records["config"]
            if config["server-round"] == 6:
                raise KeyboardInterrupt
            late = config["server-round"] == 5
            return self.telling(message, reply) if late else reply

        settings = dataclasses.replace(QUICK, generate_from=4)
        strategy = PFedGPA(settings=settings, save_dir=tmp_path)
        grid = InProcessGrid({}, 4, stop, weights_app())
        with pytest.raises(KeyboardInterrupt):
            strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 6)
        assert strategy.folder is not None
        files = {path.name for path in strategy.folder.iterdir()}
        assert files == {"mean.safetensors", *(f"client-{i}.safetensors" for i in range(4))}
        for name in files:
            with safe_open(strategy.folder / name, "pt") as file:
                assert file.metadata()["rounds"] == "5"
        mean = load_file(strategy.folder / "mean.safetensors")
        current = strategy._server.state.global_weights
        assert torch.equal(mean["w"], current["w"])
        assert mean["w"].item() > 0

    def test_a_full_disk_ends_no_run(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tried: list[int] = []

        def full(personal: Personal, folder: Path, rounds: int, mean: ArrayRecord) -> None:
            tried.append(rounds)
            if rounds < 3:
                raise OSError(28, "No space left on device")

        monkeypatch.setattr(Personal, "save", full)
        start({"w": torch.zeros(1)}, rounds=3, save_dir=tmp_path)
        assert tried == [1, 2, 3]
        assert caplog.text.count("cannot be written to: No space left on device") == 2

    def test_by_partition_where_nodes_tell_theirs(self, tmp_path: Path) -> None:
        strategy, result = start({"w": torch.zeros(1)}, self.telling, save_dir=tmp_path)
        assert sorted(strategy.personal) == [0, 1, 2, 3]
        assert "partition-id" not in result.train_metrics_clientapp[1]
        assert strategy.folder is not None
        for partition, record in strategy.personal.items():
            path = strategy.folder / f"client-{partition}.safetensors"
            assert torch.equal(load_file(path)["w"], record.to_torch_state_dict()["w"])
            with safe_open(path, "pt") as file:
                about = file.metadata()
            node = str(FIRST_NODE + partition * NODE_STEP)
            assert about["partition-id"] == str(partition)
            assert (about["node-id"], about["rounds"]) == (node, "2")

    def test_by_node_where_they_do_not_or_two_tell_the_same(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        def confused(message: Message, reply: Message) -> Message:
            mine: Any = [0, 1, 1, 3.5][partition_of(message)]
            reply.content.metric_records["metrics"]["partition-id"] = mine
            return reply

        nodes = [FIRST_NODE + i * NODE_STEP for i in range(4)]
        strategy, _ = start({"w": torch.zeros(1)}, confused)
        assert sorted(strategy.personal) == [0, *sorted(nodes[1:])]
        both = f"nodes {nodes[2]}, {nodes[1]} all tell partition-id 1"
        assert caplog.text.count(both) == 1

    def test_metrics_before_and_after_generation(self) -> None:
        def weighing(message: Message, reply: Message) -> Message:
            if message.metadata.message_type == "evaluate":
                got = message.content.array_records["arrays"].to_torch_state_dict()["w"]
                reply.content.metric_records["metrics"]["loss"] = float(got)
            return self.telling(message, reply)

        settings = dataclasses.replace(QUICK, generate_from=3)
        how: Any = {"rounds": 3, "settings": settings, "fraction_evaluate": 1.0}
        strategy, _ = start({"w": torch.zeros(1)}, weighing, **how)
        before, after = (
            {p: metrics[kind]["loss"] for p, metrics in strategy.personal_metrics.items()}
            for kind in ("before", "after")
        )
        assert set(before.values()) == {before[0]}  # the global weights of round 1
        for found in strategy.personal_metrics.values():
            assert (found["before"]["server-round"], found["after"]["server-round"]) == (1, 3)
        made = {p: float(r.to_torch_state_dict()["w"]) for p, r in strategy.personal.items()}
        assert after == pytest.approx(made)
        assert len(set(made.values())) == 4


class TestRefusals:
    def test_descriptors_that_foreign_clients_cannot_give(self) -> None:
        with pytest.raises(ValueError, match="class counts"):
            PFedGPA(settings=PFedGPASettings(descriptor="labels"))

    def test_settings_out_of_range(self) -> None:
        with pytest.raises(ConfigError, match=r"pfedgpa\.denoiser = 'gausian'.*gaussian"):
            PFedGPA(settings=PFedGPASettings(denoiser="gausian"))
        with pytest.raises(ValueError, match="max_upload_norm = nan"):
            PFedGPA(max_upload_norm=torch.nan)
        with pytest.raises(ConfigError, match="num_rounds = 0"):
            start({"w": torch.zeros(3)}, rounds=0)

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"settings": {"rank": 3}}, r"settings = \{'rank': 3\}: must be a PFedGPASettings"),
            ({"max_upload_norm": "a"}, r"max_upload_norm = 'a' .*: must be a number"),
            ({"seed": "x"}, r"seed = 'x' .*: must be a whole number"),
            ({"fraction_train": 0.0}, r"fraction_train = 0: no node would train"),
            ({"fraction_train": 1.5}, r"fraction_train = 1\.5 .*: must be > 0 and <= 1"),
        ],
        ids=str,
    )
    def test_arguments_that_cannot_be_used(self, given: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            PFedGPA(**given)

    @pytest.mark.parametrize("other", [FedAdam, FedAvgM, FedMedian, Krum])
    def test_another_way_to_aggregate(self, other: Any) -> None:
        for bases in ((PFedGPA, other), (other, PFedGPA)):
            with pytest.raises(ConfigError, match=f"a PFedGPA and a {other.__name__}|MultiKrum"):
                type("Both", bases, {})()

    def test_a_start_that_is_refused_leaves_what_there_was(self, tmp_path: Path) -> None:
        strategy, _ = start({"w": torch.zeros(3)}, save_dir=tmp_path)
        folder, weights = strategy.folder, own(strategy)
        grid = InProcessGrid({}, 4, self.unasked, weights_app())
        with pytest.raises(ConfigError):
            strategy.start(grid, ArrayRecord({"n": torch.tensor(3)}), 2)
        assert strategy.folder == folder
        assert [w["w"].tolist() for w in own(strategy)] == [w["w"].tolist() for w in weights]

    def test_a_folder_that_cannot_be_written_to(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        for folder in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/here")):
            with pytest.raises(ConfigError, match=r"save_dir = .* cannot be written to"):
                start({"w": torch.zeros(3)}, self.unasked, save_dir=folder)

    def test_what_torch_or_safetensors_cannot_hold(self, tmp_path: Path) -> None:
        wide = {"w": torch.zeros(3), "spectrum": torch.zeros(3, dtype=torch.complex128)}
        with pytest.raises(
            ConfigError, match=r"save_dir: safetensors cannot hold torch\.complex128"
        ):
            start(wide, self.unasked, save_dir=tmp_path / "personal")
        assert not list((tmp_path / "personal").iterdir())
        grid = InProcessGrid({}, 2, self.unasked, weights_app())
        for foreign in (np.zeros(3, ">f4"), np.zeros(3, "U2")):
            with pytest.raises(ConfigError, match=r"initial_arrays: torch cannot hold them"):
                PFedGPA().start(grid, ArrayRecord([foreign]), 1)

    def test_every_run_has_a_folder(self, tmp_path: Path) -> None:
        first, _ = start({"w": torch.zeros(3)}, save_dir=tmp_path / "new" / "folder")
        before = {p: p.read_bytes() for p in (tmp_path / "new" / "folder").rglob("*.safetensors")}
        assert len(before) == 4 + 1  # the nodes' and the mean
        second, _ = start({"w": torch.ones(3)}, save_dir=tmp_path / "new" / "folder")
        after = {p: p.read_bytes() for p in (tmp_path / "new" / "folder").rglob("*.safetensors")}
        assert len(after) == 2 * (4 + 1)
        assert before.items() <= after.items()
        assert {p.parent for p in before} == {first.folder} != {second.folder}

    @staticmethod
    def unasked(message: Message, reply: Message) -> Message:
        raise AssertionError("a node was asked before the refusal")


def test_what_is_tied_to_a_generated_layer_goes_with_it() -> None:
    tied = torch.tensor([[1.0, -1.0], [0.5, 0.0]])
    initial = {"embed.weight": tied, "mid.weight": torch.randn(2, 2), "head.weight": tied.clone()}
    network = Network(ArrayRecord(initial), "num-examples", "train_loss")
    own = PFedGPASettings(layers=1, fit_steps=5, rank=1)
    config = Config(num_server_rounds=2, num_clients=2, sections=(own,))
    server = Server(config, Server.begin(config, network.generated))
    for number in (1, 2):
        uploads = {}
        for client in range(2):
            moved = server.download(client)["head.weight"] + client + 1
            uploads[client] = Upload(
                initial | {"embed.weight": moved, "head.weight": moved.clone()}, 10
            )
        server.aggregate(number, uploads)
    made = whole_networks(server.personalise(), server, network, {7: 0, 8: 1})
    for record in made.values():
        whole = record.to_torch_state_dict()
        assert torch.equal(whole["embed.weight"], whole["head.weight"])


def test_generated_weights_keep_ties_and_signs() -> None:
    uploads = [
        {"var": torch.tensor([0.5, 0.2]), "a": tied, "b": tied.clone()}
        for tied in (torch.tensor([1.0, -1.0]), torch.tensor([1.0, -2.0]))
    ]
    made = {
        0: {"var": torch.tensor([-0.1, 0.4]), "a": torch.tensor([1.1, -1.5]), "b": torch.zeros(2)}
    }
    like = like_uploads(made, uploads)[0]
    assert like["var"].tolist() == pytest.approx([0.5, 0.4])
    assert torch.equal(like["a"], made[0]["a"])  # signs differ: no bound
    assert torch.equal(like["b"], made[0]["a"])
