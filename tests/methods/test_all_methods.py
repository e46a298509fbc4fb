"""Every method: against its limits, and in federations."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from flwr.app import Message, RecordDict
from safetensors.torch import load_file
from torch import Tensor, nn

from pfedgpa_app.client.cohort import SequentialCohort
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.uploads import Upload, weighted_mean
from pfedgpa_app.core.weights import Weights
from pfedgpa_app.data.client import load_client
from pfedgpa_app.data.images import Images
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.methods.scaffold import CONTROL
from pfedgpa_app.models.networks import build, load, weights_of
from pfedgpa_app.runs.experiment import run
from pfedgpa_app.server.screening import NoUploadsError
from pfedgpa_app.training import evaluation
from pfedgpa_app.training import sgd as training
from pfedgpa_app.training.sgd import Recipe
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    linear,
    near,
    server,
    train,
)
from tests.support.federations import SMALL, federate, records, small, summary, train_messages
from tests.support.local_grid import InProcessGrid

OWN_ROUNDS = [m for m in METHODS if federation_of(m) == m]


def weights(folder: Path, method: str) -> Weights:
    return load_file(folder / "weights" / f"{method}.safetensors")


def same(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def resolve_demo(more: dict[str, Any]) -> Config:
    """The configuration that ``federate`` runs."""
    return resolve(small({key.replace("_", "-"): value for key, value in more.items()})).config


def took_part(folder: Path) -> set[int]:
    return {r["client"] for r in records(folder) if r["participated"]}


def test_bfloat16_is_near_float32() -> None:
    """Eight bits of a number, in forward and backward; the weights have all of theirs."""
    model, other = build("digits", 10, 0), build("digits", 10, 0)
    draws = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 255, (60, 1, 8, 8), dtype=torch.uint8, generator=draws)
    labels = torch.randint(0, 10, (60,), generator=draws)
    data, before = Images(pixels, labels), weights_of(model)
    recipe = Recipe(2, 0.05, 20)
    for network, way in ((model, recipe), (other, replace(recipe, bfloat16=True))):
        training.train(network, data, way, torch.Generator().manual_seed(0))
    exact, rounded = weights_of(model), weights_of(other)
    for name, start in before.items():
        assert rounded[name].dtype == torch.float32
        assert not torch.equal(exact[name], rounded[name])
        apart = (exact[name] - rounded[name]).norm() / (exact[name] - start).norm()
        assert apart < 0.1  # 0.05 at most with this seed; the first layer's is the largest


class TestLimits:
    """Settings at which a method is another one, bit for bit, over a whole federation."""

    @pytest.mark.parametrize(
        ("method", "limit", "more"),
        [
            ("fedprox", {"fedprox.mu": 0.0}, {}),
            ("fedper", {"fedper.head-layers": 0}, {}),
            ("lg-fedavg", {"lg-fedavg.global-layers": 9}, {}),
            ("lg-fedavg", {"lg-fedavg.global-layers": 9, "lg-fedavg.share": "first"}, {}),
            ("cfl", {"cfl.first-round": 99}, {}),
            ("ditto", {}, {}),  # its global model
            ("scaffold", {}, {"num_clients": 1}),
            ("per-fedavg", {"per-fedavg.alpha": 0.0}, {"batch_size": 60, "local_epochs": 1}),
            (
                "pfedme",
                {
                    "pfedme.steps": 1,
                    "pfedme.lam": 8.0,
                    "pfedme.learning-rate": 0.125,
                    "pfedme.personal-learning-rate": 0.05,
                },
                {"momentum": 0.0, "learning_rate": 0.05},
            ),
        ],
    )
    def test_fedavg(
        self, tmp_path: Path, method: str, limit: dict[str, Any], more: dict[str, Any]
    ) -> None:
        folder, _ = federate(tmp_path, method=f"fedavg,{method}", **limit, **more)
        ours, theirs = weights(folder, method), weights(folder, "fedavg")
        if method == "cfl":  # saves a client's cluster's weights for every client
            ours = {n.replace("client-0", "global"): t for n, t in ours.items() if "client-0" in n}
        tolerance = 1e-6 if method in ("scaffold", "cfl") else 0
        assert ours.keys() == theirs.keys()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], atol=tolerance, rtol=0)

    @pytest.mark.parametrize(
        ("method", "limit"),
        [
            ("ditto", {"ditto.lam": 0.0}),
            ("fedper", {"fedper.head-layers": 9, "fraction_train": 0.5}),
        ],
    )
    def test_local_only(self, tmp_path: Path, method: str, limit: dict[str, Any]) -> None:
        folder, _ = federate(tmp_path, method=f"local,{method}", **limit)
        told = {
            m: [
                (r["round"], r["client"], r.get("accuracy"), r.get("test_loss"))
                for r in records(folder)
                if r["federation"] == m
            ]
            for m in ("local", method)
        }
        assert told["local"] == told[method]
        assert told["local"]

    def test_fedala_without_learning_is_fedavg(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="fedavg,fedala", **{"fedala.eta": 0.0})
        assert same(weights(folder, "fedala"), weights(folder, "fedavg"))

    def test_fedrep_without_head_epochs_is_fedbabu(self, tmp_path: Path) -> None:
        limit = {"fedrep.head-epochs": 0, "fedrep.body-epochs": 2}
        folder, _ = federate(tmp_path, method="fedbabu,fedrep", **limit)
        assert same(weights(folder, "fedrep"), weights(folder, "fedbabu"))

    @by_hand
    def test_ditto_holds_on_to_the_global_model(self) -> None:
        # with η·λ = 1 a step leads to w − η∇F(v), wherever v was
        own, sent = {"1.weight": column(7, 3)}, {"1.weight": column(1, -1)}
        more: dict[str, Any] = {
            "ditto.lam": 1000.0,
            "ditto.learning-rate": 0.001,
            "local_epochs": 3,
        }
        _, kept, _ = train("ditto", linear(), sent, own, **more)
        assert (kept["1.weight"] - sent["1.weight"]).abs().max() < 0.001

    def test_pfedme_with_beta_zero_stays(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="pfedme", **{"pfedme.beta": 0.0})
        start = build("digits", 10, 0).state_dict()
        for name, tensor in weights(folder, "pfedme").items():
            assert torch.equal(tensor, start[name.removeprefix("global/")])


class TestServers:
    @pytest.mark.parametrize("examples", [1e308, 1e-320, 10**300])
    def test_no_count_overflows_the_mean(self, examples: float) -> None:
        one, other = Upload({"w": column(1.0)}, examples), Upload({"w": column(3.0)}, examples)
        assert near(weighted_mean({0: one, 1: other})["w"], 2.0)
        mask = {"w": column(-torch.inf)}
        rare = {0: Upload(mask, examples), 1: Upload(mask, 1.0), 2: Upload(mask, 1e-320)}
        assert weighted_mean(rare)["w"].item() == -torch.inf

    @pytest.mark.parametrize(
        ("name", "mean"),
        # uploads 0 and 4 of clients with 1 and 3 images: (1·0 + 3·4)/4 = 3, or (0 + 4)/2
        [
            *((name, 3.0) for name in ("fedavg", "fedprox", "fedper", "lg-fedavg", "fedbabu")),
            *((name, 3.0) for name in ("ditto", "fedala", "cfl")),
            *((name, 2.0) for name in ("fedrep", "scaffold", "pfedme", "per-fedavg")),
        ],
    )
    def test_clients_weigh_as_the_paper_says(self, name: str, mean: float) -> None:
        method = server(name)
        like = method.expected_upload()
        uploads = {i: {n: torch.full_like(t, 4.0 * i) for n, t in like.items()} for i in (0, 1)}
        method.aggregate(1, {0: Upload(uploads[0], 1), 1: Upload(uploads[1], 3)})
        for tensor in method.evaluation_download(0).values():
            assert near(tensor, *[mean] * tensor.numel())

    @pytest.mark.parametrize("name", OWN_ROUNDS)
    def test_the_initial_weights_are_left_alone(self, name: str) -> None:
        """The next method of a run starts from them, too."""
        more = {"krum.malicious": 0} if name == "krum" else {}  # of so few
        config, kind = configured(method=name, num_clients=3, **more), cast(Any, METHODS[name])
        initial = weights_of(build("digits", 10, 0))
        before = {n: t.clone() for n, t in initial.items()}
        method = kind(config, kind.begin(config, initial))
        for number in (1, 2):
            like = method.expected_upload()
            uploads = {i: {n: torch.full_like(t, 1.0 + i) for n, t in like.items()} for i in (0, 1)}
            method.aggregate(number, {i: Upload(upload, 1) for i, upload in uploads.items()})
        assert same(initial, before)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Every method with rounds of its own, three of four clients a round."""
    return federate(
        tmp_path_factory.mktemp("everything"),
        method=",".join(OWN_ROUNDS),
        num_server_rounds=6,
        fraction_train=0.75,
        learning_rate=0.05,
        **{"krum.malicious": 0},  # of three uploads
        **{"cfl.first-round": 2, "cfl.eps1": 100.0, "cfl.eps2": 0.0, "pfedgpa.round-rate": 1.0},
    )


