"""Malicious clients, and what keeps them out."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Message
from torch import Tensor

from pfedgpa_app.client.attacks import malicious_upload
from pfedgpa_app.client.request import held_by
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.sections import ATTACKS, Config
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.averaging import Shared
from pfedgpa_app.methods.krum import Krum, malicious
from pfedgpa_app.methods.trimmed_mean import TrimmedMean
from pfedgpa_app.results.log import rounds_of
from pfedgpa_app.results.tables import text_table
from pfedgpa_app.results.tracking import figures_of
from pfedgpa_app.runs import report
from pfedgpa_app.server.screening import too_far, too_large
from tests.support.federations import federate, records, summary, train_messages


def config(**settings: Any) -> Config:
    return resolve({name.replace("_", "-"): value for name, value in settings.items()}).config


def uploads(*values: float) -> dict[int, Upload]:
    return {i: Upload({"w": torch.tensor([x, 0.0])}, 10) for i, x in enumerate(values)}


class TestAttacks:
    def test_who(self) -> None:
        found = config(attack="scale", malicious_share=0.3, num_clients=10).malicious_clients
        assert len(found) == 3
        assert (
            found == config(attack="noise", malicious_share=0.3, num_clients=10).malicious_clients
        )
        others = [
            config(attack="scale", num_clients=10, seed=s).malicious_clients for s in range(9)
        ]
        assert len(set(others)) > 1
        assert not config(num_clients=10).malicious_clients

    def test_what_they_upload(self) -> None:
        """w = (1, 2) was trained to (2, 4): Δ = (1, 2), s = 3."""
        sent, trained = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([2.0, 4.0])}
        trained["own"] = torch.ones(1)

        def upload(kind: str) -> list[float]:
            chosen = config(attack=kind, attack_strength=3.0)
            generator = torch.Generator().manual_seed(0)
            found = malicious_upload(chosen, trained, sent, generator)
            assert torch.equal(found["own"], torch.ones(1))
            return list(found["w"].tolist())

        assert upload("sign-flip") == [-2.0, -4.0]
        assert upload("scale") == [4.0, 8.0]
        assert upload("label-flip") == upload("none") == [2.0, 4.0]
        eps = torch.randn(2, generator=torch.Generator().manual_seed(0))
        # ‖Δ‖/√P = √(5/2)
        expected = torch.tensor([2.0, 4.0]) + 3 * 2.5**0.5 * eps
        assert upload("noise") == pytest.approx(expected.tolist())

    def test_flipped_labels(self) -> None:
        honest = config(num_clients=4, train_per_client=60)
        flipped = replace(honest, attack="label-flip", malicious_share=0.25)
        [bad] = flipped.malicious_clients
        for client in range(4):
            theirs, ours = held_by(flipped, client), held_by(honest, client)
            expected = 9 - ours.train.labels if client == bad else ours.train.labels
            assert torch.equal(theirs.train.labels, expected)
            assert torch.equal(theirs.train.pixels, ours.train.pixels)
            assert torch.equal(theirs.test.labels, ours.test.labels)

    @pytest.mark.parametrize("attack", [a for a in ATTACKS if a != "none"])
    def test_only_honest_clients_count(self, attack: str, tmp_path: Path) -> None:
        how = {"attack": attack, "malicious_share": 0.25, "num_server_rounds": 2}
        folder, grid = federate(tmp_path, method="fedavg,fedper", **how)
        [bad] = config(num_clients=4, **how).malicious_clients
        assert {r["client"] for r in records(folder, "clients.jsonl")} == set(range(4)) - {bad}
        evaluated = {r["client"] for r in records(folder) if r["accuracy"] is not None}
        assert evaluated == set(range(4)) - {bad}
        trained = {m.content.config_records["config"]["client"] for m in train_messages(grid)}
        assert trained == set(range(4))
        assert set(summary(folder)) == {"fedavg", "fedper"}
        [told] = [e for e in records(folder, "events.jsonl") if e["kind"] == "attack"]
        assert told["clients"] == [bad]
        assert attack in told["text"]
        assert f"by 1 of 4 clients ({bad})" in told["text"]
        assert ("strength 4" in told["text"]) == (attack != "label-flip")
        assert told["text"] in report.write([folder]).read_text()

    @pytest.mark.parametrize("method", ["fedper", "fedfomo", "fedproto", "scaffold", "pfedhn"])
    def test_every_methods_uploads_are_attacked(self, method: str, tmp_path: Path) -> None:
        """Also those of weights that clients were never sent."""
        sent: dict[str, dict[int, dict[str, Tensor]]] = {"none": {}, "scale": {}}
        for attack, by_client in sent.items():

            def watch(
                message: Message, reply: Message, by_client: dict[int, Any] = by_client
            ) -> Message:
                if message.metadata.message_type == "train":
                    client: Any = message.content.config_records["config"]["client"]
                    arrays = reply.content.array_records["arrays"]
                    by_client[client] = arrays.to_torch_state_dict()
                return reply

            how = {"attack": attack} | ({"malicious_share": 0.25} if attack != "none" else {})
            how |= {"num_server_rounds": 1, "method": method, "max_upload_norm": 0.0}
            federate(tmp_path / attack, watch, **how)
        [bad] = config(num_clients=4, attack="scale", malicious_share=0.25).malicious_clients
        for client, honest in sent["none"].items():
            same = all(torch.equal(t, sent["scale"][client][name]) for name, t in honest.items())
            assert same == (client != bad)

    def test_who_is_left_out_by_design(self, tmp_path: Path) -> None:
        """Malicious clients and those that join are not evaluated, and nothing went wrong."""
        how: dict[str, Any] = {"method": "fedavg", "num_server_rounds": 1, "num_clients": 5}
        folder, _ = federate(tmp_path / "joining", join_clients=1, **how)
        table = (folder / "table.md").read_text()
        assert "cover 4 of 5 clients: the clients that were there from the start." in table
        assert "could not be evaluated" not in table
        how |= {"attack": "scale", "malicious_share": 0.25, "join_clients": 1}
        folder, _ = federate(tmp_path / "attacked", **how)
        table = (folder / "table.md").read_text()
        assert "cover 3 of 5 clients: the honest clients that were there from the start." in table
        assert "could not be evaluated" not in table
        row = summary(folder)["fedavg"] | {"clients_evaluated": 2}  # had one not answered
        assert "FedAvg: figures cover 2 of 3 honest clients that were there" in text_table([row])

    @pytest.mark.parametrize(
        ("method", "stays", "changes"),
        [("scaffold", "control/", "0."), ("fedproto", "counts", "means")],
    )
    @pytest.mark.parametrize("attack", ["sign-flip", "scale"])
    def test_what_is_no_trained_weight_is_left(
        self, method: str, stays: str, changes: str, attack: str, tmp_path: Path
    ) -> None:
        """A control variate's change or a number of images, taken for weights, is another attack.

        In round 2, when what clients are sent of them is not nought.
        """
        sent: dict[str, dict[str, Tensor]] = {}
        [bad] = config(attack=attack, malicious_share=0.25, num_clients=4).malicious_clients

        def watch(message: Message, reply: Message, run: str) -> Message:
            asked: Any = message.content.config_records["config"]
            training = message.metadata.message_type == "train"
            if training and (asked["client"], asked["round"]) == (bad, 2):
                sent[run] = reply.content.array_records["arrays"].to_torch_state_dict()
            elif training and asked["round"] == 1 and asked["client"] == bad:
                reply.content.metric_records["metrics"][
                    "num-examples"
                ] = -1  # which is refused: alike in both
            return reply

        how = {"num_server_rounds": 2, "method": method, "max_upload_norm": 0.0}
        for run, more in {"honest": {}, "attacked": {"attack": attack}}.items():
            given = how | more | ({"malicious_share": 0.25} if more else {})
            federate(tmp_path / run, partial(watch, run=run), **given)
        left, changed = (
            [name for name in sent["honest"] if name.startswith(start)]
            for start in (stays, changes)
        )
        same = {n: torch.equal(sent["honest"][n], sent["attacked"][n]) for n in left + changed}
        assert left
        assert all(same[name] for name in left)
        assert not any(same[name] for name in changed)

    def test_losses_that_are_told_are_of_honest_clients(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"malicious_share": 0.25, "attack": "label-flip"}
        folder, _ = federate(tmp_path, method="fedavg", num_server_rounds=3, **how)
        [bad] = config(num_clients=4, **how).malicious_clients
        told = [e["loss"] for e in records(folder, "events.jsonl") if e["kind"] == "round"]
        rounds = rounds_of(folder)["fedavg"]
        for number, loss in enumerate(told, start=1):
            assert figures_of(rounds[number])["loss/train"] == pytest.approx(loss)
            of = [r for r in records(folder) if r["round"] == number and r["client"] != bad]
            assert loss == pytest.approx(sum(r["train_loss"] for r in of) / 3)

    def test_flipped_labels_have_no_strength(self, tmp_path: Path) -> None:
        folder, _ = federate(
            tmp_path,
            method="fedavg",
            num_server_rounds=1,
            attack="label-flip",
            malicious_share=0.25,
            attack_strength=8.0,
        )
        said = [e["text"] for e in records(folder, "events.jsonl")]
        assert "attack-strength has no effect: attack = label-flip has no strength" in said


class TestDefences:
    def test_distance_to_the_median(self) -> None:
        """Median of 0, 1, 2, 3, 100 is 2: distances 2, 1, 0, 1, 98, whose median is 1."""
        found = too_far(uploads(0, 1, 2, 3, 100), 2.5)
        assert set(found) == {4}
        assert "98 times" in found[4]
        assert set(too_far(uploads(0, 1, 2, 3, 100), 1.5)) == {0, 4}
        assert not too_far(uploads(0, 1, 2, 3, 100), 0.0)
        assert not too_far(uploads(0, 100), 2.5)
        assert not too_far(uploads(5, 5, 5, 6), 2.5)  # most are alike: nothing is usual

    def test_the_median_of_an_even_number_is_between_the_middle_two(self) -> None:
        """Of 0, 0.1, 1, 1.1 it is 0.55, from which all are some 0.5; of 0, 1, 1, 4 it is 1.

        The distances from that, 1, 0, 0, 3, have the median 0.5.
        """
        assert not too_far(uploads(0, 0.1, 1, 1.1), 2.5)
        assert set(too_far(uploads(0, 1, 1, 4), 2.5)) == {3}
        assert set(too_far(uploads(0, -1, -1, -4), 2.5)) == {3}

    def test_what_is_no_trained_weight_makes_nobody_far_or_large(self) -> None:
        """Control variates' changes differ by far more than weights do."""
        every = {
            i: Upload({"w": torch.tensor([float(i)]), "control/w": torch.tensor([10.0**i])}, 10)
            for i in range(5)
        }
        assert set(too_far(every, 2.5)) == {3, 4}
        assert not too_far(every, 2.5, ("control/",))
        assert set(too_large(every, every[0].weights, 5)) == {3, 4}
        assert not too_large(every, every[0].weights, 5, ("control/",))

    def test_clients_that_send_no_weights_are_not_far(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="local", max_distance=2.5, num_server_rounds=1)
        assert all(record["participated"] for record in records(folder))

    def test_refused_attackers_have_no_part(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"malicious_share": 0.2, "num_clients": 5, "attack_strength": 50.0}
        how |= {"method": "fedavg,pfedgpa", "attack": "sign-flip", "max_distance": 3.0}
        folder, _ = federate(tmp_path, **how)
        [bad] = config(attack="scale", malicious_share=0.2, num_clients=5).malicious_clients
        took_part = {r["client"] for r in records(folder) if r["participated"]}
        assert took_part == set(range(5)) - {bad}
        texts = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert len(texts) == 2 * 4
        assert all(f"client {bad} sent weights" in text for text in texts)

    def test_krum_by_hand(self) -> None:
        """Uploads 0, 1, 3, 9, 10 with f = 1: each counts its 5 − 1 − 2 = 2 nearest.

        Scores 1 + 9, 1 + 4, 4 + 9, 1 + 36, 1 + 49: client 1. The mean of the best two: 0.5.
        """
        for select, expected in ((1, 1.0), (2, 0.5)):
            settings = {"method": "krum", "krum.malicious": 1, "krum.select": select}
            krum = Krum(resolve(settings).config, Shared({"w": torch.zeros(2)}))
            krum.aggregate(1, uploads(0, 1, 3, 9, 10))
            assert krum.state.global_weights["w"].tolist() == [expected, 0.0]

    @pytest.mark.parametrize(
        ("clients", "most"), [(3, 0), (4, 0), (5, 1), (6, 1), (7, 2), (8, 2), (100, 2)]
    )
    def test_krum_guards_by_itself_against_no_more_than_it_withstands(
        self, clients: int, most: int
    ) -> None:
        """n >= 2f + 3."""
        assert malicious(resolve({"method": "krum", "num-clients": clients}).config) == most

    def test_what_so_few_clients_cannot_withstand(self, tmp_path: Path) -> None:
        """Krum wants 2f + 3 uploads, and a fifth of four is nobody."""
        how: dict[str, Any] = {"method": "krum,trimmed-mean", "num_server_rounds": 1}
        few, many = {"krum.malicious": 1, "krum.select": 4}, {"num_clients": 5, "krum.malicious": 1}

        def warnings(name: str, more: dict[str, Any]) -> list[str]:
            folder, _ = federate(tmp_path / name, **how, **more)
            return [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]

        malicious, select, beta = warnings("few", few)
        assert "krum.malicious = 1" in malicious
        assert "stand 1 malicious of 5 or more uploads a round; of the 4 here, 0" in malicious
        assert "krum.select = 4: if 1 of the 4 uploads of a round are malicious, 1" in select
        assert "trimmed-mean.beta = 0.2: cuts off none of the 4 uploads" in beta
        assert "from 0.25 on" in beta
        assert not warnings("many", many)
        by_itself, _ = warnings("default", {})
        assert "krum.malicious = 0: Krum is known to withstand 1 malicious of 5 or" in by_itself

    def test_who_drops_out_or_is_late_guards_nobody(self, tmp_path: Path) -> None:
        """Of seven uploads three are left, of which a fifth is nobody."""
        how: dict[str, Any] = {"method": "krum,trimmed-mean", "num_server_rounds": 1}
        how |= {"num_clients": 7, "dropout_share": 0.3, "straggler_share": 0.3}
        folder, _ = federate(tmp_path, **how)
        said = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert any("krum.malicious = 0: " in text and "of the 3 here, 0" in text for text in said)
        assert any("cuts off none of the 3 uploads" in text for text in said)
        fewer = {"method": "krum", "num-clients": 7, "dropout-share": 0.7, "krum.malicious": 0}
        with pytest.raises(
            ConfigError, match=r"a round has 2 uploads; Krum needs 3 or more: .* or let"
        ):
            resolve(fewer)

    def test_krum_tells_clients_of_long_weights_apart(self) -> None:
        """Updates 0, 1, 3, 9, 10 times 0.01 on weights of length 10,000."""
        before = torch.full((10_000,), 100.0)
        settings = {"method": "krum", "krum.malicious": 1}
        krum = Krum(resolve(settings).config, Shared({"w": before}))
        near = [before + 0.01 * x for x in (0, 1, 3, 9, 10)]
        krum.aggregate(1, {i: Upload({"w": w}, 10) for i, w in enumerate(near)})
        assert torch.equal(krum.state.global_weights["w"], near[1])

    def test_trimmed_mean_by_hand(self) -> None:
        """Of 0, 1, 3, 9, 100 a fifth falls off at either end: (1 + 3 + 9)/3."""
        method = TrimmedMean(config(method="trimmed-mean"), Shared({"w": torch.zeros(2)}))
        method.aggregate(1, uploads(0, 1, 3, 9, 100))
        assert method.state.global_weights["w"].tolist() == pytest.approx([13 / 3, 0.0])
