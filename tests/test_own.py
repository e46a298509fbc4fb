"""Networks, data, partitions and methods of the user's own, and what a run leaves of them."""

from __future__ import annotations

import csv
import functools
import json
import os
import random
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from flwr.app import Message
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import Subset, TensorDataset
from torchvision.datasets import ImageFolder

from pfedgpa_app import cli, load_client
from pfedgpa_app.cli.options import parse_overrides
from pfedgpa_app.config.names import method_named
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.paths import APP_DIR
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import Config, TrainingSettings
from pfedgpa_app.core.settings import ConfigError, DataError
from pfedgpa_app.core.weights import body, last_layers
from pfedgpa_app.data.arrays import dataset_of
from pfedgpa_app.data.client import (
    check_same,
    data_in_words,
    fingerprint,
    forget,
    load_dataset,
    load_own,
    load_partition,
    schema_of,
    users_of_clients,
)
from pfedgpa_app.data.dataset import remarks
from pfedgpa_app.data.datasets import load
from pfedgpa_app.data.partition import by_users
from pfedgpa_app.engine.ray import Simulation
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.models import build
from pfedgpa_app.models.build import network_of, remarks_on_weights
from pfedgpa_app.models.layout import laid_out
from pfedgpa_app.models.networks import head_of, weight_names, weights_of
from pfedgpa_app.runs import api, experiment, report
from pfedgpa_app.runs.api import Result
from pfedgpa_app.runs.checkpoint import Checkpoint
from pfedgpa_app.runs.folder import client_called, locked
from pfedgpa_app.runs.inspection import lines_about
from pfedgpa_app.runs.personal import client_weights
from pfedgpa_app.runs.prediction import evaluate, export
from pfedgpa_app.server.screening import NoUploadsError
from pfedgpa_app.study.compare import plan
from tests.support.federations import federate, known_for_a_while, records, results, summary
from tests.support.processes import in_a_new_process

