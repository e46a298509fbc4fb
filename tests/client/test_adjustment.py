"""Logit adjustment: what a client's class frequencies explain, the shared classifier need not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import nn

from pfedgpa_app import load_client
from pfedgpa_app.client.adjustment import adjusted, log_frequencies
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.schema import Schema
from pfedgpa_app.core.sections import Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.data.client import load_client as load_data
from pfedgpa_app.methods import METHODS, federation_of
from pfedgpa_app.models import build
from pfedgpa_app.models.build import classifier_bias
from pfedgpa_app.runs.personal import client_weights
from pfedgpa_app.training.evaluation import evaluate
from tests.support.federations import federate, records

OWN_ROUNDS = [m for m in METHODS if federation_of(m) == m]
BIAS = "fc2.bias"  # of the digits' network
PERSONAL_HEADS = ("local", "fedper", "fedrep", "fedbabu", "fedproto", "fedfomo")
ON: dict[str, Any] = {"logit_adjustment": True}


def bias_of(message: Message) -> torch.Tensor | None:
    arrays = message.content.array_records["arrays"].to_torch_state_dict()
    return arrays.get(BIAS)


def test_frequencies() -> None:
    """Of two, one and no examples, half an example more each: 2.5, 1.5 and 0.5."""
    found = log_frequencies(torch.tensor([0, 1, 0]), 3)
    assert float(found[0] - found[1]) == pytest.approx(math.log(2.5 / 1.5))
    assert float(found[1] - found[2]) == pytest.approx(math.log(1.5 / 0.5))
    assert float(found.sum()) == pytest.approx(0, abs=1e-6)


def test_only_the_classifiers_bias_is_adjusted() -> None:
    by = torch.tensor([1.0, -1.0])
    names = ["fc.bias", "0/fc.bias", "control/fc.bias", "a.fc.bias", "fc.weight"]
    before = {name: torch.zeros(2) for name in names}
    after = adjusted(before, {"fc.bias": by})
    assert [n for n in names if after[n] is not before[n]] == names[:1]
    back = adjusted(after, {"fc.bias": -by})
    assert all(torch.equal(back[name], before[name]) for name in names)


@pytest.mark.parametrize("method", OWN_ROUNDS)
def test_frequencies_stay_with_their_client(method: str, tmp_path: Path) -> None:
    """At a rate that teaches nothing, whatever of the classifier is uploaded is as it was sent.

    Its frequencies move it by more than one where they are not taken off again.
    """
    moved: list[float] = []

    def watch(message: Message, reply: Message) -> Message:
        if message.metadata.message_type == "train":
            sent, came = bias_of(message), bias_of(reply)
            if sent is not None and came is not None:
                moved.append(float((came - sent).abs().max()))
        return reply

    on = ON | ({"krum.malicious": 1} if method == "krum" else {})  # of four clients
    how: dict[str, Any] = on | {"num_server_rounds": 1, "learning_rate": 1e-9}
    folder, _ = federate(tmp_path, watch, method=method, **how)
    config = resolve({}).config
    by = log_frequencies(load_data(config, 0).train.labels, 10)
    assert float(by.abs().max()) > 1
    assert bool(moved) == (method not in PERSONAL_HEADS), method
    assert all(step < 0.2 for step in moved)
    told = any(
        "logit-adjustment has no effect" in e["text"] for e in records(folder, "events.jsonl")
    )
    assert told == (method in PERSONAL_HEADS), method


@pytest.mark.parametrize("method", PERSONAL_HEADS)
def test_personal_classifiers_go_without(method: str, tmp_path: Path) -> None:
    how: dict[str, Any] = {"method": method, "num_server_rounds": 2, "save_weights": True}
    with_them, without = (
        federate(tmp_path / str(on), logit_adjustment=on, **how)[0] for on in (True, False)
    )
    assert records(with_them, "clients.jsonl") == records(without, "clients.jsonl")
    for client in range(4):
        one, other = (client_weights(folder, client) for folder in (with_them, without))
        assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_a_federation_that_goes_by_frequencies_learns_otherwise(tmp_path: Path) -> None:
    """Its clients' first steps are from a classifier that knows them: their losses are smaller."""
    how = {"method": "fedavg", "num_server_rounds": 1, "learning_rate": 1e-6}
    with_them, without = (
        [
            r["train_loss"]
            for r in records(federate(tmp_path / str(on), logit_adjustment=on, **how)[0])
        ]
        for on in (True, False)
    )
    assert all(a < b - 0.1 for a, b in zip(with_them, without, strict=True))


@pytest.mark.parametrize(
    "method", ["fedavg", "client-mean", "fedper", "fedala", "ditto", "pfedgpa"]
)
def test_what_a_client_takes_home_is_what_it_used(method: str, tmp_path: Path) -> None:
    folder, _ = federate(tmp_path, method=method, **ON)
    config = resolve({"num-clients": 4, "train-per-client": 60, "test-per-client": 40}).config
    told = [r for r in records(folder, "clients.jsonl") if r["method"] == method]
    for client, record in enumerate(told):
        model = load_client(folder, client, method)
        score = evaluate(model.network, load_data(config, client).test)
        assert record["client"] == client
        accuracy = 100 * score.correct / score.images
        assert accuracy == pytest.approx(record["before_ft"], abs=1e-3)


def test_one_federations_methods_have_classifiers_of_their_own(tmp_path: Path) -> None:
    folder, _ = federate(tmp_path, method="fedavg,client-mean", **ON)
    one, other = (client_weights(folder, 0, m)[BIAS] for m in ("fedavg", "client-mean"))
    assert not torch.equal(one, other)


def test_a_network_without_such_a_bias_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    without = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
    frozen = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.Linear(2, 2).requires_grad_(False))
    for network, said in (
        (without, r"\(Linear\) has none"),
        (frozen, "uses 2 after 1: train that"),
    ):
        monkeypatch.setattr(build, "_made", lambda *_, network=network: network)
        schema = Schema(said, ("a", "b"), (1, 2, 2))
        with pytest.raises(ConfigError, match=f"logit-adjustment = true: .* {said}"):
            classifier_bias(Config(model="any"), schema)
