"""`PFedGPA` of other people's Flower apps: nodes that come and go, messages, and what is said."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import LocalDpMod
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedProx
from safetensors import safe_open
from torch import nn

from pfedgpa_app import PFedGPA, PFedGPASettings
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.dropin.nodes import Nodes
from pfedgpa_app.engine.grid import FIRST_NODE, NODE_STEP
from tests.support.local_grid import InProcessGrid
from tests.test_dropin import QUICK, partition_of, start, weights_app

OLD, NEW = FIRST_NODE + NODE_STEP, 5


def round_of(message: Message) -> int:
    number: Any = message.content.config_records["config"]["server-round"]
    return int(number)


def received(message: Message) -> float:
    """The first weight in a message to a node."""
    return float(message.content.array_records["arrays"].to_torch_state_dict()["w"][0])


class Restarting(InProcessGrid):
    """The node of partition 1 goes after round ``after``, and comes again as another node.

    For ``listed`` rounds the old one is still listed as connected, but does not answer.
    """

    def __init__(self, after: int, listed: int = 0) -> None:
        super().__init__({}, 4, self.told, weights_app())
        self.after, self.listed = after, listed

    def told(self, message: Message, reply: Message) -> Message | None:
        node = message.metadata.dst_node_id
        if node == OLD and NEW in self.contexts:
            return None
        partition = int(self.contexts[node].node_config["partition-id"])
        reply.content.metric_records["metrics"]["partition-id"] = partition
        return reply

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies = super().serve(messages, timeout)
        if messages and messages[0].metadata.message_type == "train":
            now = round_of(messages[0])
            if now == self.after:
                self.contexts[NEW] = dataclasses.replace(self.contexts[OLD], node_id=NEW)
            if now >= self.after + self.listed:
                self.contexts.pop(OLD, None)
        return replies


class TestRestart:
    """A SuperNode that restarts has another node id, and is the same client."""

    @pytest.mark.parametrize(("after", "listed"), [(1, 0), (1, 1), (1, 3), (3, 0), (4, 0), (4, 1)])
    def test_it_goes_on_as_the_same_client(
        self, after: int, listed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = dataclasses.replace(QUICK, generate_from=4)
        strategy = PFedGPA(settings=settings, save_dir=tmp_path)
        grid = Restarting(after, listed)
        strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 6)
        assert sorted(strategy.personal) == sorted(strategy.personal_metrics) == [0, 1, 2, 3]
        assert strategy._server.state.buffer.newest().keys() == {0, 1, 2, 3}
        assert strategy.folder is not None
        files = {path.name for path in strategy.folder.iterdir()}
        assert files == {"mean.safetensors", *(f"client-{i}.safetensors" for i in range(4))}
        with safe_open(strategy.folder / "client-1.safetensors", "pt") as file:
            assert file.metadata()["node-id"] == str(NEW)
        assert caplog.text.count(f"partition-id 1 (node {NEW}) replaces node {OLD}") == 1
        assert "generated for 5 nodes" not in caplog.text or listed == 3

    def test_from_then_on_it_is_sent_the_clients_weights(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What it trained from the mean, before it was known, is no upload of that client."""
        settings = dataclasses.replace(QUICK, generate_from=3)
        strategy = PFedGPA(settings=settings, fraction_evaluate=0.0)
        grid = Restarting(4)
        strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 6)
        sent = {(round_of(m), m.metadata.dst_node_id): received(m) for m in grid.sent}
        assert f"round 5, train: partition-id 1 (node {NEW}) did not train from" in caplog.text
        for number in (4, 6):  # the client learns to add 1 in each round, the mean 2
            mine = sent[number, OLD if number == 4 else NEW]
            assert mine < min(sent[number, FIRST_NODE + i * NODE_STEP] for i in (2, 3))
        entries, client = strategy._server.state.buffer.entries(), strategy._left.nodes.clients[NEW]
        assert {e.server_round for e in entries if e.client == client} == {3, 4, 6}