NETS = '''
import random

from collections import OrderedDict

import numpy as np
import torch
from torch import nn

def small(classes, shape):
    """Declared from the head down, with BatchNorm, something frozen, a counter and tied weights."""
    return Small(classes, shape[0])

class Small(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.head = nn.Linear(16, classes)
        self.mix = nn.Linear(16, 16, bias=False)
        self.again = nn.Linear(16, 16, bias=False)
        self.again.weight = self.mix.weight
        self.norm = nn.BatchNorm2d(4)
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.frozen = nn.Linear(64, 16).requires_grad_(False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 4)
        x = self.mix(self.frozen(x.flatten(1)).relu())
        return self.head(self.again(x.relu()))

def viewed(classes, shape):
    """As many tutorials have it: what a convolution returns is flattened by view."""
    return Viewed(classes, shape[0])

def normed_before(classes, shape):
    """Its BatchNorm is frozen."""
    norm = nn.BatchNorm2d(shape[0]).requires_grad_(False)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(64, classes))

class Viewed(nn.Module):
    def __init__(self, classes, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        return self.head(x.view(x.size(0), -1))

class Counted(nn.Module):
    """It asks how many examples there are."""

    def __init__(self, classes, shape):
        super().__init__()
        self.head = nn.Linear(64, classes)

    def forward(self, x):
        return self.head(x.flatten(1)[torch.arange(len(x), device=x.device)])

class Strided(nn.Module):
    """Nothing of it is contiguous: a trained matrix, a frozen one, buffers that share memory."""

    def __init__(self, classes, shape):
        super().__init__()
        self.frozen = nn.Parameter(torch.randn(32, 64).t() * 0.1, requires_grad=False)
        both = torch.ones(32, 2)
        self.register_buffer("scale", both[:, 0])
        self.register_buffer("shift", both[:, 1])
        self.w = nn.Parameter(torch.randn(classes, 32).t() * 0.1)

    def forward(self, x):
        return (self.scale * (x.flatten(1) @ self.frozen) + self.shift).relu() @ self.w

def adapted(classes, shape):
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU()).requires_grad_(False)
    return nn.Sequential(body, nn.Linear(32, 2, bias=False), nn.Linear(2, classes))

def two_above(classes, shape):
    """Its classifier has two layers."""
    above = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, classes))
    return nn.Sequential(OrderedDict(flat=nn.Flatten(), body=nn.Linear(64, 16), classifier=above))

def weight_normed(classes, shape):
    head = nn.utils.parametrizations.weight_norm(nn.Linear(16, classes))
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), head)

def tied_head(classes, shape):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(64, classes), nn.Linear(classes, 64)
            self.head = nn.Linear(64, classes)
            self.head.weight = self.up.weight

        def forward(self, x):
            return self.head(self.down(self.up(x.flatten(1)).relu()).relu())
    return Tied()

def frozen_above(classes, shape):
    """As many features as classes."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.ReLU())
    return nn.Sequential(body, nn.Linear(classes, classes).requires_grad_(False))

class OfType(nn.Sequential):
    """Its numbers are of another type, and one of them is alone."""

    def __init__(self, classes, dtype):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, classes))
        self[2].scale = nn.Parameter(torch.tensor(1.5))
        self.to(dtype)

    def forward(self, x):
        return self[3](self[1](x.flatten(1).to(self[1].weight.dtype)).relu() * self[2].scale)

def single(classes, shape):
    return OfType(classes, torch.float32)

def double(classes, shape):
    return OfType(classes, torch.float64)

def half(classes, shape):
    return OfType(classes, torch.float16)

def brain(classes, shape):
    return OfType(classes, torch.bfloat16)

def brainy_below(classes, shape):
    """Of another type in what is not sent."""
    class Below(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 16).to(torch.bfloat16).requires_grad_(False)
            self.head = nn.Linear(16, classes)

        def forward(self, x):
            return self.head(self.body(x.flatten(1).bfloat16()).float().relu())
    return Below()

def branching(classes, shape):
    """A frozen branch is used last, and makes nothing of the output."""
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(64, classes)
            self.side = nn.Linear(64, 1).requires_grad_(False)

        def forward(self, x):
            logits = self.head(x.flatten(1))
            self.seen = self.side(x.flatten(1))
            return logits
    return Branching()

def frozen_below(classes, shape):
    """A body that is used as it is, but for what its BatchNorm sees."""
    body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
    return nn.Sequential(body.requires_grad_(False), nn.Linear(16, classes))

def one_layer(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def dropping(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, classes))

def cumulative(classes, shape):
    """What it has seen weighs as much as the batches that it counts, which are not shared."""
    norm = nn.BatchNorm1d(16, momentum=None)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.ReLU(), nn.Linear(16, classes))

class Caching(nn.Module):
    """It fills a buffer when it is used first, reassigns one, and has one that is not saved."""

    def __init__(self, classes, shape):
        super().__init__()
        self.head = nn.Linear(64, classes)
        self.register_buffer("cache", None)
        self.register_buffer("seen", torch.full((1,), float("nan")).expand(3))
        self.register_buffer("places", torch.eye(64).to_sparse(), persistent=False)

    def forward(self, x):
        self.cache, self.seen = torch.ones(64), torch.zeros(2)
        return self.head(x.flatten(1) * self.cache)

class Lending(nn.Module):
    """Its head is never called, but lends its weights; a layer comes early and late."""

    def __init__(self, classes, shape):
        super().__init__()
        self.head = nn.Linear(16, classes)
        self.body = nn.Linear(64, 16)
        self.again = nn.Linear(16, 16)
        self.between = nn.Linear(16, 16)

    def forward(self, x):
        x = self.again(self.body(x.flatten(1)).relu())
        x = self.again(self.between(x).relu())
        return nn.functional.linear(x, self.head.weight, self.head.bias)

class Bare(nn.Module):
    """Its classifier is parameters without a layer."""

    def __init__(self, classes, shape):
        super().__init__()
        self.w = nn.Parameter(torch.randn(16, classes) * 0.1)
        self.body = nn.Linear(64, 16)

    def forward(self, x):
        return self.body(x.flatten(1)).relu() @ self.w

def drawn(classes, shape):
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    made[1].weight.data = torch.tensor(np.random.randn(classes, 64)).float()
    made[1].bias.data = torch.tensor([random.random() for _ in range(classes)])
    return made

def loose(classes, shape):
    made = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))
    made.register_buffer("scale", torch.tensor(np.random.default_rng().normal(size=64)))
    return made

def lazy(classes, shape):
    body = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten())
    return nn.Sequential(body, nn.LazyLinear(classes))

def too_few(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))

def mixing(classes, shape):
    """A table's rows taken for the steps of one sequence."""
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.LSTM(64, 16)
            self.head = nn.Linear(16, classes)

        def forward(self, x):
            return self.head(self.body(x.flatten(1))[0])
    return Recurrent()

def by_batch(classes, shape):
    norm = nn.BatchNorm1d(16, track_running_stats=False)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.ReLU(), nn.Linear(16, classes))

def squeezed(classes, shape):
    class Squeezed(nn.Sequential):
        def forward(self, x):
            return super().forward(x).squeeze()
    return Squeezed(nn.Flatten(), nn.Linear(64, classes))

def probable(classes, shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes), nn.Softmax(dim=1))

def no_module(classes, shape):
    return "a network"

def raises(classes, shape):
    raise ValueError("not today")

def of_one(classes):
    return nn.Linear(1, 1)

def idle(classes, shape):
    net = small(classes, shape)
    net.left_over = nn.Linear(2, 2)
    return net

def two_outputs(classes, shape):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, classes)
        def forward(self, x):
            return self.body(x.flatten(1)), 0
    return Two()

NUMBER = 3
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with networks of the user's own, which is the current one."""
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets", raising=False)
    return tmp_path


DIGITS = Schema("digits", tuple("0123456789"), (1, 8, 8))


def made(model: str, schema: Schema = DIGITS, **more: Any) -> nn.Module:
    return network_of(TrainingSettings(model=model, **more), schema)


class TestNetworks:
    def test_weights_lie_in_the_order_of_their_use(self, nets: Path) -> None:
        names = weight_names(made("nets:small"))
        layers = list(dict.fromkeys(name.partition(".")[0] for name in names))
        assert layers == ["conv", "norm", "mix", "head"]  # frozen ones not, tied ones once
        assert {"norm.running_mean", "norm.running_var"} <= set(names)
        assert "norm.num_batches_tracked" not in names

    def test_another_head_is_named(self, nets: Path) -> None:
        assert weight_names(made("nets:small", head="mix"))[-1] == "mix.weight"
        with pytest.raises(ConfigError, match="'haed': the network has no such module; did you"):
            made("nets:small", head="haed")
        with pytest.raises(ConfigError, match="head = 'frozen': nothing of that module is trained"):
            made("nets:small", head="frozen")

    def test_a_head_is_one_layer(self, nets: Path) -> None:
        with pytest.raises(ConfigError, match=r"has 2: classifier\.0, classifier\.2; name one"):
            made("nets:two_above", head="classifier")
        assert weight_names(made("nets:two_above", head="classifier.2"))[-1] == "classifier.2.bias"
        every = weight_names(made("nets:weight_normed"))
        assert len(last_layers(every, 1)) == 3  # its bias, and both that make its matrix
        assert body(every) == ["1.weight", "1.bias"]
        assert isinstance(head_of(made("nets:weight_normed")), nn.Linear)

    def test_phases_that_have_nothing_to_train(self, nets: Path) -> None:
        """Frozen below the head, or nothing there: FedRep trains the head, FedBABU is refused."""
        how: dict[str, Any] = {"num_server_rounds": 2, "learning_rate": 0.1}
        folder, _ = federate(nets / "below", method="fedrep", model="nets:frozen_below", **how)
        assert summary(folder)["fedrep"]["accuracy_before_ft"] > 40
        still = how | {"fedrep.head-epochs": 0, "fedrep.body-epochs": 5, "evaluate_every": 1}
        folder, _ = federate(nets / "still", method="fedrep", model="nets:one_layer", **still)
        assert len({r["accuracy"] for r in records(folder) if r["client"] == 0}) == 1
        for model in ("frozen_below", "one_layer"):
            with pytest.raises(ConfigError, match="fedbabu: trains the layers below"):
                federate(nets / model, method="fedbabu", model=f"nets:{model}", **how)

    def test_the_same_seed_makes_the_same_network(self, nets: Path) -> None:
        first, second = (weights_of(made("nets:small", seed=3)) for _ in range(2))
        assert all(torch.equal(first[name], second[name]) for name in first)
        other = weights_of(made("nets:small", seed=4))
        assert not torch.equal(first["conv.weight"], other["conv.weight"])

    def test_what_it_draws_by_numpy_is_by_the_seed_too(self, nets: Path) -> None:
        networks = []
        for seed in (3, 3, 4):
            build._template.cache_clear()  # as another process
            networks.append(weights_of(made("nets:drawn", seed=seed)))
        first, again, other = networks
        for name, tensor in first.items():
            assert torch.equal(tensor, again[name])
            assert not torch.equal(tensor, other[name])

    def test_lazy_layers_learn_their_sizes(self, nets: Path) -> None:
        first = weights_of(made("nets:lazy", seed=3))
        build._template.cache_clear()
        again = weights_of(made("nets:lazy", seed=3))
        assert first["1.weight"].shape == (10, 144)
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
        assert summary(federate(nets, method="pfedgpa", model="nets:lazy")[0])

    def test_dropout_is_by_the_seed_whatever_the_process_has_drawn(self, nets: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg,fedrep", "model": "nets:dropping", "seed": 1}
        runs: list[Any] = []
        for out in ("one", "two"):
            torch.rand(len(out) + len(runs))
            runs.append(results(federate(nets / out, num_server_rounds=2, **how)[0]))
        assert runs[0] == runs[1]

    @pytest.mark.parametrize("model", ["nets:dropping", "nets:cumulative", "nets:Caching"])
    def test_fine_tuning_is_the_same_whatever_else_is_tried(self, nets: Path, model: str) -> None:
        how: dict[str, Any] = {"method": "fedavg", "model": model, "num_server_rounds": 1}
        found = []
        for epochs in (0, 3):
            folder, _ = federate(nets / str(epochs), fine_tune_epochs=epochs, **how)
            row = summary(folder)["fedavg"]
            found.append({key: value for key, value in row.items() if "as_in_training" in key})
        assert found[0]
        assert found[0] == found[1]

    def test_normalising_by_the_batch_is_ones_own_choice(self, nets: Path) -> None:
        assert len(weights_of(made("nets:by_batch"))) == 6

    def test_torchvisions_by_name(self) -> None:
        schema = Schema("pets", ("cat", "dog", "owl"), (3, 32, 32))
        names = weight_names(made("torchvision:resnet18", schema))
        assert names[:2] == ["conv1.weight", "bn1.weight"]
        assert names[-2:] == ["fc.weight", "fc.bias"]

    @pytest.mark.parametrize(
        "shape", [(1, 1, 1), (1, 5, 7), (3, 64, 48), (4, 30, 30), (2, 224, 224)]
    )
    def test_images_of_any_size_have_a_network(self, shape: tuple[int, ...]) -> None:
        network = made("auto", Schema("images", ("a", "b"), shape))
        assert network(torch.zeros(3, *shape)).shape == (3, 2)

    def test_so_have_tables(self) -> None:
        network = made("auto", Schema("table", ("a", "b"), (7,)))
        assert network(torch.zeros(3, 7)).shape == (3, 2)

    @pytest.mark.parametrize(
        ("network", "order"),
        [("Lending", ["body", "between", "again", "head"]), ("Bare", ["body", ""])],
    )
    def test_so_is_one_that_only_lends_its_weights(
        self, nets: Path, network: str, order: list[str]
    ) -> None:
        names = weight_names(made(f"nets:{network}"))
        assert list(dict.fromkeys(name.rpartition(".")[0] for name in names)) == order

    def test_the_last_layer_is_the_last_that_is_used(self, tmp_path: Path) -> None:
        (tmp_path / "headfirst.py").write_text(
            "from torch import nn\n\n"
            "class Net(nn.Module):\n"
            "    def __init__(self, classes, shape):\n"
            "        super().__init__()\n"
            "        self.head, self.body = nn.Linear(4, classes), nn.Linear(7, 4)\n\n"
            "    def forward(self, x):\n"
            "        return self.head(self.body(x).relu())\n"
        )
        how: dict[str, Any] = {"code_dir": str(tmp_path)}
        five, two = (Schema("table", tuple("abcde"[:n]), (7,)) for n in (5, 2))
        theirs = made("headfirst:Net", five, **how).state_dict()
        torch.save(theirs, tmp_path / "w.pt")
        mine = made("headfirst:Net", two, model_weights=str(tmp_path / "w.pt"), seed=9, **how)
        assert torch.equal(mine.state_dict()["body.weight"], theirs["body.weight"])
        torch.save({n: t for n, t in theirs.items() if "head" in n}, tmp_path / "w.pt")
        with pytest.raises(ConfigError, match=r"another network: has no body\.weight"):
            made("headfirst:Net", five, model_weights=str(tmp_path / "w.pt"), seed=8, **how)

    def test_a_head_that_is_weight_normed_stays_new_for_other_classes(
        self, nets: Path, tmp_path: Path
    ) -> None:
        theirs = made("nets:weight_normed").state_dict()
        torch.save(theirs, tmp_path / "w.pt")
        two = Schema("other", ("a", "b"), (1, 8, 8))
        mine = made("nets:weight_normed", two, model_weights=str(tmp_path / "w.pt"), seed=9)
        assert torch.equal(mine.state_dict()["1.weight"], theirs["1.weight"])
        assert head_of(mine).out_features == 2

    def test_a_last_layer_is_loaded_whole_or_not_at_all(self, tmp_path: Path) -> None:
        theirs, fresh = made("digits", seed=9).state_dict(), made("digits").state_dict()
        half = {n: t for n, t in theirs.items() if n != "fc2.bias"}
        torch.save(half | {"another.weight": torch.zeros(1)}, tmp_path / "half.pt")
        config = resolve({"model": "digits", "model-weights": str(tmp_path / "half.pt")}).config
        mine = made("digits", model_weights=str(tmp_path / "half.pt"))
        assert torch.equal(mine.state_dict()["fc1.weight"], theirs["fc1.weight"])
        assert torch.equal(mine.state_dict()["fc2.weight"], fresh["fc2.weight"])
        said = list(remarks_on_weights(config, DIGITS))
        assert "the network has no another.weight: is the file of another one?" in said[0]
        assert "has no fc2.bias, fc2.weight of this shape: the last layer begins anew" in said[1]
        torch.save(theirs | {"fc1.bias": theirs["fc1.bias"] / 0}, tmp_path / "odd.pt")
        with pytest.raises(ConfigError, match=r"fc1\.bias has numbers that are not finite"):
            made("digits", model_weights=str(tmp_path / "odd.pt"))

    @pytest.mark.parametrize("suffix", ["safetensors", "pt"])
    def test_weights_on_disk(self, tmp_path: Path, suffix: str) -> None:
        from safetensors.torch import save_file

        other = Schema("other", ("a", "b"), (1, 8, 8))
        theirs = made("digits", other, seed=9).state_dict()
        file = tmp_path / f"weights.{suffix}"
        if suffix == "pt":
            torch.save({"state_dict": theirs}, file)
        else:
            save_file(theirs, file)
        mine = made("digits", model_weights=str(file)).state_dict()
        assert torch.equal(mine["fc1.weight"], theirs["fc1.weight"])
        assert mine["fc2.weight"].shape == (10, 20)  # a last layer of other classes stays new
        torch.save({"net": nn.Linear(1, 1)}, tmp_path / "object.pt")  # a pickled object
        with pytest.raises(ConfigError, match=r"model-weights = .*cannot be read"):
            made("digits", model_weights=str(tmp_path / "object.pt"))
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        with pytest.raises(ConfigError, match=r"is of another network: has no block1"):
            made("digits", model_weights=str(tmp_path / "x.safetensors"))

    @pytest.mark.parametrize(
        ("model", "said"),
        [
            ("nowhere:build", "the module nowhere cannot be imported from .*ModuleNotFoundError"),
            ("nets:nothing", "has nothing called nothing"),
            ("nets:NUMBER", "is a int, not a callable"),
            ("nets:of_one", r"cannot be called with \(classes, shape\)"),
            ("nets:raises", "raises ValueError: not today"),
            ("nets:no_module", "returns a str, not a torch.nn.Module"),
            ("nets:too_few", r"output is of shape \[2, 3\], but 10 classes need \[2, 10\]"),
            (
                "nets:mixing",
                "for an example depends on the others beside it: .*batch_first=True",
            ),
            ("nets:squeezed", r"for 1 example its output is of shape \[10\], .* \[1, 10\]"),
            ("nets:probable", "returns probabilities, but must return logits: leave out its last"),
            ("nets:loose", r"makes a different network each time \(scale\): fix the seed"),
            ("nets:idle", "left_over.* takes no part in its output"),
            ("nets:two_outputs", "returns tuple in eval.* mode"),
            ("torchvision:resnet81", "torchvision has no classifier 'resnet81'; did you mean"),
            ("torchvision:resnet18", r"does not take 2 examples of shape \[1, 8, 8\]"),
            ("cifar", "takes images of 3×32×32, but these are 1×8×8"),
            ("mlp", r"does not take examples of shape \[1, 8, 8\]"),
        ],
    )
    def test_what_cannot_be_used_is_refused(
        self, nets: Path, capsys: pytest.CaptureFixture[str], model: str, said: str
    ) -> None:
        assert cli.main(["run", f"model={model}", "method=fedavg"]) == 2
        error = capsys.readouterr().err
        assert re.search(f"^pfedgpa: model = .*{said}", error), error
        assert not (nets / "results").exists() or not list((nets / "results").glob("*/*"))

    @pytest.mark.parametrize(
        ("model", "schema", "said"),
        [
            ("auto", Schema("x", ("a", "b"), (28, 28)), r"grey images, give x\[:, None\]"),
            ("conv", Schema("x", ("a", "b"), (3, 64)), r"grey images, give x\[:, None\]"),
            (
                "nets:small",
                Schema("x", ("a", "b"), (1, 8, 8), tokens=True),
                "; whole numbers other than uint8 pixels are tokens.*: convert measurements to f",
            ),
        ],
    )
    def test_how_examples_would_fit_is_said(
        self, nets: Path, model: str, schema: Schema, said: str
    ) -> None:
        with pytest.raises(ConfigError, match=said):
            made(model, schema)

    def test_a_users_file_does_not_stand_in_for_a_library(self, nets: Path) -> None:
        (nets / "xmlrpc.py").write_text("raise SystemExit('the wrong one')")
        made("nets:small")
        assert sys.path[0] != str(nets)
        __import__("xmlrpc.client")


class TestNormalisingByTheBatch:
    """BatchNorm takes no step on one example."""

    def test_batches_of_one_are_refused(
        self, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        command = ["run", "method=fedavg", "batch-size=1", "model=nets:small"]
        assert cli.main(command) == 2
        said = "batch-size = 1: the network's layer norm (BatchNorm2d) cannot take a step on one"
        assert f"pfedgpa: {said}" in capsys.readouterr().err
        assert not list(nets.glob("results/*/*"))

    @pytest.mark.parametrize(("model", "learns"), [("small", False), ("normed_before", True)])
    def test_clients_of_one_example_are_named(self, nets: Path, model: str, learns: bool) -> None:
        how: dict[str, Any] = {"method": "fedavg,scaffold,fedala", "num_server_rounds": 2}
        how |= {"train_per_client": 1, "validation_share": 0.0, "partition": "iid"}
        folder, _ = federate(nets, model=f"nets:{model}", **how)
        told = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        said = "each: clients 0, 1, 2, 3; the network's layer norm (BatchNorm2d) "
        said += "cannot take a step on one"
        assert [said in text for text in told] == ([] if learns else [True])
        assert all((r["train_loss"] is not None) == learns for r in records(folder))


class TestMethods:
    def test_fedala_mixes_what_is_trained(self, nets: Path) -> None:
        """Of layers with statistics, too, which have no gradient."""
        how: dict[str, Any] = {"method": "fedala", "num_server_rounds": 2, "fedala.layers": 9}
        folder, _ = federate(nets, model="nets:small", **how)
        assert 0 <= summary(folder)["fedala"]["accuracy_before_ft"] <= 100

    @pytest.mark.parametrize("method", ["local", "lg-fedavg", "fedper", "fedbabu"])
    def test_what_a_client_was_never_sent_is_as_the_weights_on_disk(
        self, tmp_path: Path, method: str
    ) -> None:
        theirs = made("digits", seed=9).state_dict()
        torch.save({name: 2 * tensor for name, tensor in theirs.items()}, tmp_path / "w.pt")
        how: dict[str, Any] = {"num_server_rounds": 1, "fraction_train": 0.25}
        how |= {"model_weights": str(tmp_path / "w.pt"), "method": method}
        folder, _ = federate(tmp_path, **how)
        as_it_was = 0
        for line in records(folder, "clients.jsonl"):
            client = load_client(folder, line["client"], method)
            again = evaluate(folder, line["client"], method)
            assert again["accuracy"] == pytest.approx(line["before_ft"], abs=1e-9), line
            own = client.network.state_dict()
            as_it_was += any(torch.equal(own[name], 2 * theirs[name]) for name in own)
        assert as_it_was >= 3  # but for the one of four that took part

    def test_every_method_has_a_network_with_all_that_is_odd(self, nets: Path) -> None:
        how = {"method": ",".join(METHODS), "num_server_rounds": 3, "krum.malicious": 1}
        folder, _ = federate(nets, model="nets:small", **how)
        rows = summary(folder)
        assert set(rows) == set(METHODS)
        for name, row in rows.items():
            assert 0 <= row["accuracy_before_ft"] <= 100, name
        given = load_client(folder, 1, "pfedgpa").network.state_dict()
        assert not torch.equal(given["norm.running_var"], torch.ones(4))
        assert bool((given["norm.running_var"] > 0).all())
        initial = made("nets:small").state_dict()
        assert torch.equal(given["frozen.weight"], initial["frozen.weight"])
        for line in records(folder, "clients.jsonl"):  # every client of every method
            kind, client = line["method"], line["client"]
            again = evaluate(folder, client, kind)
            assert again["accuracy"] == pytest.approx(line["before_ft"], abs=1e-9), line

    @pytest.mark.parametrize("augment", [False, True])
    def test_a_network_that_views_what_a_convolution_returns(
        self, nets: Path, augment: bool
    ) -> None:
        folder, _ = federate(nets, model="nets:viewed", num_server_rounds=1, augment=augment)
        assert "pfedgpa" in summary(folder)
        words = ["evaluate", str(folder), "--client", "0"]
        assert cli.main(words) == 0
        export(load_client(folder, 0), "torch", nets / "network.pt2")

    @pytest.mark.parametrize("method", ["fedavgm", "fedavg,ditto,scaffold,pfedgpa-once"])
    def test_a_network_whose_tensors_are_not_contiguous(self, nets: Path, method: str) -> None:
        """It is kept: as weights, in checkpoints, with uploads, by clients, as a distribution."""
        how: dict[str, Any] = {"num_server_rounds": 2, "checkpoint_every": 1, "save_uploads": True}
        folder, _ = federate(nets, method=method, model="nets:Strided", **how)
        assert (folder / "uploads.safetensors").exists() == ("pfedgpa" in method)
        for line in records(folder, "clients.jsonl"):
            again = evaluate(folder, line["client"], line["method"])
            assert again["accuracy"] == pytest.approx(line["before_ft"], abs=1e-9), line

    def test_layouts(self, nets: Path) -> None:
        """Ours have the faster one; a network's outputs are the same in either."""
        schema = Schema("photos", tuple("0123456789"), (3, 32, 32))
        images = torch.rand(4, 32, 32, 3).permute(0, 3, 1, 2)
        for model in ("cifar", "conv"):
            network = laid_out(made(model, schema))
            weights = next(network.parameters())
            assert weights.is_contiguous(memory_format=torch.channels_last)
            usual = made(model, schema)
            torch.testing.assert_close(network(images), usual(images.contiguous()))
        assert next(laid_out(made("nets:viewed")).parameters()).is_contiguous()

    def test_adapters_alone_are_sent_and_generated(self, nets: Path) -> None:
        folder, grid = federate(nets, method="pfedgpa", model="nets:adapted")
        sent = grid.sent[-1].content.array_records["arrays"]
        assert set(sent) == {"1.weight", "2.weight", "2.bias"}
        given = load_client(folder, 0).network
        frozen = made("nets:adapted").state_dict()["0.1.weight"]
        assert torch.equal(given.state_dict()["0.1.weight"], frozen)

    def test_no_more_uploads_are_remembered_than_are_generated(self, nets: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import load_file

        own = {"pfedgpa.layers": 1, "pfedgpa.generate-from": 3}
        folder, _ = federate(nets, method="pfedgpa,client-mean", model="nets:small", **own)
        tensors = load_file(folder / "weights" / "pfedgpa.safetensors")
        with safe_open(folder / "weights" / "pfedgpa.safetensors", "pt") as file:
            about = file.metadata()
        assert about["method"] == "pfedgpa"
        assert json.loads(about["model"]) == json.loads((folder / "model.json").read_text())
        mine = {name.partition("/")[2] for name in tensors if name.startswith("client-0/")}
        assert mine == {"head.weight", "head.bias"}  # what the norm below has seen is the mean's

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ("model=nets:small head=norm", "the network's is BatchNorm2d"),
            ("model=nets:weight_normed", r"clients share of the network's only .*original0"),
            ("model=nets:tied_head", r"clients share of the network's only head\.bias: give"),
            ("model=nets:frozen_above", r"the network uses 1 after 0\.1"),
            ("head=fc1", "the network uses fc2 after fc1"),
        ],
    )
    def test_one_without_a_linear_head_is_refused_in_time(
        self, words: str, said: str, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", *words.split(), "method=fedavg,fedproto"]) == 2
        err = " ".join(capsys.readouterr().err.split())
        assert re.search(f"fedproto: makes a linear last layer with a bias .*, but {said}", err)

    @pytest.mark.parametrize("kind", ["single", "double", "half"])
    def test_numbers_of_another_type_and_some_that_are_alone(self, kind: str, nets: Path) -> None:
        methods = "fedproto,trimmed-mean,pfedhn"
        how: dict[str, Any] = {"method": methods, "num_server_rounds": 3, "evaluate_every": 0}
        folder, _ = federate(nets, model=f"nets:{kind}", **how)
        assert {*summary(folder)} == {*methods.split(",")}
        assert summary(folder)["fedproto"]["accuracy_before_ft"] > 50

    @pytest.mark.parametrize("kind", ["brainy_below", "branching"])
    def test_what_is_not_sent_or_makes_no_output_does_not_matter(
        self, kind: str, nets: Path
    ) -> None:
        how: dict[str, Any] = {"method": "fedproto", "num_server_rounds": 1, "evaluate_every": 0}
        federate(nets, model=f"nets:{kind}", **how)
        federate(nets / "adjusted", model=f"nets:{kind}", **how | {"method": "fedavg"})

    def test_a_type_that_messages_cannot_hold(self, nets: Path) -> None:
        with pytest.raises(ConfigError, match=r"its 1\.weight is of bfloat16, .* make it float32"):
            made("nets:brain")

    def test_a_method_of_ones_own(self, nets: Path, capsys: pytest.CaptureFixture[str]) -> None:
        text = (APP_DIR / "docs" / "own.md").read_text()
        [code] = re.findall(r"`fedx.py`:\n\n```python\n(.*?)```", text, re.DOTALL)
        assert len(code.splitlines()) < 60
        (nets / "fedx.py").write_text(code)
        with known_for_a_while("fedx"):
            method, step = "fedavg,fedx:FedX", {"fedx.step": 0.3}
            folder, _ = federate(nets, method=method, **step)
            rows = summary(folder)
            assert rows["fedx"]["title"] == "FedX"
            assert rows["fedx"]["accuracy_before_ft"] != rows["fedavg"]["accuracy_before_ft"]
            kept = json.loads((folder / "config.json").read_text())
            assert kept["method"]["value"] == ["fedavg", "fedx:FedX"]
            assert federation_of("fedx") == "fedx"
            assert load_client(folder, 0, "fedx").classes == DIGITS.classes
            assert cli.main(["run", "method=fedavg", "fedx.step=0.3"]) == 2
            assert "none of this run's methods (fedavg) uses it" in capsys.readouterr().err

    def test_a_state_of_ones_own_is_checkpointed(self, nets: Path) -> None:
        (nets / "fedz.py").write_text(
            "from dataclasses import dataclass\n"
            "from pfedgpa_app.core.uploads import weighted_mean\n"
            "from pfedgpa_app.methods.base import Method\n"
            "@dataclass\n"
            "class State:\n"
            "    weights: dict\n"
            "    rounds: int = 0\n"
            "class FedZ(Method):\n"
            "    @classmethod\n"
            "    def begin(cls, config, initial): return State(initial)\n"
            "    def expected_upload(self): return self.state.weights\n"
            "    def download(self, client): return self.state.weights\n"
            "    def aggregate(self, server_round, uploads):\n"
            "        self.state.weights = weighted_mean(uploads)\n"
            "        self.state.rounds += 1\n"
        )
        with known_for_a_while("fedz"):
            federate(nets, method="fedz:FedZ", num_server_rounds=2)
            state = METHODS["fedz"].rounds_class().begin(Config(), {"w": torch.ones(2)})
            state.rounds = 3
            Checkpoint(nets / "kept").save({"state": state})
            again = Checkpoint(nets / "kept")
            found = again.restore(again.read()["state"])
            assert type(found) is type(state)
            assert found.rounds == 3
            assert torch.equal(found.weights["w"], torch.ones(2))

    def test_other_processes_get_it_by_its_import_path(
        self, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (nets / "fedy.py").write_text(
            "from pfedgpa_app.methods.fedprox import FedProx, FedProxSettings\n"
            "class FedY(FedProx):\n"
            "    class settings(FedProxSettings): pass\n"
        )
        with known_for_a_while("fedy"):
            name = method_named("fedy:FedY")
            [first, second] = plan(["demo"], ["fedavg", name], [0], {}, nets / "out")
            assert [first.settings["method"], second.settings["method"]] == [
                ["fedavg"],
                ["fedy:FedY"],
            ]
            (nets / "mine.yaml").write_text("conf: demo\n")
            assert cli.main(["tune", "--conf", "mine.yaml", "--methods", "fedy:FedY"]) == 2
            assert "must list fedy:FedY under method" in capsys.readouterr().err

    def test_what_is_no_method_is_refused(
        self, nets: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(["run", "method=nets:Small"]) == 2
        assert "must be a class that extends one of pfedgpa_app.methods" in capsys.readouterr().err
        (nets / "fedavg.py").write_text(
            "from pfedgpa_app.methods.fedprox import FedProx\nclass FedAvg(FedProx): pass\n"
        )
        assert cli.main(["run", "method=fedavg:FedAvg"]) == 2
        assert "there is already a method fedavg: rename" in capsys.readouterr().err


RNG = np.random.default_rng(0)
ROWS = RNG.normal(size=(60, 5))
LABELS = np.arange(60) % 3


class TestData:
    def test_splits_by_other_names_are_no_classes(self, here: Path) -> None:
        for split in ("Training", "Test"):
            for kind in ("cat", "dog"):
                Path("ph", split, kind).mkdir(parents=True)
                Image.new("L", (8, 8)).save(Path("ph", split, kind, "0.png"))
        with pytest.raises(DataError, match="has Training/ and Test/, which are not classes"):
            load_dataset(Config(dataset="imagefolder:ph"))

    def test_torch_datasets_of_other_classes(self) -> None:
        splits = [TensorDataset(torch.from_numpy(ROWS), torch.from_numpy(LABELS)) for _ in "12"]
        splits[0].classes, splits[1].classes = ["a", "b", "c"], ["c", "b", "a"]  # type: ignore[attr-defined]
        with pytest.raises(DataError, match=r"different classes: a, b, c to train on, c, b, a to"):
            dataset_of("mine", tuple(splits), 0.2)

    @pytest.mark.parametrize(
        ("classes", "labels", "places"),
        [
            ([3, 2, 1], [1, 2, 3], [2, 1, 0]),  # they are names
            ([7, 8, 9], [0, 1, 2], [0, 1, 2]),  # they are numbers
            (["3", "2", "1"], [0, 1, 2], [0, 1, 2]),
            ([1, 2, 3, 4], [1, 2, 3], [0, 1, 2]),
        ],
    )
    def test_labels_that_are_whole_numbers(
        self, classes: list[Any], labels: list[int], places: list[int]
    ) -> None:
        every = {"x": ROWS, "y": np.array(labels)[LABELS], "classes": classes}
        found = dataset_of("mine", every, 0.2)
        assert found.classes == tuple(map(str, classes))
        held = np.bincount(found.train_labels, minlength=len(classes))
        held += np.bincount(found.test_labels, minlength=len(classes))
        wanted = dict(zip(places, np.bincount(LABELS), strict=True))
        assert held.tolist() == [wanted.get(i, 0) for i in range(len(classes))]

    def test_a_table_is_split_by_class(self) -> None:
        found = dataset_of("mine", {"x": ROWS, "y": LABELS, "classes": ["a", "b", "c"]}, 0.2)
        assert found.train_images.dtype == np.float32
        assert (len(found.train_labels), len(found.test_labels)) == (48, 12)
        assert np.bincount(found.test_labels).tolist() == [4, 4, 4]
        both = np.concatenate([found.train_images, found.test_images])
        assert len(np.unique(both, axis=0)) == 60

    def test_torch_data_sets_to_train_and_to_test_on(self) -> None:
        pairs = TensorDataset(torch.from_numpy(ROWS), torch.from_numpy(LABELS))
        two = dataset_of("mine", (pairs, Subset(pairs, range(9))), 0.2)
        arrays = dataset_of("mine", (ROWS, LABELS, ROWS[:9], LABELS[:9]), 0.2)
        for name in ("train_images", "train_labels", "test_images", "test_labels"):
            assert np.array_equal(getattr(two, name), getattr(arrays, name)), name
        split = dataset_of("mine", pairs, 0.2)
        assert np.array_equal(
            split.test_images, dataset_of("mine", (ROWS, LABELS), 0.2).test_images
        )

    def test_a_torch_data_set_of_images_and_its_classes(self, tmp_path: Path) -> None:
        for name in ("cat", "dog"):
            (tmp_path / name).mkdir()
            for i in range(3):
                Image.new("RGB", (5, 4), (i, 0, 9)).save(tmp_path / name / f"{i}.png")
        found = dataset_of("mine", ImageFolder(str(tmp_path)), 0.34)
        assert found.classes == ("cat", "dog")
        assert found.train_images.dtype == np.uint8
        assert found.shape == (3, 4, 5)

    @pytest.mark.parametrize(
        ("mode", "channels"), [("1", 1), ("L", 1), ("P", 3), ("RGBA", 3), ("I;16", 1), ("CMYK", 3)]
    )
    def test_a_torch_data_set_of_pictures_of_any_mode(self, mode: str, channels: int) -> None:
        """As an image folder has them: a palette's numbers are no brightness."""
        pixels = np.zeros((4, 4, 3), np.uint8)
        pixels[:2] = 255
        picture = Image.fromarray(pixels)
        if mode == "I;16":
            picture = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        pairs = [(picture.convert(mode) if mode != "I;16" else picture, i % 2) for i in range(6)]

        class Mine(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(pairs)

            def __getitem__(self, i: int) -> Any:
                return pairs[i]

        found = dataset_of("mine", Mine(), 0.34)
        assert found.pixels
        assert found.shape == (channels, 4, 4)
        assert (found.train_images[:, :, :2] == 255).all()
        assert not found.train_images[:, :, 2:].any()
        pairs[3] = (Image.new("F", (4, 4)), 0)
        with pytest.raises(DataError, match="item 3: its pixels have no defined range"):
            dataset_of("mine", Mine(), 0.34)

    @pytest.mark.parametrize(
        ("items", "said"),
        [
            ([(ROWS[0], 0), (ROWS[0, :2], 1)], r"of shape \[5\], but item 1 is of \[2\]"),
            ([ROWS[0], ROWS[1]], r"as item 0: it must be \(example, label\)"),
        ],
    )
    def test_torch_data_sets_that_are_refused(self, items: list[Any], said: str) -> None:
        class Mine(torch.utils.data.Dataset[Any]):
            def __len__(self) -> int:
                return len(items)

            def __getitem__(self, i: int) -> Any:
                return items[i]

        with pytest.raises(
            DataError, match=f"^dataset mine: the torch Dataset to train on .*{said}"
        ):
            dataset_of("mine", (Mine(), Mine()), 0.2)

    @pytest.mark.parametrize(
        ("dtype", "shape", "kept", "taken"),
        [
            (np.uint8, (60, 6, 7), "uint8", (1, 6, 7)),
            (np.uint8, (60, 6, 7, 3), "uint8", (3, 6, 7)),
            (np.uint8, (60, 6, 7, 2), "uint8", (2, 6, 7)),  # grey with transparency
            (np.uint8, (60, 3, 6, 7), "uint8", (3, 6, 7)),
            (np.uint8, (60, 6, 6, 5), "uint8", (5, 6, 6)),  # as satellites take them
            (np.uint8, (60, 5, 6, 6), "uint8", (5, 6, 6)),
            (np.uint8, (60, 6, 6, 6), "uint8", (6, 6, 6)),
            (np.uint8, (60, 3, 3, 6), "uint8", (3, 3, 6)),
            (np.float64, (60, 4, 2), "float32", (4, 2)),
            (np.int32, (60, 9), "int64", (9,)),
            (np.float16, (60,), "float32", (1,)),
        ],
    )
    def test_what_inputs_become(
        self, dtype: Any, shape: tuple[int, ...], kept: str, taken: tuple[int, ...]
    ) -> None:
        x: np.ndarray = RNG.integers(0, 9, shape).astype(dtype)
        found = dataset_of("mine", (x, LABELS, x, LABELS), 0.2)
        assert (str(found.train_images.dtype), found.shape) == (kept, taken)

    def test_tensors_and_names_as_labels(self) -> None:
        names = np.array(["owl", "cat", "dog"])[LABELS]
        found = dataset_of("mine", {"x": torch.tensor(ROWS), "y": names}, 0.2)
        assert found.classes == ("cat", "dog", "owl")
        assert (
            dataset_of("mine", {"x": ROWS, "y": names.astype(object)}, 0.2).classes == found.classes
        )
        column = torch.tensor(LABELS)[:, None]  # as MedMNIST has them
        medical = {"train_images": ROWS, "train_labels": column, "val_images": ROWS}
        medical |= {"test_images": ROWS, "test_labels": column}
        found = dataset_of("mine", medical, 0.2)
        assert found.train_labels.tolist() == LABELS.tolist()
        [said] = remarks(found)
        assert said.startswith("dataset mine: val_images is left out; validation-share")

    def test_frames_of_pandas(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"age": ROWS[:, 0], "town": ["Ulm"] * 60, "job": ["cook"] * 60})
        names = pandas.Series(np.array(["owl", "cat", "dog"])[LABELS])
        for labels in (names, names.astype("category"), names.astype(object)):
            found = dataset_of("mine", {"x": frame[["age"]], "y": labels}, 0.2)
            assert found.classes == ("cat", "dog", "owl")
        for missing in (None, float("nan")):
            for labels in (pandas.Series([missing, *names[1:]]), [*names[:59], missing]):
                with pytest.raises(DataError, match=r"y has text, but row (0|59) has none"):
                    dataset_of("mine", {"x": frame[["age"]], "y": labels}, 0.2)
        said = r"x holds objects.*, in town \(row 0 has 'Ulm'\), job \(row 0 .*: encode these"
        with pytest.raises(DataError, match=said):
            dataset_of("mine", {"x": frame, "y": names}, 0.2)

    def test_columns_of_frames_keep_their_names(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"age": ROWS[:, 0], "height": ROWS[:, 1]})
        assert dataset_of("mine", (frame, LABELS), 0.2).columns == ("age", "height")
        assert dataset_of("mine", (frame.set_axis([7, 8], axis=1), LABELS), 0.2).columns == ()
        assert dataset_of("mine", (frame.set_axis(["a", "a"], axis=1), LABELS), 0.2).columns == ()
        with pytest.raises(DataError, match="x_train has the columns age, height, and x_test heig"):
            dataset_of("mine", (frame, LABELS, frame[["height", "age"]], LABELS), 0.2)

    def test_a_cell_that_cannot_be_used_is_found(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"age": ROWS[:, 0], "height": ROWS[:, 1]})
        frame.loc[7, "height"] = float("nan")
        with pytest.raises(DataError, match="not finite, the first in row 7, column height: fill"):
            dataset_of("mine", (frame, LABELS), 0.2)
        given = {"x": frame.to_numpy(), "y": LABELS, "columns": ["age", "weight"]}
        with pytest.raises(DataError, match="not finite, the first in row 7, column weight: fill"):
            dataset_of("mine", given, 0.2)
        with pytest.raises(DataError, match="not finite, the first in row 7, column 1: fill"):
            dataset_of("mine", (frame.to_numpy(), LABELS), 0.2)
        texts = frame.astype(object)
        texts.loc[9, "age"] = "n/a"
        with pytest.raises(DataError, match=r"in age \(row 9 has 'n/a'\)"):
            dataset_of("mine", (texts[["age"]], LABELS), 0.2)

    def test_labels_may_have_come_as_floats(self) -> None:
        found = dataset_of("mine", {"x": ROWS, "y": LABELS.astype(np.float32)}, 0.2)
        assert found.classes == ("0", "1", "2")
        expected = dataset_of("mine", {"x": ROWS, "y": LABELS}, 0.2)
        assert np.array_equal(found.train_labels, expected.train_labels)

    def test_labels_may_be_a_frame_of_one_column(self) -> None:
        pandas = pytest.importorskip("pandas")
        for labels in (LABELS, np.array(["a", "b", "c"])[LABELS]):
            frame = pandas.DataFrame({"kind": labels})
            found = dataset_of("mine", {"x": ROWS, "y": frame}, 0.2)
            expected = dataset_of("mine", {"x": ROWS, "y": labels}, 0.2)
            assert found.classes == expected.classes
            assert np.array_equal(found.train_labels, expected.train_labels)

    def test_numbers_of_several_kinds_are_numbers(self) -> None:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame({"a": ROWS[:, 0], "kind": np.where(LABELS > 0, "x", "y")})
        mixed = pandas.get_dummies(frame)  # true and false beside floats
        for x in (mixed, mixed.convert_dtypes()):  # and kinds of which some may be absent
            data = dataset_of("mine", {"x": x, "y": LABELS}, 0.2)
            every = np.concatenate([data.train_images, data.test_images])
            assert every.dtype == np.float32
            assert set(np.unique(every[:, 1])) == {0.0, 1.0}

    def test_users_may_be_a_column(self) -> None:
        pandas = pytest.importorskip("pandas")
        for users in (LABELS, LABELS.astype(float), np.array(["ann", "bob", "eve"])[LABELS]):
            one = dataset_of("mine", {"x": ROWS, "y": LABELS, "users": users}, 0.2)
            assert len(set(one.train_users)) == 3
            for column in (users[:, None], pandas.DataFrame({"who": users})):
                found = dataset_of("mine", {"x": ROWS, "y": LABELS, "users": column}, 0.2)
                assert np.array_equal(found.train_users, one.train_users)

    @pytest.mark.parametrize(
        ("users", "names"),
        [
            (np.array([b"ann", b"bj\xc3\xb6rn", b"eve"])[LABELS], {"ann", "björn", "eve"}),
            (np.array([b"ann", b"bob", b"eve"], object)[LABELS], {"ann", "bob", "eve"}),
            (LABELS + 0.5, {"0.5", "1.5", "2.5"}),
            (LABELS.astype(np.float32), {"0", "1", "2"}),
            ([(7, "ann", 1.5)[each] for each in LABELS], {"7", "ann", "1.5"}),
            (np.array(["2026-12-01", "2026-12-02", "2027-01-01"], "M8[D]")[LABELS], None),
            (np.array(["2026-12-01", "2026-12-02", "2027-01-01"], "M8[ns]")[LABELS], None),
            (torch.tensor(LABELS), {"0", "1", "2"}),
            (LABELS > 1, {"False", "True"}),
        ],
        ids=["bytes", "objects", "fractions", "whole", "mixed", "days", "times", "tensor", "bool"],
    )
    def test_users_of_any_kind(self, users: Any, names: set[str] | None) -> None:
        """As HDF5, tables and people write them."""
        found = dataset_of("mine", {"x": ROWS, "y": LABELS, "users": users}, 0.2)
        who = set(found.train_users) | set(found.test_users)
        assert who == (names or {"2026-12-01", "2026-12-02", "2027-01-01"})

    def test_dates_are_the_same_users_in_whatever_holds_them(self) -> None:
        pandas = pytest.importorskip("pandas")
        texts = ["2026-12-01", "2026-12-02T07:30", "2027-01-01"]
        days = pandas.Series([pandas.Timestamp(text) for text in texts])
        held = days[LABELS].reset_index(drop=True)
        named = {"2026-12-01", "2026-12-02T07:30:00", "2027-01-01"}
        for users in (held, held.to_numpy(), held.to_list(), held.to_frame()):
            found = dataset_of("mine", {"x": ROWS, "y": LABELS, "users": users}, 0.2)
            assert set(found.train_users) == named
        zoned = held.dt.tz_localize("UTC")
        found = dataset_of("mine", {"x": ROWS, "y": LABELS, "users": zoned}, 0.2)
        assert set(found.train_users) == {f"{day:%Y-%m-%dT%H:%M:%S}+00:00" for day in days}

    def test_labels_of_bytes_are_text(self) -> None:
        for kind in ("S", object):
            labels = np.array([b"cat", b"cow", b"dog"], kind)[LABELS]
            assert dataset_of("mine", {"x": ROWS, "y": labels}, 0.2).classes == (
                "cat",
                "cow",
                "dog",
            )

    def test_frames_whose_rows_lie_in_another_order_are_refused(self) -> None:
        """NumPy would pair them as they lie, and pandas by their index."""
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(ROWS, columns=list("abcde"))
        labels, users = pandas.Series(LABELS), pandas.Series(LABELS)
        for key in ("y", "users"):
            found = {"x": frame, "y": labels, "users": users}
            found[key] = found[key].sample(frac=1, random_state=0)
            with pytest.raises(DataError, match=f"x and {key} have different row ind"):
                dataset_of("mine", found, 0.2)
            found[key] = found[key].to_numpy()
            dataset_of("mine", found, 0.2)

    @pytest.mark.parametrize(("brightest", "warns"), [(15, True), (63, True), (64, False)])
    def test_dark_images_are_named(self, brightest: int, warns: bool) -> None:
        """As of 12 bits in files of 16, of which the upper 8 are taken."""
        images = np.zeros((60, 8, 8), np.uint8)
        images[::7, 3, 3] = brightest
        said = list(remarks(dataset_of("mine", {"x": images, "y": LABELS}, 0.2)))
        assert any(f"its brightest pixel is {brightest}, of 255" in text for text in said) == warns

    def test_floats_that_numpy_has_not_are_floats(self) -> None:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            found = dataset_of("mine", {"x": torch.ones(60, 5).to(dtype), "y": LABELS}, 0.2)
            assert (found.train_images == np.ones((48, 5), np.float32)).all()

    def test_columns_of_arrays_are_named(self) -> None:
        found = {"x": ROWS[:, :2], "y": LABELS}
        named = dataset_of("mine", found | {"columns": np.array(["age", "height"])}, 0.2)
        assert named.columns == ("age", "height")
        for odd in (["age"], ["age", "age"]):
            with pytest.raises(DataError, match=r"names \d columns, .* is of shape \[2\]"):
                dataset_of("mine", found | {"columns": odd}, 0.2)

    @pytest.mark.parametrize(
        ("found", "said"),
        [
            ("text", "is a str, but must be a dict"),
            ((ROWS, LABELS, ROWS), "is a tuple of 3"),
            ({"x": ROWS}, "has no y$"),
            ({"x_train": ROWS}, "has no y_train$"),
            ({"train_images": ROWS}, "has no y_train$"),
            ({"x": ROWS, "y": LABELS, "clases": []}, "unknown name 'clases'; did you mean classes"),
            ({"x": ROWS, "y": LABELS[1:]}, "x has 60 examples, but y has 59"),
            ({"x": ROWS[:0], "y": LABELS[:0]}, "x is empty"),
            ({"x": ROWS, "y": LABELS, "classes": ["a", "b"]}, "label 2, which is not one of the 2"),
            ({"x": ROWS, "y": LABELS, "classes": ["a", "b", "a"]}, "of different names"),
            ({"x": ROWS, "y": LABELS * 0}, "must have 2 or more classes"),
            (
                {"x": ROWS, "y": LABELS + 0.5},
                "has 0.5 in row 0: give a whole number or a name",
            ),
            ({"x": ROWS, "y": np.where(LABELS > 1, np.nan, LABELS)}, "y has nan in row 2"),
            (
                {"x": ROWS, "y": np.eye(3)[LABELS]},
                r"y.argmax\(1\) makes one label of each",
            ),
            ({"x": ROWS / np.where(ROWS > 2, 0, 1), "y": LABELS}, "a number that is not finite"),
            (
                {"x": [[1, 2], [3]] * 30, "y": LABELS},
                "x has examples that differ in length, as row 0 with 2 and row 1 with 1: pad them",
            ),
            (
                {"x": [np.zeros((3, 2, 2)), np.zeros((3, 2, 4))] * 30, "y": LABELS},
                r"x has examples that differ in shape, as row 0 with \[3, 2, 2\] and row 1",
            ),
            (
                {"x_train": np.array(["a b", "c"] * 30), "y_train": LABELS},
                "x_train holds text, as 'a b', but must hold numbers: make token ids of texts",
            ),
            ({"x": ROWS.astype(object), "y": LABELS}, "x holds objects"),
            ({"x": ROWS.astype(complex), "y": LABELS}, "x holds complex128"),
            ((ROWS, LABELS, ROWS[:, :4], LABELS), r"of shape \[5\], x_test float32 of \[4\]"),
            ((ROWS, LABELS, ROWS, LABELS.astype(str)), "y_train holds numbers, but y_test text"),
            (
                {"x": torch.tensor(ROWS).to_sparse(), "y": LABELS},
                "x is not an array: .*Sparse",
            ),
            (
                {"x": ROWS, "y": LABELS, "users": np.array([["a", "b"]] * 60)},
                r"users is of shape \[60, 2\]: give one user for each example$",
            ),
            (
                {"x": ROWS, "y": LABELS, "users": ["a"] * 59 + [None]},
                "users names no user in row 59: fill it in",
            ),
            (
                {"x": ROWS, "y": LABELS, "users": [1.0] * 59 + [np.nan]},
                "users names no user in row 59",
            ),
            (
                {
                    "x": ROWS,
                    "y": LABELS,
                    "users": np.array(["2026-12-01"] * 59 + ["NaT"], "M8[ns]"),
                },
                "users names no user in row 59",
            ),
            (
                {"x": ROWS, "y": LABELS, "users": [{"name": "ann"}] * 60},
                "users has {'name': 'ann'} in row 0: name one user",
            ),
            ({"x": ROWS, "y": LABELS, "users": [[1], [2, 3]] * 30}, "users "),
            ({"x": ROWS, "y": np.array([b"\xff"] * 60)}, "y is not an array: 'utf-8'"),
        ],
    )
    def test_what_is_no_data_set_is_refused(self, found: Any, said: str) -> None:
        with (
            np.errstate(divide="ignore"),
            pytest.raises(DataError, match=f"^dataset mine: .*{said}"),
        ):
            dataset_of("mine", found, 0.2)

    def test_what_pandas_holds_is_refused_in_its_words(self) -> None:
        pandas = pytest.importorskip("pandas")
        lists = pandas.Series([np.arange(3), np.arange(5)] * 30)
        with pytest.raises(DataError, match="differ in length, as row 0 with 3 and row 1 with 5"):
            dataset_of("mine", {"x": lists, "y": LABELS}, 0.2)
        frame = pandas.DataFrame({"age": ROWS[:, 0], "risk": LABELS})
        how = r'; of a frame, give {"x": frame\[COLUMNS\], "y": frame\[LABEL\]}$'
        with pytest.raises(DataError, match=f"is a DataFrame, .*{how}"):
            dataset_of("mine", frame, 0.2)

    def test_whole_numbers_in_the_shape_of_images_are_remarked_on(self) -> None:
        found = {"x": np.zeros((60, 8, 8), np.uint16), "y": LABELS}
        [remark] = remarks(dataset_of("mine", found, 0.2))
        assert "holds whole numbers; whole numbers other than uint8 pixels are tokens" in remark

    def test_features_that_nobody_scaled_are_named(self, tmp_path: Path) -> None:
        found = {"x": ROWS * [1, 1, 1e5, 1, 1], "y": LABELS}
        [said] = remarks(dataset_of("mine", found, 0.2))
        assert re.search(r"mine: number 2 of an example is about 9.1e\+04 in size", said)
        columns = {"columns": ["age", "sex", "income", "height", "weight"]}
        [said] = remarks(dataset_of("mine", found | columns, 0.2))
        assert "column 'income'" in said
        pixels = np.full((60, 5, 4), 200, np.uint8)
        last = dataset_of("mine", {"x": ROWS.repeat(6, 1).reshape(-1, 5, 2, 3), "y": LABELS}, 0.2)
        [said] = remarks(last)
        assert re.search(r"mine: .* shape \[5, 2, 3\]; if it is an image", said)
        assert list(remarks(dataset_of("mine", {"x": np.ones((60, 6, 6, 5)), "y": LABELS}, 0.2)))
        for fine in (ROWS, pixels, (ROWS * 1e5).astype(int), ROWS.reshape(-1, 1, 5, 1)):
            assert not list(remarks(dataset_of("mine", {"x": fine, "y": LABELS}, 0.2)))

    def test_a_class_that_is_only_tested_is_some_nodes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a federation's one data set it is a mistake."""
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        train = ROWS[:40], LABELS[:40] // 2 * 2
        np.savez(
            tmp_path / "mine.npz", x_train=train[0], y_train=train[1], x_test=ROWS, y_test=LABELS
        )
        config = Config(dataset=f"npz:{tmp_path}/mine.npz")
        with pytest.raises(DataError, match="class '1' has test examples but no training"):
            load_dataset(config)
        config = Config(dataset="nodes", classes=("0", "1", "2", "3"))
        held = load_own(config, f"npz:{tmp_path}/mine.npz")
        assert held.test_labels.tolist() == LABELS.tolist()

    def test_a_file_of_arrays(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        np.savez("mine.npz", x=ROWS, y=LABELS)
        config = Config(dataset="npz:mine.npz", train_per_client=None, test_per_client=None)
        assert load_dataset(config).shape == (5,)
        np.savez("bad.npz", x=np.array([{}, {}]), y=np.array([0, 1]))  # pickled objects
        with pytest.raises(DataError, match=r"npz:bad.npz: .*cannot be read as arrays"):
            load_dataset(Config(dataset="npz:bad.npz"))
        Path("table.csv").write_text("a,b\n1,2\n")
        with pytest.raises(DataError, match=r"table.csv is not what numpy.savez writes; "):
            load_dataset(Config(dataset="npz:table.csv"))
        with pytest.raises(DataError, match=r"npz:no.npz: no file .*no.npz"):
            load_dataset(Config(dataset="npz:no.npz"))


LOOSE = """
import numpy as np

SHIFT = np.random.normal()

def load():
    return drawn(np.random.default_rng())

def split():
    return drawn(np.random)

def drawn(rng):
    y = np.arange(90) % 3
    return {"x": rng.normal(size=(90, 5)).astype("float32") + SHIFT + y[:, None], "y": y}
"""


LAZY = """
import numpy as np
from torch.utils.data import Dataset

class Lazy(Dataset):
    def __len__(self):
        return 60

class Drawn(Lazy):
    def __getitem__(self, i):
        return np.random.normal(size=3), i % 2

class Filed(Lazy):
    def __getitem__(self, i):
        return np.load("rows.npy")[i], i % 2

class Missing(Lazy):
    def __getitem__(self, i):
        raise KeyError("no row")

class Torn(Lazy):
    def __getitem__(self, i):
        raise OSError("the tape is torn")
"""


class TestItems:
    """A torch Dataset's items are read as what makes it is called."""

    @pytest.fixture(autouse=True)
    def lazy(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lazy.py").write_text(LAZY)
        monkeypatch.chdir(tmp_path)
        forget()

    def test_what_they_draw_is_the_same_each_time(self) -> None:
        config = Config(dataset="lazy:Drawn")
        told = fingerprint(config)
        forget()
        check_same(config, told)

    def test_relative_paths_are_the_users_where_the_run_works(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        np.save("rows.npy", ROWS[:, :3])
        monkeypatch.setenv("PFEDGPA_FOLDER", str(tmp_path))
        monkeypatch.chdir("/")
        assert load("lazy:Filed", "", code_dir=str(tmp_path)).shape == (3,)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("Missing", r"KeyError \(lazy.py, line 19\): 'no row'"),
            ("Torn", r"OSError \(lazy.py, line 23\): the tape is torn"),
        ],
    )
    def test_what_they_raise_is_said(self, name: str, said: str) -> None:
        with pytest.raises(DataError, match=f"lazy:{name}: reading what it returns raises {said}"):
            load(f"lazy:{name}", "")


class TestSameData:
    """Test images that others see as training images would make accuracies look better."""

    SMALL: ClassVar[dict[str, Any]] = {
        "method": "fedavg",
        "num_clients": 2,
        "train_per_client": None,
        "test_per_client": None,
    }

    def test_what_each_process_draws_anew_is_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "loose.py").write_text(LOOSE)
        monkeypatch.chdir(tmp_path)
        seen = []

        def read_anew(message: Message, reply: Message) -> Message:
            seen.append(reply.has_error())
            forget()  # as another process would
            return reply

        with pytest.raises(NoUploadsError, match=r"loose:load: differs from .* fix the seed"):
            federate(tmp_path, read_anew, dataset="loose:load", **self.SMALL)
        assert not seen[0]
        assert seen[-1]

    def test_what_is_drawn_without_a_generator_of_its_own_is_the_same(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As by scikit-learn's train_test_split."""
        (tmp_path / "loose.py").write_text(LOOSE)
        config = Config(dataset="loose:split", code_dir=str(tmp_path))
        random.seed(7)
        others = random.getstate()
        told = []
        for _ in range(2):
            monkeypatch.delitem(sys.modules, "loose", raising=False)
            forget()
            told.append(fingerprint(config))
            assert random.getstate() == others
            random.random()
            others = random.getstate()
        assert told[0] == told[1]

    def test_so_is_what_has_changed_since(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.chdir(tmp_path)
        np.savez("mine.npz", x=ROWS, y=LABELS)

        def ended(message: Message, reply: Message) -> Message:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            federate(tmp_path, ended, dataset="npz:mine.npz", **self.SMALL)
        np.savez("mine.npz", x=np.r_[ROWS, ROWS], y=np.r_[LABELS, LABELS])
        forget()
        with pytest.raises(DataError, match=r"the data have changed since .*run began"):
            federate(tmp_path, dataset="npz:mine.npz", resume=True, **self.SMALL)
        np.savez("mine.npz", x=ROWS, y=LABELS)
        forget()
        folder, _ = federate(tmp_path, dataset="npz:mine.npz", resume=True, **self.SMALL)
        assert evaluate(folder, 0)["examples"]
        others = ROWS.copy()
        others[7] += 1  # the labels are the same
        np.savez("mine.npz", x=others, y=LABELS)
        with pytest.raises(DataError, match=r"the data have changed since .*run began"):
            evaluate(folder, 0)

    def test_machines_may_round_otherwise(self, tmp_path: Path) -> None:
        (tmp_path / "loose.py").write_text(LOOSE)
        config = Config(dataset="loose:load", code_dir=str(tmp_path))
        told: dict[str, Any] = dict(fingerprint(config))
        check_same(config, told)
        check_same(config, told | {"numbers": [1.0001 * number for number in told["numbers"]]})
        with pytest.raises(DataError):
            check_same(config, told | {"numbers": told["numbers"][::-1]})
        with pytest.raises(DataError):
            check_same(config, told | {"labels": told["labels"] + 1})


def photos(folder: Path, each: int = 30) -> Path:
    """Images of three classes, in a folder a class."""
    for i, name in enumerate(("cat", "dog", "owl")):
        (folder / name).mkdir(parents=True)
        for j in range(each):
            pixels = RNG.integers(0, 40, (16, 16, 3)) + np.array([80 * i, 30, 160 - 80 * i])
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{j}.png")
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with photos, and a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    photos(tmp_path / "photos")
    return tmp_path


def test_other_images_in_the_same_folders_are_other_data(here: Path) -> None:
    config = Config(dataset=f"imagefolder:{here / 'photos'}")
    told = fingerprint(config)
    for file in (here / "photos").glob("*/*.png"):
        Image.fromarray(255 - np.asarray(Image.open(file))).save(file)
    forget()
    with pytest.raises(DataError, match="keep its files as they were"):
        check_same(config, told)


ALL: dict[str, Any] = {"train_per_client": None, "test_per_client": None, "validation_share": 0.0}


class TestPartitions:
    def test_all_images_are_dealt_and_none_twice(self, here: Path) -> None:
        config = Config(dataset="imagefolder:photos", num_clients=3, **ALL)
        splits, data = load_partition(config), load_dataset(config)
        for part, labels in (("train", data.train_labels), ("test", data.test_labels)):
            held = np.concatenate([getattr(split, part) for split in splits])
            assert sorted(held) == list(range(len(labels)))
        said = data_in_words(config)
        assert "72 training and 18 test images of 3×16×16 in 3 classes (cat, dog, owl)" in said
        assert "nobody" not in said
        assert "more than once" not in said

    def test_what_is_left_out_or_shared_is_said(self, here: Path) -> None:
        sizes: dict[str, Any] = {
            "train_per_client": 6,
            "test_per_client": 3,
            "validation_share": 0.0,
        }
        said = data_in_words(Config(dataset="imagefolder:photos", num_clients=3, **sizes))
        assert "3 clients train on 6 each (nobody holds 54)" in said
        assert "does not train on" not in said
        few = {"train_per_client": 1, "partition": "iid"}
        said = data_in_words(Config(dataset="imagefolder:photos", num_clients=3, **sizes | few))
        # of three classes each has one test image, and one has a training image
        assert "67 % are of classes that their client does not train on" in said
        sizes["validation_share"] = 0.5
        said = data_in_words(Config(dataset="imagefolder:photos", num_clients=3, **sizes))
        assert "train on 3 each, with 3 more for validation (nobody holds 54), and are te" in said
        sizes["test_per_client"] = 8  # of 18 in all
        said = data_in_words(Config(dataset="imagefolder:photos", num_clients=3, **sizes))
        assert "held more than once" in said

    def test_validation_images_are_not_trained_on(self, here: Path) -> None:
        """Of its three classes a client trains on one."""
        sizes = ALL | {"partition": "iid", "train_per_client": 3, "validation_share": 0.67}
        said = data_in_words(Config(dataset="imagefolder:photos", num_clients=3, **sizes))
        assert "train on 1 each, with 2 more for validation" in said
        assert "67 % are of classes that their client does not train on" in said

    def test_its_counts_are_printed_and_kept(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        words = ["partition", "num-clients=2", "--out", "counts.csv"]
        assert cli.main(words) == 0
        held = load_partition(resolve({"num-clients": 2}).config)
        labels = load_dataset(resolve({}).config).train_labels
        with Path("counts.csv").open() as file:
            header, *rows = csv.reader(file)
        assert header == ["client", *map(str, range(10))]
        for row, split in zip(rows, held, strict=True):
            mine = labels[np.concatenate([split.train, split.validation])]
            assert list(map(int, row[1:])) == np.bincount(mine, minlength=10).tolist()
        assert f"| {' | '.join(rows[0])} |" in capsys.readouterr().out

    def test_users_are_clients(self, nets: Path) -> None:
        (nets / "tables.py").write_text(
            "import numpy as np\n"
            "def load():\n"
            "    users = np.repeat(['ann', 'bob', 'eve'], 20)\n"
            "    x = np.random.default_rng(0).normal(size=(60, 5))\n"
            "    return {'x': x, 'y': np.arange(60) % 2, 'users': users}\n"
        )
        config = Config(dataset="tables:load", num_clients=3, partition="natural", **ALL)
        data = load_dataset(config)
        for name, split in zip(("ann", "bob", "eve"), load_partition(config), strict=True):
            assert set(data.train_users[split.train]) == {name}
            assert set(data.test_users[split.test]) == {name}
        assert "users" not in data_in_words(config)
        assert users_of_clients(config) == [["ann"], ["bob"], ["eve"]]
        two = Config(dataset="tables:load", num_clients=2, partition="natural", **ALL)
        assert "these clients are 3 users, dealt out in turn" in data_in_words(two)
        assert [len(split.test) for split in load_partition(two)] == [8, 4]
        assert users_of_clients(two) == [["ann", "eve"], ["bob"]]
        assert users_of_clients(replace(two, partition="iid")) == []
        with pytest.raises(ValueError, match=r"has 3 users, fewer .* = 4: set num-clients=3"):
            load_partition(Config(dataset="tables:load", num_clients=4, partition="natural", **ALL))
        with pytest.raises(ValueError, match=r"the data set names no users$"):
            load_partition(Config(num_clients=4, partition="natural", **ALL))
        some, none = np.array(["ann", "bob"]), np.array([], dtype=str)
        with pytest.raises(ValueError, match=r"names users_train, but not users_test$"):
            by_users(some, none, 2)
        with pytest.raises(ValueError, match=r"names users_test, but not users_train$"):
            by_users(none, some, 2)
        with pytest.raises(ValueError, match="user eve has no test example: give it one, or leave"):
            by_users(data.train_users, data.test_users[data.test_users != "eve"], 3)

    def test_the_demos_sizes_are_for_its_data_alone(self) -> None:
        assert resolve({}).config.train_per_client == 90
        config = resolve({"dataset": "imagefolder:photos"}).config
        assert (config.train_per_client, config.test_per_client) == (None, None)
        assert config.batch_size == Config.batch_size


SITES = """
import numpy as np

def load():
    users = np.repeat(["west", "north", "1", "a/b"], 20)
    x = np.random.default_rng(0).normal(size=(80, 5)).astype("float32")
    return {"x": x, "y": np.arange(80) % 2, "users": users}
"""


class TestUsers:
    """Which client is which user, and what takes users' names."""

    @pytest.fixture
    def sites(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """A folder with data of four users, dealt out to three clients."""
        (tmp_path / "sites.py").write_text(SITES)
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "sites", raising=False)
        return tmp_path

    def run(self, place: Path, **more: Any) -> Path:
        how = {"dataset": "sites:load", "partition": "natural", "num_clients": 3}
        how |= {"train_per_client": "auto", "test_per_client": "auto", "method": "local,fedavg"}
        return federate(place, **{**how, "num_server_rounds": 1, **more})[0]

    def test_a_partitions_table(self, sites: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = ["dataset=sites:load", "partition=natural", "num-clients=3", "validation-share=0"]
        assert cli.main(["partition", *words, "--out", "who.csv"]) == 0
        with Path("who.csv").open() as file:
            header, *rows = csv.reader(file)
        assert header == ["client", "users", "0", "1"]
        assert [row[1] for row in rows] == ["1, west", "a/b", "north"]
        assert f"| {' | '.join(rows[0])} |" in capsys.readouterr().out

    def test_what_a_run_says(self, sites: Path, capsys: pytest.CaptureFixture[str]) -> None:
        folder = self.run(sites, report=True, save_uploads=True, method="fedavg,client-mean")
        users = [["1", "west"], ["a/b"], ["north"]]
        assert json.loads((folder / "holdings.json").read_text())["users"] == users
        for record in Result.of(folder).clients:
            assert record["users"] == users[record["client"]]
        said = "\n".join(lines_about(folder))
        assert "clients by their users: 0: 1, west; 1: a/b; 2: north\n" in said
        page = (folder / "report.html").read_text()
        assert "(2: north)" in page
        assert "<td>0</td><td>1, west</td>" in page
        assert b"north" not in (folder / "uploads.safetensors").read_bytes()

    def test_clients_are_called_by_name(
        self, sites: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = self.run(sites)

        def printed(*words: str) -> str:
            assert cli.main(list(words)) == 0
            return capsys.readouterr().out

        np.save("rows.npy", np.ones((3, 5), np.float32))
        for name, number in (("north", "2"), ("west", "0"), ("a/b", "1")):
            for command, more in (("evaluate", []), ("predict", ["rows.npy"])):
                each = (
                    printed(command, str(folder), "--client", client, "--method", "local", *more)
                    for client in (name, number)
                )
                assert next(each) == next(each)
            own = Result.of(folder).model(name, "local").network.state_dict()
            same = load_client(folder, int(number), "local").network.state_dict()
            assert all(torch.equal(own[key], same[key]) for key in own)
        for name, file in (("north", "north"), ("a/b", "1")):
            printed("export", str(folder), "--client", name, "--to", "torch")
            assert Path(f"run-fedavg-client-{file}.pt2").is_file()

    def test_a_number_is_a_clients(self, sites: Path, caplog: pytest.LogCaptureFixture) -> None:
        folder = self.run(sites, method="fedavg")
        assert client_called(folder, 1) == 1
        assert "for user" not in caplog.text
        assert client_called(folder, "1") == 1
        assert "client 1 is user a/b; for user 1, give its client's number, 0" in caplog.text
        self.rename(folder, "1", "2019")
        assert (client_called(folder, "2019"), client_called(folder, 2019)) == (0, 0)

    def rename(self, folder: Path, user: str, name: str) -> None:
        text = (folder / "holdings.json").read_text()
        assert f'"{user}"' in text
        (folder / "holdings.json").write_text(text.replace(f'"{user}"', f'"{name}"'))

    def test_a_name_that_is_not_there(
        self, sites: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = self.run(sites, method="fedavg")
        words = ["predict", str(folder), "rows.npy", "--client"]
        assert cli.main([*words, "nroth"]) == 2
        said = "has no client 'nroth'; there are 0 to 2, by their users' names 1, a/b, north, west"
        assert f"{folder}: {said}; did you mean north?\n" in capsys.readouterr().err
        assert cli.main([*words, "3"]) == 2
        assert "has no client 3; there are 0 to 2, by" in capsys.readouterr().err

    def test_runs_without_names(self, sites: Path, capsys: pytest.CaptureFixture[str]) -> None:
        """One whose clients are no users, and one of an earlier version."""
        other = self.run(sites / "other", partition="iid", report=True)
        old = self.run(sites / "old", report=True)
        assert "users" not in json.loads((other / "holdings.json").read_text())
        held = json.loads((old / "holdings.json").read_text())
        del held["users"]
        (old / "holdings.json").write_text(json.dumps(held))
        for folder in (other, old):
            assert cli.main(["evaluate", str(folder), "--client", "2"]) == 0
            assert cli.main(["evaluate", str(folder), "--client", "north"]) == 2
            said = "has no client 'north'; there are 0 to 2\n"
            assert capsys.readouterr().err.endswith(said)
            assert "users" not in "\n".join(lines_about(folder))
            assert "Clients by their users" not in report.write([folder]).read_text()
        assert "users" not in next(iter(Result.of(other).clients))


class TestHome:
    def test_predictions_from_files(self, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
        settings = {"train_per_client": "auto", "test_per_client": "auto", "num_clients": 2}
        folder, _ = federate(here, method="fedavg", dataset="imagefolder:photos", **settings)
        image = "photos/owl/3.png"
        assert cli.main(["predict", str(folder), "--client", "1", "photos", "--to", "json"]) == 0
        rows = {row["example"]: row for row in json.loads(capsys.readouterr().out)}
        assert len(rows) == 90
        assert sum(rows[image]["probabilities"].values()) == pytest.approx(1, abs=1e-4)
        model = load_client(folder, 1)
        pixels = np.asarray(Image.open(image)).transpose(2, 0, 1)[None]
        mine = model.probabilities(pixels)[0]
        assert rows[image]["class"] == model.classes[int(mine.argmax())]
        as_floats = model(torch.from_numpy(pixels / 255).float()).softmax(1)[0]
        assert as_floats.tolist() == pytest.approx(mine.tolist(), abs=1e-5)
        as_doubles = model.probabilities(pixels / 255)[0]
        assert as_doubles.tolist() == pytest.approx(mine.tolist(), abs=1e-5)
        with pytest.raises(DataError, match=r"of shape \[1, 3, 4, .* network takes \[N, 3, "):
            model.probabilities(pixels[:, :, :4])
        with pytest.raises(DataError, match="not finite"):
            model.probabilities(pixels * np.nan)
        assert cli.main(["predict", str(folder), "--client", "1", image, "--to", "csv"]) == 0
        assert capsys.readouterr().out.splitlines()[0] == "example,class,cat,dog,owl"
        words = ["evaluate", str(folder), "--client", "0"]
        assert cli.main([*words, "imagefolder:photos", "--to", "json"]) == 0
        assert json.loads(capsys.readouterr().out)["examples"] == 90

    def test_examples_that_changed_are_read_anew(self, here: Path) -> None:
        folder, _ = federate(here, method="fedavg", num_server_rounds=1)
        pixels = np.zeros((30, 1, 8, 8), np.uint8)
        for counts in ([3] * 10, [2, 4] * 5):  # as in a notebook
            np.savez("mine.npz", x=pixels, y=np.repeat(np.arange(10), counts))
            found = evaluate(folder, 0, dataset="npz:mine.npz")
            assert [of for _, of in found["classes"].values()] == counts

    @pytest.mark.parametrize("classes", [["3"], ["3", "5"]])
    def test_few_examples_are_enough_to_test_on(self, classes: list[str], here: Path) -> None:
        """One class, and one example of each: nothing is learned from them."""
        folder, _ = federate(here, method="fedavg", num_server_rounds=1)
        for name in classes:
            (here / "new" / name).mkdir(parents=True)
            Image.new("L", (8, 8)).save(here / "new" / name / "1.png")
        labels = np.array([int(name) for name in classes])
        np.savez("new.npz", x=np.zeros((len(labels), 1, 8, 8), np.uint8), y=labels)
        for dataset in ("imagefolder:new", "npz:new.npz"):
            found = evaluate(folder, 0, dataset=dataset)
            assert found["examples"] == len(classes)
            assert list(found["classes"]) == classes

    def test_columns_are_known_by_name(self, here: Path, caplog: pytest.LogCaptureFixture) -> None:
        Path("named.py").write_text(
            "import numpy as np\n"
            "def of(*names):\n"
            "    x = np.random.default_rng(0).normal(size=(200, 2)).astype(np.float32)\n"
            "    where = [('a', 'b').index(n) if n in ('a', 'b') else 0 for n in names]\n"
            "    return {'x': x[:, where], 'y': (x[:, 0] > 0).astype(int), 'columns': names}\n"
            "def load(): return of('a', 'b')\n"
            "def turned(): return of('b', 'a')\n"
            "def other(): return of('a', 'c')\n"
        )
        how: dict[str, Any] = {"num_server_rounds": 3, "learning_rate": 0.5, "batch_size": 5}
        how |= {"train_per_client": "auto", "test_per_client": "auto"}
        folder, _ = federate(here, method="fedavg", dataset="named:load", **how)
        right, turned = (evaluate(folder, 0, dataset=f"named:{n}") for n in ("load", "turned"))
        assert right["accuracy"] > 90
        assert turned == right
        assert caplog.text.count("named:load: the run's clients were trained on a part of it") == 1
        with pytest.raises(DataError, match="named:other: has no column 'b'"):
            evaluate(folder, 0, dataset="named:other")
        pandas = pytest.importorskip("pandas")
        model = load_client(folder, 0)
        frame = pandas.DataFrame({"b": [0.1, 0.2], "c": [True, False], "a": [-1, 2.5]})
        wanted = model.probabilities(np.array([[-1, 0.1], [2.5, 0.2]]))
        assert np.array_equal(model.probabilities(frame), wanted)
        assert np.array_equal(
            model.probabilities(frame[["a", "b"]].set_axis([0, 1], axis=1)), wanted
        )
        for odd, said in (
            (frame[["a", "c"]], "the frame: has no column 'b'"),
            (frame.assign(b=["x", "y"]), "the frame holds something else than numbers"),
            (frame.assign(b=[1, None]), "not finite"),
        ):
            with pytest.raises(DataError, match=said):
                model.probabilities(odd)

    def test_examples_of_another_kind_are_refused(self, here: Path) -> None:
        folder, _ = federate(here, method="fedavg", num_server_rounds=1)
        model, pixels = load_client(folder, 0), np.full((8, 1, 8, 8), 200, np.uint8)
        kinds = (np.int64, np.uint16, np.float32)
        for other in (*map(pixels.astype, kinds), pixels / -255):
            with pytest.raises(DataError, match="images must be uint8 from 0 to 255, or floats"):
                model.probabilities(other)
        np.savez("whole.npz", x=pixels.astype(np.int64), y=[0, 1] * 4)
        np.savez("grey.npz", x=pixels, y=[0, 1] * 4)
        grey = evaluate(folder, 0, dataset="npz:grey.npz")
        assert grey["examples"] == 8
        np.savez("colour.npz", x=pixels.repeat(3, axis=1), y=[0, 1] * 4)  # as predict takes them
        assert evaluate(folder, 0, dataset="npz:colour.npz") == grey
        with pytest.raises(DataError, match=r"of another kind .*: whole numbers, .* takes images"):
            evaluate(folder, 0, dataset="npz:whole.npz")
        np.save("whole.npy", pixels.astype(np.int64))
        words = ["predict", str(folder), "--client", "0", "whole.npy"]
        assert cli.main(words) == 2

    @pytest.mark.parametrize("adjust", [False, True])
    def test_a_client_that_joined_has_what_it_was_evaluated_with(
        self, here: Path, adjust: bool
    ) -> None:
        methods = "local,fedavg,client-mean,fedper,fedala,ditto,scaffold,cfl,pfedhn,pfedgpa"
        how: dict[str, Any] = {"num_server_rounds": 3, "join_clients": 2, "num_clients": 5}
        how |= {"join_iterations": 2, "learning_rate": 0.05, "logit_adjustment": adjust}
        folder, _ = federate(here, method=methods, **how)
        for method in methods.split(","):
            mine = [r for r in records(folder, "joining.jsonl") if r["method"] == method]
            told = [r for r in mine if r["iteration"] == 2]
            told += [
                {"client": r["client"], "accuracy": r["before_ft"]}
                for r in records(folder, "clients.jsonl")
                if r["method"] == method
            ]
            assert {r["client"] for r in told} == set(range(5))
            for record in told:
                again = evaluate(folder, record["client"], method)["accuracy"]
                assert again == pytest.approx(record["accuracy"], abs=1e-9), (method, record)

    def test_what_a_client_that_joined_had_was_not_kept_once(self, here: Path) -> None:
        folder, _ = federate(here, method="fedavg", num_server_rounds=1, join_clients=1)
        file = folder / "weights" / "fedavg.safetensors"
        common = {name: t for name, t in load_file(file).items() if name.startswith("global/")}
        save_file(common, file)  # as an earlier version did
        assert load_client(folder, 2)
        with pytest.raises(ConfigError, match="client 3 joined after the last round"):
            load_client(folder, 3)

    def test_a_client_that_took_no_part_is_told_so(
        self, here: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        how: dict[str, Any] = {"num_server_rounds": 1, "fraction_train": 0.25}
        folder, _ = federate(here, method="client-mean,fedavg", **how)
        [here_was] = {r["client"] for r in records(folder, "metrics.jsonl") if r["participated"]}
        evaluate(folder, here_was, "client-mean")
        absent = (here_was + 1) % 4
        evaluate(folder, absent, "fedavg")
        assert "took no part" not in caplog.text
        # it has what its accuracy in the table is of
        [told] = [
            r["before_ft"]
            for r in records(folder, "clients.jsonl")
            if (r["method"], r["client"]) == ("client-mean", absent)
        ]
        found = evaluate(folder, absent, "client-mean")
        assert found["accuracy"] == pytest.approx(told, abs=1e-9)
        assert f"client {absent} took no part: client-mean sent it the weights" in caplog.text
        file = folder / "weights" / "client-mean.safetensors"
        save_file(load_file(file), file)  # as an earlier version did, without the clients' numbers
        with pytest.raises(ConfigError, match=f"client {absent} took no part, so client-mean"):
            evaluate(folder, absent, "client-mean")

    def test_what_cannot_be_predicted_is_refused(
        self, here: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, _ = federate(here, method="fedavg", num_server_rounds=1)
        Image.fromarray(np.zeros((9, 9), np.uint8)).save("other.png")
        Path("broken.png").write_bytes(b"no image")
        for place, said in (
            ("other.png", "is 1×9×9, but the network takes 1×8×8: resize it"),
            ("broken.png", "cannot be read as an image"),
            ("nowhere.png", "does not exist"),
        ):
            assert cli.main(["predict", str(folder), "--client", "0", place]) == 2
            assert said in capsys.readouterr().err
        assert cli.main(["predict", str(folder), "--client", "0", "--resize", "other.png"]) == 0
        model = load_client(folder, 0)
        model.network.register_forward_pre_hook(lambda *_: [][0])  # as an embedding of few words
        with pytest.raises(DataError, match="cannot take these examples: IndexError: list index"):
            model.probabilities(np.zeros((1, 1, 8, 8), np.uint8))
        assert cli.main(["predict", str(folder), "--client", "4", "other.png"]) == 2
        assert "has no client 4; there are 0 to 3" in capsys.readouterr().err
        words = ["predict", str(folder), "--client", "0", "--method", "fedper", "other.png"]
        assert cli.main(words) == 2
        assert "has no weights of 'fedper'" in capsys.readouterr().err
        (folder / "weights").rename("put away")
        assert cli.main(["predict", str(folder), "--client", "0", "other.png"]) == 2
        assert "its run had save-weights=false, or failed" in capsys.readouterr().err
        with locked(folder, "taken"):  # as a run does that goes on
            assert cli.main(["predict", str(folder), "--client", "0", "other.png"]) == 2
        assert "its run is still going, and none of its methods is done" in capsys.readouterr().err
        Path("put away").rename(folder / "weights")
        assert cli.main(["predict", "photos", "--client", "0", "other.png"]) == 2
        assert "is not a run's folder" in capsys.readouterr().err
        for place, said in (
            ("labels.csv", "labels.csv: labelled data are given as npz:FILE with the arrays x"),
            ("new.npz", "new.npz: labelled arrays are given as npz:new.npz, with x and y"),
            ("photos", "photos: labelled images are given as imagefolder:photos, with a folder"),
        ):
            Path(place).touch()
            assert cli.main(["evaluate", str(folder), "--client", "0", place]) == 2
            assert f"pfedgpa: {said}" in capsys.readouterr().err
        for command in ("predict . --client 0 other.png", "inspect .", "export-metrics . --to"):
            words = [*command.split(), *(["tensorboard"] if command.endswith("--to") else [])]
            assert cli.main(words) == 2
            said = "is not a run's folder, but holds runs: name one of run\n"
            assert said in capsys.readouterr().err, command
        assert cli.main(["evaluate", str(folder), "--client", "0", "imagefolder:photos"]) == 2
        assert "has examples of shape [3, 16, 16]" in capsys.readouterr().err

    @pytest.mark.parametrize("to", ["torch", "onnx"])
    @pytest.mark.parametrize("network", ["auto", "nets:Counted"])
    def test_an_exported_network_says_the_same(self, here: Path, network: str, to: str) -> None:
        if to == "onnx":
            pytest.importorskip("onnxscript", reason="needs pip install 'pfedgpa-app[onnx]'")
            onnxruntime = pytest.importorskip("onnxruntime")
        (here / "nets.py").write_text(NETS)
        folder, _ = federate(here, method="fedavg", model=network, num_server_rounds=1)
        model, file = load_client(folder, 2), here / f"network.{to}"
        x = torch.rand(5, 1, 8, 8)
        export(model, to, file)
        if to == "onnx":
            session = onnxruntime.InferenceSession(file)
            [logits] = session.run(None, {"examples": x.numpy()})
            classes = session.get_modelmeta().custom_metadata_map["classes"]
        else:
            extra = {"classes": ""}
            logits = torch.export.load(file, extra_files=extra).module()(x).detach().numpy()
            classes = extra["classes"]
        assert json.loads(classes) == list(model.classes)
        np.testing.assert_allclose(logits, model(x).detach().numpy(), atol=1e-5)


def test_words_of_settings_from_python() -> None:
    words = list(api._words({"num_server_rounds": 3, "method": ["a", "b"], "pfedgpa": {"rank": 2}}))
    assert words == ["num-server-rounds=3", "method=a,b", "pfedgpa.rank=2"]
    assert list(api._words({"augment": True, "model": photos})) == [
        "augment=true",
        f"model={__name__}:photos",
    ]
    numbers = {"report": np.bool_(False), "seed": np.int64(3), "method": np.array(["a", "b"])}
    assert list(api._words(numbers)) == ["report=false", "seed=3", "method=a,b"]
    assert list(api._words({"method": (name for name in "ab")})) == ["method=a,b"]


@pytest.mark.parametrize("name", ["x seed=5", 'a "b" seed=5 c', "plain", "two words", '"'])
def test_a_text_from_python_is_one_setting(name: str) -> None:
    given = {"run_name": name, "data_dir": "d", "seed": 3}
    there = {"run-name": name, "data-dir": "d", "seed": 3}
    assert parse_overrides(list(api._words(given))) == there


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model": functools.partial(print)}, "model: partial is defined here"),
        ({"model": lambda: 0}, r"model: .*<lambda> is defined here"),
        (
            {"dataset": (np.zeros(3), np.zeros(3))},
            "dataset: cannot be of type tuple; give data",
        ),
        ({"dataset": np.zeros(3)}, "dataset: cannot be of type ndarray; give data"),
    ],
)
def test_what_has_no_name_is_refused_from_python(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        list(api._words(settings))


@pytest.mark.parametrize("client", ["4", None, 1.0, True, -1])
def test_clients_are_numbers(client: Any, here: Path) -> None:
    folder, _ = federate(here, method="fedavg", num_server_rounds=1)
    with pytest.raises(ConfigError, match=r"has no client .*; there are 0 to 3"):
        client_weights(folder, client)
    assert client_weights(folder, cast(Any, np.int64(1))).keys() == client_weights(folder, 1).keys()


def test_another_methods_weights_are_not_taken_without_a_word(
    here: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = federate(here, method="fedavg,client-mean", num_server_rounds=1)
    client_weights(folder, 0)
    assert "using those of" not in caplog.text
    (folder / "weights" / "client-mean.safetensors").unlink()
    client_weights(folder, 0)
    assert "the weights of client-mean are no longer there; using those of" in caplog.text


READS_FILES = """
from pathlib import Path
import numpy as np
from torch import nn
HIDDEN = int(Path("hidden.txt").read_text())
def load():
    rows = np.loadtxt("rows.csv", delimiter=",")
    return {"x": rows[:, 1:], "y": rows[:, 0].astype(int)}
def build(classes, shape):
    assert Path("hidden.txt").is_file()
    return nn.Sequential(nn.Linear(*shape, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, classes))
"""


def test_own_code_finds_its_files_where_flowers_processes_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """These have a folder of their own."""
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    for folder in (mine, theirs):
        folder.mkdir()
    (mine / "reading.py").write_text(READS_FILES)
    (mine / "hidden.txt").write_text("5")
    rows = np.random.default_rng(0).random((60, 4))
    np.savetxt(mine / "rows.csv", np.c_[np.arange(60) % 2, rows], delimiter=",")
    monkeypatch.chdir(mine)
    env = Simulation().env
    monkeypatch.chdir(theirs)
    for name in env.keys() - os.environ.keys():
        monkeypatch.setenv(name, env[name])
    config = Config(dataset="reading:load", model="reading:build", code_dir=str(mine))
    data = load_dataset(config)
    assert data.train_images.shape == (48, 4)
    assert weights_of(network_of(config, schema_of(data)))["0.weight"].shape == (5, 4)
    assert Path.cwd() == theirs


def test_weights_of_which_a_part_is_on_nodes_are_refused(
    here: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a deployment clients write nothing to the server's folder."""
    monkeypatch.setattr(experiment, "is_simulated", lambda grid: False)
    part = ["local", "fedper", "lg-fedavg", "fedala", "fedproto", "ditto", "pfedme", "fedfomo"]
    whole = ["fedavg", "scaffold", "fedbabu", "pfedgpa"]
    methods = ",".join([*whole, *part])
    folder, _ = federate(here / "own", method=methods, num_server_rounds=2, num_clients=3)
    for method in part:
        with pytest.raises(ConfigError, match=f"clients of {method} keep a part"):
            load_client(folder, 0, method)
    right = {(r["method"], r["client"]): r["before_ft"] for r in records(folder, "clients.jsonl")}
    for method in whole:
        found = evaluate(folder, 0, method)
        assert 100 * found["correct"] / found["examples"] == right[method, 0]
    assert client_weights(folder, 0).keys() == client_weights(folder, 0, "pfedgpa").keys()
    assert "fedfomo keep a part" in caplog.text
    assert "using those of pfedgpa" in caplog.text
    adjusted, _ = federate(here / "adjusted", method="fedavg", logit_adjustment=True)
    with pytest.raises(ConfigError, match="clients of fedavg keep a part"):
        load_client(adjusted, 0)


@pytest.mark.slow
def test_the_documents_commands_from_an_empty_folder(here: Path) -> None:
    """Every command and file of docs/own.md, two rounds of each run."""
    text = (APP_DIR / "docs" / "own.md").read_text()
    for name, code in re.findall(r"`(\w+\.(?:py|csv))`:\n\n```\w*\n(.*?)```", text, re.DOTALL):
        (here / name).write_text(code)
    extra = "".join(f"{kind}/{j}.png,{j % 2}\n" for kind in ("cat", "dog") for j in range(30))
    (here / "mine.csv").write_text(f"sample,client\n{extra}")
    (here / "more").mkdir()
    digit = Image.fromarray(RNG.integers(0, 255, (8, 8)).astype(np.uint8))
    digit.save(here / "new.png")
    digit.save(here / "more" / "1.png")
    blocks = re.findall(r"```\n(pfedgpa .*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0].strip() for block in blocks for line in block.splitlines()]
    assert len(lines) > 7
    for line in lines:
        words = shlex.split(line)
        if words[1] == "run":
            words += ["num-server-rounds=2", "method=fedavg"] if "method=" not in line else []
            words = [w for w in words if not w.startswith("num-server-rounds=1")]
            words += [] if "num-server-rounds=2" in words else ["num-server-rounds=2"]
        status, said = in_a_new_process(words[1:], here)
        assert status == 0, f"{line}\n{said[-4000:]}"
