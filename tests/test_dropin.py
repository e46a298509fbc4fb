"""``from pfedgpa_app import PFedGPA`` in somebody's Flower app."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from safetensors.torch import load_file

from pfedgpa_app import PFedGPA
from pfedgpa_app.dropin import like_uploads
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.methods.pfedgpa import PFedGPASettings
from pfedgpa_app.settings import ConfigError
from tests.local_grid import InProcessGrid

QUICKSTART = Path(__file__).parent / "quickstart"
QUICK = PFedGPASettings(fit_steps=20, width=16, draws=4)
RUN = {"local-epochs": 1, "batch-size": 32}


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Somebody's app, importable."""
    monkeypatch.syspath_prepend(QUICKSTART)
    from quickstart import client_app, task

    yield client_app.app, task.Net
    for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
        del sys.modules[name]


def weights_app(dtype: torch.dtype = torch.float32) -> ClientApp:
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

    return app


class TestQuickstart:
    def test_every_node_is_sent_weights_of_its_own(self, quickstart: Any, tmp_path: Path) -> None:
        app, net = quickstart
        grid = InProcessGrid(RUN, 6, app=app)
        strategy = PFedGPA(settings=QUICK, save_dir=tmp_path)
        torch.manual_seed(0)
        result = strategy.start(
            grid, ArrayRecord(net().state_dict()), 5, train_config=ConfigRecord({"lr": 0.1})
        )
        assert set(strategy.personal) == set(grid.contexts)
        sent = [m for m in grid.sent if m.metadata.message_type == "train"]
        rates = [m.content.config_records["config"]["lr"] for m in sent]
        assert rates == pytest.approx([0.1] * 24 + [0.01] * 6)
        last = [m for m in grid.sent if m.metadata.message_type == "evaluate"][-6:]
        for message in last:
            node = message.metadata.dst_node_id
            got = message.content.array_records["arrays"].to_torch_state_dict()
            own = strategy.personal[node].to_torch_state_dict()
            saved = load_file(tmp_path / f"node-{node}.safetensors")
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
        accuracies = [m["eval_acc"] for m in result.evaluate_metrics_clientapp.values()]
        assert accuracies[-1] > max(0.5, accuracies[0])

    def test_before_generation_it_is_fedavg(self, quickstart: Any) -> None:
        from flwr.serverapp.strategy import FedAvg

        app, net = quickstart
        torch.manual_seed(0)
        initial = net().state_dict()
        means = []
        for kind in (FedAvg, PFedGPA):
            strategy = kind(fraction_evaluate=0.0)
            config = ConfigRecord({"lr": 0.1})
            grid = InProcessGrid(RUN, 3, app=app)
            strategy.start(grid, ArrayRecord(initial), 2, train_config=config)
            means.append(grid.sent[-1].content.array_records["arrays"].to_torch_state_dict())
        assert list(means[0]) == list(means[1])
        for name, tensor in means[1].items():
            assert tensor.dtype == initial[name].dtype  # FedAvg's counters become float64
            if tensor.is_floating_point():
                assert torch.allclose(means[0][name].float(), tensor, atol=1e-6)

    @pytest.mark.xdist_group("simulation")
    def test_in_flowers_simulation(self, tmp_path: Path) -> None:
        """``flwr run`` on the app as it lies there."""
        federation = "num-supernodes=4 client-resources-num-cpus=1"
        with Simulation() as flower:
            flower.wait_until_ready()
            run_id = flower.run(
                QUICKSTART, {"out": str(tmp_path)}, "--federation-config", federation
            )
            flower.follow(run_id, tmp_path / "log").wait(timeout=1200)
            status, _ = flower.status(run_id)
        log = (tmp_path / "log").read_text(errors="replace")
        assert status.startswith("finished:completed"), log[-3000:]
        assert len(list(tmp_path.glob("node-*.safetensors"))) == 4
        accuracies = json.loads((tmp_path / "accuracies.json").read_text())
        assert set(accuracies) == {"1", "2", "3"}
        assert accuracies["3"] > accuracies["1"]


class TestArrays:
    def start(
        self, arrays: dict[str, torch.Tensor], tamper: Any = None, **how: Any
    ) -> tuple[PFedGPA, Any]:
        strategy = PFedGPA(settings=QUICK, fraction_evaluate=0.0, **how)
        grid = InProcessGrid({}, 4, tamper, weights_app())
        return strategy, strategy.start(grid, ArrayRecord(arrays), 2)

    def test_half_precision_and_scalars(self) -> None:
        arrays = {"w": torch.zeros(3, dtype=torch.float16), "w0": torch.tensor(0.0)}
        strategy, _ = self.start(arrays)
        for record in strategy.personal.values():
            own = record.to_torch_state_dict()
            assert own["w"].dtype == torch.float16
            assert own["w0"].shape == ()
            assert own["w"][0].item() == pytest.approx(own["w0"].item(), abs=1e-2)

    def test_whole_numbers_are_the_largest_clients(self) -> None:
        arrays = {"w": torch.zeros(3), "w counter": torch.tensor(0), "w mask": torch.tensor([1])}
        _, result = self.start(arrays)
        found = result.arrays.to_torch_state_dict()
        assert found["w counter"] == 6  # partition 3 adds 3 in each of two rounds
        assert found["w mask"].dtype == torch.int64

    def test_only_whole_numbers_are_refused(self) -> None:
        with pytest.raises(ConfigError, match="floating-point"):
            self.start({"w": torch.zeros(3, dtype=torch.int64)})

    def test_a_bad_upload_is_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        spoiled: set[int] = set()

        def spoil(message: Message, reply: Message) -> Message:
            node = message.metadata.dst_node_id
            spoiled.add(node) if len(spoiled) < 1 else None
            if node in spoiled:
                array = Array(torch.full((3,), torch.nan).numpy())
                reply.content["model"] = ArrayRecord({"w": array})
            return reply

        strategy, result = self.start({"w": torch.zeros(3)}, spoil)
        assert len(strategy.personal) == 3
        assert not spoiled & set(strategy.personal)
        assert torch.isfinite(result.arrays.to_torch_state_dict()["w"]).all()
        assert "not finite" in caplog.text

    def test_nothing_usable_keeps_the_model(self) -> None:
        def spoil(message: Message, reply: Message) -> Message:
            reply.content["more"] = reply.content["model"]
            return reply

        strategy, result = self.start({"w": torch.zeros(3)}, spoil)
        assert not strategy.personal
        assert not result.train_metrics_clientapp

    def test_weighting_and_metrics_are_fedavgs(self) -> None:
        _, result = self.start({"w": torch.zeros(1)}, weighted_by_key="num-examples")
        # partitions 0..3 with 10(p + 1) examples add p: (0·1 + 1·2 + 2·3 + 3·4)/10 = 2
        assert result.train_metrics_clientapp[1]["loss"] == pytest.approx(2.0)

    def test_descriptors_that_foreign_clients_cannot_give(self) -> None:
        with pytest.raises(ValueError, match="class counts"):
            PFedGPA(settings=PFedGPASettings(descriptor="labels"))


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