class TestNodes:
    """Whether a node that tells another one's partition is its successor."""

    @staticmethod
    def told(of_nodes: dict[int, int]) -> dict[int, RecordDict]:
        return {
            node: RecordDict({"m": MetricRecord({"partition-id": partition})})
            for node, partition in of_nodes.items()
        }

    def learn(self, nodes: Nodes, of_nodes: dict[int, int], connected: set[int]) -> dict[int, int]:
        grid = InProcessGrid({}, 9)
        grid.contexts = dict(zip(connected, grid.contexts.values(), strict=False))
        return nodes.learn(self.told(of_nodes), "partition-id", grid)

    def test_one_that_was_heard_beside_it_is_not(self, caplog: pytest.LogCaptureFixture) -> None:
        nodes = Nodes()
        assert not self.learn(nodes, {7: 0, 8: 0}, {7, 8})
        assert not self.learn(nodes, {8: 0}, {8})
        assert caplog.text.count("nodes 7, 8 all tell partition-id 0") == 1

    def test_one_that_came_after_its_last_reply_is(self) -> None:
        nodes = Nodes()
        assert not self.learn(nodes, {7: 0}, {7})
        assert not self.learn(nodes, {8: 0}, {7, 8})
        assert self.learn(nodes, {8: 0}, {8}) == {8: 7}
        nodes.replace(7, 8)
        assert self.learn(nodes, {9: 0}, {9}) == {9: 8}

    def test_one_that_restarts_again_while_its_first_id_is_listed_is(self) -> None:
        nodes = Nodes()
        for node, connected in ((7, {7}), (8, {7, 8}), (9, {7, 8, 9})):
            assert not self.learn(nodes, {node: 0}, connected)
            nodes.client(node)
        for node, old in self.learn(nodes, {9: 0}, {9}).items():
            nodes.replace(old, node)
        assert nodes.clients == {9: 0}
        assert nodes.by_name({9: "own"}) == {0: "own"}

    def test_none_of_several_is(self) -> None:
        nodes = Nodes()
        assert not self.learn(nodes, {7: 0, 8: 0}, {7, 8})
        assert not self.learn(nodes, {9: 0}, {9})


