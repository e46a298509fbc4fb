"""The engines: the same clients, whoever carries their messages."""

from __future__ import annotations

import copy
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from flwr.app import Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

import client_app
from pfedgpa_app.client import request as client
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.randomness import torch_generator
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import ClientData
from pfedgpa_app.data.images import Images
from pfedgpa_app.engine import batched, engine_for, gpu_for
from pfedgpa_app.engine.batched import BatchedCohort, BatchedGrid, Columns, DeviceData
from pfedgpa_app.engine.grid import LocalGrid, telling
from pfedgpa_app.engine.process import ProcessGrid
from pfedgpa_app.methods.base import ClientTask, Trained
from pfedgpa_app.methods.fedavg import FedAvg
from pfedgpa_app.models import networks as models
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.training import evaluation
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe
from tests.support.federations import federate, records, small


def settings(out: Path, **more: Any) -> dict[str, Any]:
    return small({"out-dir": str(out), "run-name": "run"} | more)


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference: one client after another, in this process."""
    return federate(tmp_path_factory.mktemp("in-turn"))[0]


class TestProcessEngine:
    def test_the_same_numbers_to_the_last_digit(self, tmp_path: Path, in_turn: Path) -> None:
        chosen = settings(tmp_path)
        with ProcessGrid(honest, chosen, 4, workers=3) as grid:
            folder = run(grid, resolve(chosen))
        for file in ("metrics.jsonl", "clients.jsonl"):
            assert records(folder, file) == records(in_turn, file)
        # what local-only's clients keep is with the grid, not with the worker that served them
        kept = [context.state.array_records for context in grid.contexts.values()]
        assert all(any(key.startswith("local.") for key in state) for state in kept)

    def test_clients_that_fail_cost_their_own_reply_only(self) -> None:
        with served(obey, workers=2) as ask:
            for _ in range(2):  # the second round has all its workers again
                replies = ask(["fine", "raise", "exit", "kill", "fine", "forget"])
                assert [replies[i].has_error() for i in range(6)] == [
                    False, True, True, True, False, False,
                ]  # fmt: skip
                assert replies[1].error.code == 2
                assert "no idea" in (replies[1].error.reason or "")
                assert replies[2].error.code == replies[3].error.code == 8
                assert "exit status 3" in (replies[2].error.reason or "")
                assert "exit status -9" in (replies[3].error.reason or "")

    def test_it_tells_how_many_have_replied(self) -> None:
        shares: list[float] = []
        with served(obey, workers=1) as ask:
            with telling(ask.grid, shares.append):
                ask(["fine", "raise", "kill", "fine"])
            ask(["fine"])  # nobody listens any more
        assert shares == [0.25, 0.5, 0.75, 1.0]

    def test_a_reply_that_is_none_is_an_error(self) -> None:
        with served(obey, workers=1) as ask:
            reply = ask(["nothing"])[0]
            assert "returned None instead of a Message" in (reply.error.reason or "")

    def test_a_worker_that_died_idle_is_replaced(self) -> None:
        with served(obey, workers=1) as ask:
            pid = ask(["fine"])[0].content.metric_records["m"]["pid"]
            os.kill(int(pid), 9)  # type: ignore[arg-type]
            time.sleep(0.5)
            first, second = ask(["fine", "fine"]).values()
            assert first.error.code == 8
            assert not second.has_error()

    def test_state_survives_failures(self) -> None:
        with served(obey, workers=1) as ask:
            counts = []
            for command in ("fine", "fine", "raise", "kill", "fine"):
                reply = ask([command])[0]
                if not reply.has_error():
                    counts.append(reply.content.metric_records["m"]["visits"])
            assert counts == [1, 2, 3]

    def test_a_late_client_is_not_waited_for_and_does_not_delay_the_next_round(self) -> None:
        with served(obey, workers=2) as ask:
            started = time.monotonic()
            replies = ask(["hang", "fine", "fine", "fine"], timeout=5.0)
            assert sorted(replies) == [1, 2, 3]
            replies = ask(["fine", "fine", "fine", "fine"], timeout=300.0)
            assert sorted(replies) == [0, 1, 2, 3]
            assert time.monotonic() - started < 600  # "hang" takes 1,000 seconds

    def test_workers_are_single_threaded_and_as_many_as_asked(self) -> None:
        with served(obey, workers=3) as ask:
            replies = ask(["fine"] * 12)
            metrics = [replies[i].content.metric_records["m"] for i in range(12)]
            assert {m["threads"] for m in metrics} == {1}
            pids = {m["pid"] for m in metrics}
            assert len(pids) <= 3
            assert os.getpid() not in pids
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(int(pid), 0)  # type: ignore[arg-type]


def honest() -> ClientApp:
    """The app's own."""
    return client_app.app


