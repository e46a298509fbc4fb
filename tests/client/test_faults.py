"""A network that fails is named, wherever it fails, and not the method that trains it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfedgpa_app import cli
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import TrainingSettings
from pfedgpa_app.core.settings import DataError
from pfedgpa_app.methods.contract import MethodError
from pfedgpa_app.models import build
from pfedgpa_app.models.faults import NetworkError
from pfedgpa_app.runs.about import About
from pfedgpa_app.runs.personal import ClientModel
from tests.support.federations import federate, known_for_a_while, records

FAILING = '''
import numpy as np
import torch
from torch import nn
from pfedgpa_app.methods.averaging import Averaging


def mended(x):
    if len(x) > 2:
        raise ValueError("so many\\nat once") from KeyError("x")
    return x


class Net(nn.Module):
    """Fails on more than the two examples with which networks are tried."""

    def __init__(self, classes, shape, when):
        super().__init__()
        self.when = when
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

    def forward(s, x):
        return s.layers(mended(x) if self_trains(s) == s.when else x)


def self_trains(net):
    return net.training


class Inner(nn.Sequential):
    """Fails inside torch."""

    def forward(self, x):
        return super().forward(x if len(x) < 3 else x[:, :, 1:])


def training(classes, shape):
    return Net(classes, shape, True)


def testing(classes, shape):
    return Net(classes, shape, False)


def inside(classes, shape):
    return nn.Sequential(Inner(nn.Flatten(), nn.Linear(64, 16)), nn.Linear(16, classes))


class Words(nn.Module):
    """An embedding for every place of an example."""

    def __init__(self, classes, rows=(5, 200)):
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(n, 8) for n in rows)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        return self.head(sum(embed(x[:, i]) for i, embed in enumerate(self.embeddings)))


def words(classes, shape):
    return Words(classes)


def texts(first=7, last=199):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 5, (400, 2))
    x[5:, 0] = np.where(rng.random(395) < 0.2, first, x[5:, 0])
    x[:5] = 0, last
    return {"x": x, "y": np.arange(400) % 4}


def below():
    return texts(first=-1)


def beyond():
    return texts(first=0, last=5000)


class FedStrict(Averaging):
    @classmethod
    def train(cls, task):
        loss = nn.CrossEntropyLoss()
        return loss(torch.zeros(3, 4), torch.zeros(2, dtype=torch.long))
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "failing", raising=False)
    (tmp_path / "failing.py").write_text(FAILING)
    build._template.cache_clear()
    return tmp_path


def line_of(text: str) -> int:
    return next(i for i, line in enumerate(FAILING.splitlines(), 1) if text in line)


@pytest.mark.parametrize(
    ("model", "said", "line"),
    [
        ("training", "ValueError: so many at once", "raise ValueError"),
        ("testing", "ValueError: so many at once", "raise ValueError"),
        ("inside", "RuntimeError: mat1 and mat2 shapes cannot be multiplied", "super().forward(x"),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "scaffold"])
def test_its_error_is_said_with_its_file_and_line(
    here: Path, model: str, said: str, line: str, method: str
) -> None:
    model = f"failing:{model}"
    with pytest.raises(NetworkError) as caught:
        federate(here, model=model, method=method, evaluate_every=0)
    text = str(caught.value)
    assert text.startswith(f"network {model} failed: {said}")
    assert text.endswith(f"(failing.py, line {line_of(line)})")
    last = records(here / "run", "events.jsonl")[-1]
    assert last["text"] == text
    assert "ClientError: at a client" in last["traceback"]
    assert "in forward" in last["traceback"]


def test_the_tokens_that_its_client_has_are_said(here: Path) -> None:
    how: dict[str, Any] = {"dataset": "failing:texts", "test_share": 0.3, "partition": "iid"}
    with pytest.raises(NetworkError, match="index out of range in self") as caught:
        federate(here, model="failing:words", method="fedavg", **how)
    assert "; the tokens of client 0 run from 0 to " in str(caught.value)


@pytest.mark.parametrize(("data", "held"), [("below", "-1 to 199"), ("beyond", "0 to 5000")])
def test_tokens_that_it_does_not_know_are_refused_in_time(
    here: Path, data: str, held: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", f"dataset=failing:{data}", "model=failing:words", "method=fedavg"]
    assert cli.main([*words, "run-name=run"]) == 2
    err = capsys.readouterr().err
    assert f"'failing:words': fails on the data's tokens, which run from {held}: IndexError" in err
    assert f"(failing.py, line {line_of('enumerate(self.emb')})" in err
    assert not (here / "results" / "run").exists()


def test_tokens_to_predict_that_it_does_not_know(here: Path) -> None:
    schema = Schema("texts", tuple("abcd"), (2,), tokens=True)
    network = build.network_of(TrainingSettings(model="failing:words", code_dir=str(here)), schema)
    about = About(schema, "failing:words", "", 0, str(here), 0)
    said = rf"index out of .* \(failing.py, line {line_of('enumerate(self.emb')}\); .* from -1 to 7"
    with pytest.raises(DataError, match=said):
        ClientModel(network, about).probabilities(np.array([[1, 7], [-1, 3]]))


def test_a_methods_own_modules_are_not_the_network(here: Path) -> None:
    with known_for_a_while("fedstrict"), pytest.raises(MethodError, match="its train failed"):
        federate(here, method="failing:FedStrict")


@pytest.mark.slow
def test_debug_shows_where_a_client_failed(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["run", "model=failing:training", "method=fedavg", "num-clients=4", "engine=process"]
    assert cli.main([*words, "workers=1", "--debug"]) == 1
    err = capfd.readouterr().err
    assert f'failing.py", line {line_of("raise ValueError")}, in mended' in err
    assert "pfedgpa: the run failed: network failing:training failed: ValueError: so many" in err