class Site(FedAvg):
    """Somebody's FedAvg, which sends more and waits less."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        for message in super().configure_train(server_round, arrays, config, grid):
            message.content["site"] = ConfigRecord({"node": message.metadata.dst_node_id})
            message.metadata.ttl = 77.0
            yield message


class TestMessages:
    def test_keep_what_a_subclass_of_fedavg_put_in(self) -> None:
        class Mine(PFedGPA, Site):
            pass

        grid = InProcessGrid({}, 3, app=weights_app())
        strategy = Mine(settings=QUICK, fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 2)
        assert len(grid.sent) == 6
        for message in grid.sent:
            assert set(message.content) == {"arrays", "config", "site"}
            assert message.metadata.ttl == 77.0
        assert len({received(m) for m in grid.sent[3:]}) == 3  # its own for each node

    def test_beside_fedprox(self) -> None:
        class Mine(PFedGPA, FedProx):
            pass

        grid = InProcessGrid({}, 3, app=weights_app())
        strategy = Mine(settings=QUICK, proximal_mu=0.5, fraction_evaluate=0.0)
        strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 2)
        assert all(m.content.config_records["config"]["proximal-mu"] == 0.5 for m in grid.sent)
        assert len(strategy.personal) == 3


class TestLog:
    def test_who_did_not_answer(self, caplog: pytest.LogCaptureFixture) -> None:
        def silent(message: Message, reply: Message) -> Message | None:
            return None if partition_of(message) == 2 else reply

        start({"w": torch.zeros(1)}, silent, fraction_evaluate=1.0)
        for what in ("train", "evaluate"):
            assert caplog.text.count(f"aggregate_{what}: Received 3 results and 0 failures") == 2
            for number in (1, 2):
                node = FIRST_NODE + 2 * NODE_STEP
                said = f"round {number}, {what}: node {node} did not answer"
                assert caplog.text.count(said) == 1

    def test_who_is_gone(self, caplog: pytest.LogCaptureFixture) -> None:
        """The SuperLink, node 1, replies for nodes that were asked and are gone."""

        def gone(message: Message, reply: Message) -> Message:
            if partition_of(message) > 1:
                error = Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable")
                reply = Message(error, reply_to=message)
                reply.metadata.__dict__["_src_node_id"] = 1
            return reply

        start({"w": torch.zeros(1)}, gone)
        assert caplog.text.count("aggregate_train: Received 2 results and 2 failures") == 2
        for partition in (2, 3):
            node = FIRST_NODE + partition * NODE_STEP
            assert f"round 1, train: node {node} is no longer connected" in caplog.text
        assert "node 1 " not in caplog.text
        assert "did not answer" not in caplog.text

    def test_nodes_that_a_subclass_left_out_were_not_asked(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Fewer(PFedGPA):
            def configure_train(self, *given: Any) -> list[Message]:
                return super().configure_train(*given)[:2]

        strategy = Fewer(settings=QUICK, fraction_evaluate=0.0)
        grid = InProcessGrid({}, 4, app=weights_app())
        strategy.start(grid, ArrayRecord({"w": torch.zeros(1)}), 2)
        assert "did not answer" not in caplog.text

    def test_what_failed(self, caplog: pytest.LogCaptureFixture) -> None:
        app = weights_app()

        def spoil(message: Message, reply: Message) -> Message:
            if message.metadata.message_type == "evaluate" and partition_of(message) == 1:
                reply.content["metrics"] = MetricRecord({})
            return reply

        strategy = PFedGPA(settings=QUICK)
        strategy.start(InProcessGrid({}, 4, spoil, app), ArrayRecord({"w": torch.zeros(1)}), 1)
        assert f"round 1, evaluate: node {OLD} sent num-examples None" in caplog.text

    @pytest.mark.parametrize(
        ("momentum", "share", "words"),
        [
            (None, 0.34, "0.66, by fraction_train = 0.34, or more where 'train_loss' falls slowly"),
            (None, 1.0, "only where 'train_loss' falls slowly"),
            (0.5, 0.34, "0.5, by settings"),
            (0.0, 0.34, "none, by settings"),
        ],
    )
    def test_the_servers_momentum(
        self, momentum: float, share: float, words: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        settings = dataclasses.replace(QUICK, momentum=momentum)
        start({"w": torch.zeros(1)}, settings=settings, fraction_train=share)
        assert f"Server momentum: {words}" in caplog.text
        off = "settings=PFedGPASettings(momentum=0) switches it off"
        assert (off in caplog.text) == (momentum is None)


def test_clients_own_privacy_goes_on_training() -> None:
    """Flower's mods refuse evaluations, which have no ArrayRecord in their replies."""
    app, like = ClientApp(), weights_app()

    @app.train(mods=[LocalDpMod(5.0, 0.05, 50.0, 1e-5)])
    def train(message: Message, context: Context) -> Message:
        reply = like(message, context)
        learned = torch.ones(3) * int(context.node_config["partition-id"]) + 1
        reply.content["model"] = ArrayRecord({"w": learned})
        return reply

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        return like(message, context)

    strategy = PFedGPA(settings=PFedGPASettings(fit_steps=20, width=16, draws=4))
    result = strategy.start(InProcessGrid({}, 4, app=app), ArrayRecord({"w": torch.zeros(3)}), 3)
    assert result.evaluate_metrics_clientapp.keys() == {1, 2, 3}
    assert len(strategy.personal) == 4
    noisy = result.arrays.to_torch_state_dict()["w"]
    assert len(set(noisy.tolist())) == 3  # each number with noise of its own


def test_the_pair_of_apps_in_the_docs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As they stand on the page, beside somebody's ``task.py``."""
    page = (APP_DIR / "docs" / "drop-in.md").read_text(encoding="utf-8")
    server, client, *_ = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    rates: list[float] = []

    def fit(net: nn.Module, data: Any, lr: float) -> float:
        rates.append(lr)
        return 1.0

    task: Any = ModuleType("task")
    task.Net, task.fit = functools.partial(nn.Linear, 2, 2), fit
    task.load, task.accuracy = lambda partition: ([1] * 8, [2] * 4), lambda net, data: 0.5
    monkeypatch.setitem(sys.modules, "myapp", ModuleType("myapp"))
    monkeypatch.setitem(sys.modules, "myapp.task", task)
    quick = server.replace("/srv/personal", str(tmp_path)).replace("rounds=50", "rounds=4")
    of_server: dict[str, Any] = {}
    of_client: dict[str, Any] = {}
    exec(quick, of_server)
    exec(client, of_client)
    of_server["PFedGPA"] = functools.partial(PFedGPA, settings=QUICK)
    of_server["app"](
        InProcessGrid({}, 4, app=of_client["app"]), Context(1, 1, {}, RecordDict(), {})
    )
    assert rates == pytest.approx([0.01] * 6 + [0.001] * 2)
    assert {path.stem for path in tmp_path.glob("run-1/*")} >= {"mean"}