def obey() -> ClientApp:
    """A ClientApp whose message tells it what to do."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        command = message.content.config_records["config"]["command"]
        if command == "raise":
            raise RuntimeError("no idea")
        if command == "exit":
            raise SystemExit(3)
        if command == "kill":
            os.kill(os.getpid(), 9)
        if command == "nothing":
            return None  # type: ignore[return-value]
        if command == "hang":
            time.sleep(1000)
        before: Any = context.state.metric_records.get("m", {"visits": 0})["visits"]
        visits = before + 1
        context.state["m"] = MetricRecord({"visits": visits})
        record = MetricRecord(
            {"visits": visits, "pid": os.getpid(), "threads": torch.get_num_threads()}
        )
        return Message(RecordDict({"m": record}), reply_to=message)

    return app


class served:
    """``ask(commands)`` has node i obey commands[i]; its replies are by i."""

    def __init__(self, load_app: Callable[[], ClientApp], workers: int) -> None:
        self.grid = ProcessGrid(load_app, {}, 12, workers)

    def __enter__(self) -> Self:
        self.grid.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.grid.__exit__()

    def __call__(self, commands: list[str], timeout: float | None = 60.0) -> dict[int, Message]:
        from flwr.app import ConfigRecord

        messages = [
            Message(
                RecordDict({"config": ConfigRecord({"command": command})}),
                dst_node_id=node,
                message_type=MessageType.TRAIN,
            )
            for node, command in zip(self.grid.get_node_ids(), commands, strict=False)
        ]
        replies = self.grid.send_and_receive(messages, timeout=timeout)
        place = {m.metadata.message_id: i for i, m in enumerate(messages)}
        return {place[r.metadata.reply_to_message_id]: r for r in replies}


def random_clients(shape: tuple[int, int, int], sizes: dict[str, int], n: int) -> list[ClientData]:
    rng = torch.Generator().manual_seed(5)

    def images(size: int) -> Images:
        pixels = torch.randint(0, 256, (size, *shape), generator=rng, dtype=torch.uint8)
        return Images(
            pixels.contiguous(memory_format=torch.channels_last),
            torch.randint(0, 10, (size,), generator=rng),
        )

    return [ClientData(**{part: images(size) for part, size in sizes.items()}) for _ in range(n)]


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]  # there, steps are captured and replayed


class TestBatchedEngine:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("network", ["digits", "fashion", "cifar"])
    def test_agrees_with_one_client_after_another(
        self, network: str, device: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        channels, height, width = next(s for s, n in models.SHAPES.items() if n == network)
        shape = channels, height, width
        # 23 images in batches of 10: the last batch of an epoch is short
        clients = random_clients(shape, {"train": 23, "validation": 0, "test": 17}, 4)
        monkeypatch.setattr(batched, "held_by", lambda config, i: clients[i])
        monkeypatch.setattr(batched, "IMAGES_AT_ONCE", 15)  # evaluation in several parts
        config = resolve({"num-clients": 4, "dataset": "digits"}).config
        model = models.build(network, 10, 0).to(device)
        initial = models.weights_of(model)
        bank = DeviceData.of(config, torch.device(device))
        assert bank is not None
        own: list[Weights] = [
            {},
            {name: tensor * 1.1 for name, tensor in initial.items()},
            {name: tensor * 0.9 for name, tensor in initial.items()},
        ]
        recipe = Recipe(2, 0.05, 10, momentum=0.5, weight_decay=0.01, augment=shape[0] == 3)
        cohort = BatchedCohort(model, bank, 3)
        cohort.seat([0, 2, 3])
        for purpose in (1, 2):  # a second training starts afresh: momentum, weights, sums
            cohort.load(own)
            losses = cohort.train(recipe, [torch_generator(purpose, i) for i in range(3)])
            scores, weights = cohort.evaluate("test"), cohort.trained()
            for i, holder in enumerate((0, 2, 3)):
                alone = models.build(network, 10, 0)
                alone.load_state_dict(own[i] or initial)
                start = models.weights_of(alone)
                data = clients[holder]
                loss = training.train(alone, data.train, recipe, torch_generator(purpose, i))
                assert losses[i] == pytest.approx(loss, rel=1e-4)
                for name, tensor in models.weights_of(alone).items():
                    moved = (tensor - start[name]).abs().max()
                    assert (weights[i][name] - tensor).abs().max() < 0.01 * moved
                expected = evaluation.evaluate(alone, data.test)
                assert scores[i].images == expected.images == 17
                assert abs(scores[i].correct - expected.correct) <= 1
                assert scores[i].loss == pytest.approx(expected.loss, rel=1e-3)
            assert [s.images for s in cohort.evaluate("validation")] == [0, 0, 0]

    def test_one_step_agrees_to_rounding(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clients = random_clients((3, 32, 32), {"train": 8, "validation": 0, "test": 1}, 2)
        monkeypatch.setattr(batched, "held_by", lambda config, i: clients[i])
        model = models.build("cifar", 10, 0)
        bank = DeviceData.of(resolve({"num-clients": 2}).config, torch.device("cpu"))
        assert bank is not None
        cohort = BatchedCohort(model, bank, 2)
        cohort.seat([1, 0])
        cohort.load([{}, {}])
        recipe = Recipe(1, 1.0, 8)
        cohort.train(recipe, [torch_generator(0, i) for i in range(2)])
        for mine, data in zip(cohort.trained(), reversed(clients), strict=True):
            alone = models.build("cifar", 10, 0)
            training.train(alone, data.train, recipe, torch.Generator())
            for name, tensor in models.weights_of(alone).items():
                torch.testing.assert_close(mine[name], tensor, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("padding", [(0, 0), (1, 1), (2, 1)])
    def test_columns_are_torchs_and_so_is_their_gradient(self, padding: tuple[int, int]) -> None:
        x = torch.randn(3, 2, 7, 6, dtype=torch.float64, requires_grad=True)
        columns = Columns.apply(x, (3, 2), padding)
        assert torch.equal(columns, nn.functional.unfold(x, (3, 2), padding=padding))
        assert torch.autograd.gradcheck(lambda t: Columns.apply(t, (3, 2), padding), (x,))

    def test_a_run_comes_to_the_same(self, tmp_path: Path, in_turn: Path) -> None:
        chosen = settings(tmp_path)
        resolved = resolve(chosen)
        grid = BatchedGrid(refusing(), chosen, resolved.config)
        folder = run(grid, resolved)
        for mine, theirs in zip(records(folder), records(in_turn), strict=True):
            for key in ("federation", "round", "client", "participated"):
                assert mine[key] == theirs[key]
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.6)  # 1 of 40
        ours, references = (records(f, "clients.jsonl") for f in (folder, in_turn))
        assert [(r["method"], r["client"]) for r in ours] == [
            (r["method"], r["client"]) for r in references
        ]
        for key in ("before_ft", "after_ft"):
            for mine, theirs in zip(ours, references, strict=True):
                # pFedGPA's fit magnifies the last digits of the uploads
                assert mine[key] == pytest.approx(theirs[key], abs=5.1)

    def test_clients_go_by_their_own_frequencies(self, tmp_path: Path) -> None:
        more: dict[str, Any] = {"method": "fedavg", "num-server-rounds": 2}
        chosen = settings(tmp_path, **more, **{"logit-adjustment": True})
        resolved = resolve(chosen)
        folder = run(BatchedGrid(refusing(), chosen, resolved.config), resolved)
        how = {"method": "fedavg", "num_server_rounds": 2, "logit_adjustment": True}
        reference, _ = federate(tmp_path / "in-turn", **how)
        for mine, theirs in zip(records(folder), records(reference), strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.6)

    def test_partial_participation_and_chunks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen = settings(tmp_path, **{"fraction-train": 0.5, "num-clients": 6, "method": "fedavg"})
        reference, _ = federate(
            tmp_path / "in-turn", fraction_train=0.5, num_clients=6, method="fedavg"
        )
        monkeypatch.setattr(batched, "IMAGES_AT_ONCE", 50)  # two clients of 20 images a step
        resolved = resolve(chosen)
        grid, shares = BatchedGrid(refusing(), chosen, resolved.config), list[float]()
        grid.answered = shares.append
        folder = run(grid, resolved)
        assert shares[1:3] == [2 / 3, 1.0]  # after the one question who they are
        for mine, theirs in zip(records(folder), records(reference), strict=True):
            assert mine["participated"] == theirs["participated"]
            if mine["participated"]:
                assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.6)

    def test_phases_and_personal_parts(self, tmp_path: Path) -> None:
        methods = "local,fedper,fedrep,lg-fedavg,fedbabu,cfl,pfedhn"
        more = {"fraction_train": 0.5, "method": methods, "pfedhn.clip": 0.5}
        more["num_server_rounds"] = 2
        reference, _ = federate(tmp_path / "in-turn", **more)
        chosen = settings(tmp_path, **{"fraction-train": 0.5, "method": methods})
        chosen["pfedhn.clip"] = 0.5  # small enough to matter
        chosen["num-server-rounds"] = 2
        chosen = {k: v for k, v in chosen.items() if not k.startswith("pfedgpa.")}
        resolved = resolve(chosen)
        folder = run(BatchedGrid(refusing(), chosen, resolved.config), resolved)
        for mine, theirs in zip(records(folder), records(reference), strict=True):
            assert mine["federation"] == theirs["federation"]
            if mine["participated"]:
                assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.6)

    def test_what_is_not_plain_sgd_falls_back_and_says_so(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Peculiar(FedAvg):
            title = "peculiar"

            @classmethod
            def train(cls, task: ClientTask) -> Trained:
                return super().train(task)

        monkeypatch.setattr(client, "rounds_class", lambda name: Peculiar)
        assert FedAvg.is_plain_sgd()
        assert not Peculiar.is_plain_sgd()
        chosen = settings(tmp_path, method="fedavg")
        resolved = resolve(chosen)
        folder = run(BatchedGrid(client_app.app, chosen, resolved.config), resolved)
        reference, _ = federate(tmp_path / "in-turn", method="fedavg")
        losses = [[r["train_loss"] for r in records(f)] for f in (folder, reference)]
        assert losses[0] == losses[1]  # trained by the ClientApp: the same to the last digit
        said = "batched engine: peculiar: clients train one at a time: not by plain SGD"
        assert caplog.text.count(said) == 1
        told = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert [text for text in told if said in text] == told  # on the user's screen, too

    @pytest.mark.parametrize("hook", ["start", "upload", "evaluated", "request"])
    def test_a_client_that_fails_costs_its_own_reply_only(
        self, hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def third_fails(hook: Callable[..., Any]) -> Callable[..., Any]:
            calls = itertools.count(1)

            def called(*given: Any) -> Any:
                if next(calls) % 4 == 3:
                    raise ValueError("no idea")
                return hook(*given)

            return called

        chosen = settings(tmp_path, method="fedavg", **{"num-server-rounds": 1})
        resolved = resolve(chosen)
        grid, failed = BatchedGrid(client_app.app, chosen, resolved.config), dict[str, int]()
        serve = grid.serve

        def counted(messages: list[Message], timeout: float | None) -> list[Message]:
            replies = serve(messages, timeout)
            assert len(replies) == len(messages)
            kind = messages[0].metadata.message_type
            failed[kind] = sum(reply.has_error() for reply in replies)
            return replies

        monkeypatch.setattr(grid, "serve", counted)
        if hook == "request":
            monkeypatch.setattr(batched, "ClientRequest", third_fails(client.ClientRequest))
        else:
            monkeypatch.setattr(FedAvg, hook, third_fails(getattr(FedAvg, hook)))
        run(grid, resolved)
        trains, evaluates = hook != "evaluated", hook in ("evaluated", "request")
        assert failed["train"] == trains
        assert failed["evaluate"] == evaluates
        assert failed["evaluate.final"] <= 1

    def test_networks_without_a_batched_form_are_known(self) -> None:
        for name in models.NETWORKS:
            assert batched.can_batch(models.build(name, 10, 0))
        for layer in (nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, stride=2), nn.Flatten(0)):
            assert not batched.can_batch(nn.Sequential(layer))
        assert not batched.can_batch(nn.Linear(2, 2))

    def test_a_layer_that_is_used_twice_is_used_twice(self) -> None:
        act = nn.LeakyReLU(0.5)
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), act, nn.Linear(5, 5), act)
        assert batched.can_batch(model)
        x = torch.randn(2, 3, 1, 2, 2)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(-2)
        every = model, other
        weights = {
            name: torch.stack([dict(each.named_parameters())[name] for each in every])
            for name, _ in model.named_parameters()
        }
        expected = torch.stack([every[i](x[i]) for i in range(2)])
        torch.testing.assert_close(batched.forward(model, weights, x), expected)

    @pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6)])
    @pytest.mark.parametrize("clients", [2, 3])  # as many as images, and more
    def test_examples_of_any_shape(self, shape: tuple[int, ...], clients: int) -> None:
        """A linear layer goes over the last axis, a pooling over the last two."""
        pool = [nn.MaxPool2d(2)] if len(shape) > 1 else []
        chain = [nn.Linear(6, 4), nn.LeakyReLU(), *pool, nn.Linear(4 // (1 + len(pool)), 3)]
        model = nn.Sequential(*chain, nn.Flatten(), nn.LazyLinear(5, bias=False))
        x = torch.randn(clients, 2, *shape)
        model(x[0])
        assert batched.can_batch(model)
        every = [copy.deepcopy(model) for _ in range(clients)]
        for each in every:
            for parameter in each.parameters():
                nn.init.normal_(parameter)
        weights = {
            name: torch.stack([each.state_dict()[name] for each in every])
            for name in model.state_dict()
        }
        expected = torch.stack([each(mine) for each, mine in zip(every, x, strict=True)])
        torch.testing.assert_close(batched.forward(model, weights, x), expected)

    @pytest.mark.parametrize("batch", [4, 20])  # as many images a step as clients, and more
    def test_a_run_on_rows_comes_to_the_same(self, tmp_path: Path, batch: int) -> None:
        (tmp_path / "rows.py").write_text(
            "from torch import nn\ndef build(classes, shape):\n    return nn.Sequential("
            "nn.Linear(shape[-1], 8), nn.ReLU(), nn.Flatten(), nn.Linear(64, classes))\n"
        )
        own = {"model": "rows:build", "code-dir": str(tmp_path), "method": "fedavg"}
        chosen = settings(tmp_path, **own, **{"batch-size": batch, "num-server-rounds": 2})
        resolved = resolve(chosen)
        folder = run(BatchedGrid(refusing(), chosen, resolved.config), resolved)
        how = {name.replace("-", "_"): value for name, value in chosen.items()}
        reference, _ = federate(tmp_path, **how | {"run_name": "in-turn"})
        for mine, theirs in zip(records(folder), records(reference), strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)
            assert mine["test_loss"] == pytest.approx(theirs["test_loss"], rel=1e-3)
            assert mine["accuracy"] == pytest.approx(theirs["accuracy"], abs=2.6)

    def test_what_only_looks_like_a_chain_is_no_chain(self) -> None:
        class Scaled(nn.Sequential):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.mul(super().forward(x), 3)

        class Doubled(nn.Linear):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return 2 * super().forward(x)

        frozen, tied, hooked = (nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(3))
        assert batched.can_batch(tied)
        frozen[0].bias.requires_grad_(False)
        tied[1].weight = tied[0].weight
        hooked[0].register_forward_hook(lambda *_: None)
        scaled = Scaled(nn.Linear(2, 2))
        for model in (scaled, nn.Sequential(scaled), nn.Sequential(Doubled(2, 2))):
            assert not batched.can_batch(model)
        for model in (frozen, tied, hooked):
            assert not batched.can_batch(model)

    def test_unequal_clients_fall_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clients = random_clients((1, 8, 8), {"train": 8, "validation": 2, "test": 3}, 1)
        clients += random_clients((1, 8, 8), {"train": 9, "validation": 2, "test": 3}, 1)
        monkeypatch.setattr(batched, "held_by", lambda config, i: clients[i])
        assert DeviceData.of(resolve({"num-clients": 2}).config, torch.device("cpu")) is None


def refusing() -> ClientApp:
    """Answers who it is, and nothing else: what is asked of it was not batched."""
    app = ClientApp()
    app.query()(client_app.who)
    return app


class TestChoice:
    def test_auto_goes_by_the_hardware(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert engine_for("auto", "auto") == "process"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        assert engine_for("auto", "auto") == engine_for("auto", "cuda") == "batched"
        assert engine_for("auto", "cpu") == "process"
        assert engine_for("ray", "auto") == "ray"

    def test_a_gpu_that_is_not_there_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="torch sees no GPU"):
            gpu_for("cuda")


def test_every_grid_names_its_nodes_unlike_partitions() -> None:
    class Silent(LocalGrid):
        def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
            return []

    grid = Silent({}, 5)
    nodes = list(grid.get_node_ids())
    assert len(set(nodes)) == 5
    assert [grid.contexts[n].node_config["partition-id"] for n in nodes] == list(range(5))
    assert nodes != sorted(nodes)
    assert not set(nodes) & set(range(5))