def test_training_never_sees_test_or_validation_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, really = [], training.training_batches

    def spied(model: nn.Module, data: Images, *rest: Any) -> Iterator[tuple[Tensor, Tensor]]:
        seen.append(data)
        return really(model, data, *rest)

    for name in ("training.sgd", "methods.pfedme", "methods.per_fedavg", "methods.fedala"):
        monkeypatch.setattr(f"pfedgpa_app.{name}.training_batches", spied)
    methods = "fedavg-ft,fedrep,fedbabu,per-fedavg,pfedme,fedala,ditto,fedfomo"
    federate(tmp_path, method=methods, num_server_rounds=2)
    clients = [load_client(resolve_demo({}), client) for client in range(4)]
    held = [{bytes(image.numpy().data) for image in client.train.pixels} for client in clients]
    assert len(seen) > 100
    for data in seen:
        images = {bytes(image.contiguous().numpy().data) for image in data.pixels}
        assert any(images <= own for own in held)


@pytest.mark.xdist_group("everything")  # which is built once
class TestFederations:
    def test_all_learn_under_partial_participation(self, everything: tuple[Path, Any]) -> None:
        folder, _ = everything
        rows = summary(folder)
        assert list(rows) == OWN_ROUNDS
        for name, row in rows.items():
            # pFedHN has hardly begun, Krum has one upload a round
            least = {"pfedhn": 5, "krum": 20}.get(name, 30)
            assert row["accuracy_as_its_paper"] > least, name
        warnings = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert not [text for text in warnings if re.search(r": client \d+ ", text)]

    def test_what_travels(self, everything: tuple[Path, Any]) -> None:
        _, grid = everything
        every = set(build("digits", 10, 0).state_dict())
        head = {"fc2.weight", "fc2.bias"}

        def sent(method: str) -> set[str]:
            message = train_messages(grid, method)[-1]
            return set(message.content.array_records["arrays"])

        assert sent("local") == set()
        for method in ("fedper", "fedrep", "fedbabu"):
            assert sent(method) == every - head
        assert sent("lg-fedavg") == head
        for method in ("fedavg", "fedprox", "ditto", "pfedme", "per-fedavg", "fedala", "cfl"):
            assert sent(method) == every
        assert sent("pfedhn") == every
        assert sent("scaffold") == every | {CONTROL + name for name in every} | {"counted"}
        assert sent("fedproto") == {"means", "counts"}

    def test_what_clients_keep(self, everything: tuple[Path, Any]) -> None:
        _, grid = everything
        kept: dict[str, set[str]] = {}
        for context in grid.contexts.values():
            for key, record in context.state.array_records.items():
                kept.setdefault(key.partition(".")[0], set()).update(record)
        every = set(build("digits", 10, 0).state_dict())
        head = {"fc2.weight", "fc2.bias"}
        assert kept == {
            "local": every,
            "scaffold": {kind + name for kind in (CONTROL, "before/") for name in every} | {"sent"},
            "fedper": head,
            "fedrep": head,
            "lg-fedavg": every - head,
            "fedala": head | {f"share/{name}" for name in head},
            "fedproto": every,
            "ditto": every,
            "pfedme": every,
            "fedfomo": every,
        }

    def test_a_client_without_personal_parts_has_the_initial_ones(self, tmp_path: Path) -> None:
        one = {"fraction_train": 0.25, "num_server_rounds": 1}
        folder, _ = federate(tmp_path, method="fedavg,ditto,fedper,local", **one)
        rows = records(folder, "clients.jsonl")
        [seen] = took_part(folder)
        told = {(r["method"], r["client"]): r["before_ft"] for r in rows}
        for client in set(range(4)) - {seen}:
            # Ditto's has the global weights, which after one round of one client are FedAvg's
            assert told["ditto", client] == told["fedavg", client]
        # FedPer's has the global body under the head that all start with
        body = weights(folder, "fedper")
        body = {name.removeprefix("global/"): tensor for name, tensor in body.items()}
        model, data = build("digits", 10, 0), load_client(resolve_demo(one), 0 if seen else 1)
        load(model, body)
        score = evaluation.evaluate(model, data.test)
        assert told["fedper", 0 if seen else 1] == pytest.approx(100 * score.correct / score.images)

    def test_fine_tuning_is_each_papers_own(self) -> None:
        config = configured(method="fedrep,fedbabu,per-fedavg,fedavg-ft")
        own = {m: METHODS[m].own_fine_tuning(config) for m in config.method}
        told = {m: (w.epochs, w.learning_rate, w.part, w.full_batch) for m, w in own.items() if w}
        assert told == {
            "fedrep": (10, 1.0, "head", False),
            "fedbabu": (5, 0.001, "all", False),
            "per-fedavg": (1, 1.0, "all", True),
            "fedavg-ft": (1, 1.0, "all", False),
        }

    def test_per_fedavg_adapts_by_the_images_that_it_has(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One step against the gradient of the loss on all of them: no decay, no crops."""
        seen: list[Recipe] = []

        def spy(cohort: Any, recipe: Recipe, generators: Any, original: Any) -> Any:
            seen.append(recipe)
            return original(cohort, recipe, generators)

        original = SequentialCohort.train
        monkeypatch.setattr(SequentialCohort, "train", partialmethod(spy, original=original))
        how = {"weight_decay": 0.01, "augment": True, "fine_tune_epochs": 0}
        federate(tmp_path, method="per-fedavg", num_server_rounds=1, **how)
        [step] = {recipe for recipe in seen if recipe.batch_size == 48}  # 60, 12 put aside
        assert (step.weight_decay, step.augment, step.epochs) == (0.0, False, 1)


class Forgetful(InProcessGrid):
    """Nodes whose contexts are empty at every message, as after a SuperNode's restart."""

    def serve(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies = []
        for message in messages:
            replies += super().serve([message], timeout)
            self.contexts[message.metadata.dst_node_id].state = RecordDict()
        return replies


class TestMemory:
    METHODS = "local,scaffold,fedper,fedala,ditto,fedfomo"

    def _run(self, out: Path, state_dir: Path | None) -> list[dict[str, Any]]:
        settings = {k: v for k, v in SMALL.items() if not k.startswith("pfedgpa.")}
        settings |= {"method": self.METHODS, "out-dir": str(out), "run-name": "run"}
        settings["num-server-rounds"] = 2
        settings["checkpoint-every"] = 0  # with checkpoints a simulation keeps it by itself
        grid = Forgetful(settings, 2)  # which host two clients each
        for context in grid.contexts.values():
            context.node_config["state-dir"] = str(state_dir or "")
        return records(run(grid, resolve(settings)), "clients.jsonl")

    def test_a_node_that_starts_again_goes_on_where_it_was(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path / "reference", method=self.METHODS, num_server_rounds=2)
        reference = records(folder, "clients.jsonl")
        assert self._run(tmp_path / "kept", tmp_path / "state") == reference
        with pytest.raises(NoUploadsError, match="no client could evaluate its weights"):
            self._run(tmp_path / "lost", None)
        kept = {path.name for path in (tmp_path / "state").glob("run-*/*")}
        assert kept == {
            f"{m}.{c}@{r}.safetensors"
            for m in self.METHODS.split(",")
            for c in range(4)
            for r in (1, 2)
        }
