"""Local differential privacy, and the attack that measures what weights give away."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from safetensors.torch import load_file

from benchmarks import membership
from pfedgpa_app.client.privacy import with_local_dp
from pfedgpa_app.config.resolve import resolve
from pfedgpa_app.core.settings import ConfigError
from pfedgpa_app.engine.grid import identify
from pfedgpa_app.models.networks import build
from pfedgpa_app.runs.folder import kept_config
from pfedgpa_app.server import privacy
from pfedgpa_app.server.screening import NoUploadsError
from tests.support.federations import federate, records, summary


def noisy(
    epsilon: float,
    clip: float,
    sent: torch.Tensor,
    trained: torch.Tensor,
    name: str = "w",
    uploaded: str = "",
    mask: torch.Tensor | None = None,
    **more: Any,
) -> np.ndarray:
    """What arrives of an upload of a tensor ``name``; ``uploaded``: under another one.

    Where there is a ``mask`` beside it, that is to arrive as it was.
    """
    identify()
    run_config: dict[str, Any] = {"local-dp-epsilon": epsilon, "local-dp-clip": clip, **more}
    context = Context(1, 1, {}, RecordDict(), run_config)
    asked = ConfigRecord({"client": 1})
    beside = {} if mask is None else {"mask": mask}
    content = RecordDict({"arrays": ArrayRecord(beside | {name: sent}), "config": asked})
    message = Message(content, dst_node_id=1, message_type="train")

    def handler(message: Message, context: Context) -> Message:
        arrays = ArrayRecord(beside | {uploaded or name: trained})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord()}), reply_to=message)

    reply = with_local_dp(handler, message, context)
    arrays = reply.content.array_records["arrays"]
    assert list(arrays) == [*beside, name]
    assert all(np.array_equal(arrays[n].numpy(), t.numpy()) for n, t in beside.items())
    return arrays[name].numpy()


def trains(message: Message) -> bool:
    return bool(message.metadata.message_type == "train")


class TestLocalDP:
    def test_clipping_and_noise(self) -> None:
        """Norm 100 in 10,000 weights, C = 2, ε = 0.5: σ = 4 √(2 ln 125000)/0.5 = 38.76."""
        sent, trained = torch.zeros(10_000), torch.ones(10_000)
        found = noisy(0.5, 2.0, sent, trained)
        sigma = 2 * 2 * math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.5
        assert sigma == pytest.approx(38.76, abs=0.01)
        # the mean of 10,000 draws, and their deviation, within five of their own deviations
        assert abs(found.mean() - 0.02) < 5 * sigma / 100
        assert abs(found.std() - sigma) < 5 * sigma / math.sqrt(2 * 10_000)
        barely = noisy(1e9, 2.0, sent, trained)
        assert np.linalg.norm(barely) == pytest.approx(2.0, rel=1e-3)  # clipped
        assert barely.dtype == np.float32

    def test_two_processes_do_not_draw_the_same(self) -> None:
        sent = torch.zeros(10)
        found = []
        for _ in range(2):
            np.random.seed(7)  # noqa: NPY002 as forked workers have it
            found.append(noisy(1.0, 1.0, sent, sent + 1))
        one, other = found
        assert not np.allclose(one, other)

    def test_a_variance_stays_one(self) -> None:
        sent, noise = torch.full((200,), 0.5), 1.0  # of either sign, by far
        found = noisy(noise, 1.0, sent, sent + 0.01, name="norm.running_var")
        assert (found > 0).all()
        assert (found == 0.5).sum() > 50  # as it was sent where noise took it away
        assert (noisy(noise, 1.0, sent, sent + 0.01, name="norm.running_mean") < 0).any()

    def test_off(self) -> None:
        sent = torch.zeros(10)
        assert np.array_equal(noisy(0.0, 1e-9, sent, sent + 1), np.ones(10))

    def test_attackers_keep_to_no_protocol(self) -> None:
        """Clipped to 1, an attack of any strength would look harmless."""
        how: dict[str, Any] = {"num-clients": 2, "malicious-share": 0.5}
        sent, attack = torch.zeros(10), torch.full((10,), 100.0)
        for seed in range(9):
            settings = how | {"seed": seed, "attack": "scale"}
            malicious = 1 in resolve(settings).config.malicious_clients
            as_it_is = np.array_equal(noisy(1e6, 1.0, sent, attack, **settings), attack.numpy())
            assert as_it_is == malicious
            flips = how | {"seed": seed, "attack": "label-flip"}  # in its data alone
            assert np.linalg.norm(noisy(1e6, 1.0, sent, attack, **flips)) < 2

    def test_what_cannot_be_clipped_is_not_sent(self) -> None:
        """A norm that is none clips nothing, and would leave the rest as it is."""
        trained = torch.full((10,), 100.0)
        trained[3] = torch.nan
        with pytest.raises(ValueError, match="trained w to numbers that are not finite"):
            noisy(1.0, 1.0, torch.zeros(10), trained)
        mask = torch.tensor([0.0, -torch.inf])
        assert np.isfinite(noisy(1.0, 1.0, torch.zeros(10), torch.ones(10), mask=mask)).all()

    def test_in_a_federation(self, tmp_path: Path) -> None:
        plain, _ = federate(tmp_path / "0", method="fedavg", learning_rate=0.05)
        how: dict[str, Any] = {"method": "fedavg", "learning_rate": 0.05, "local_dp_clip": 10.0}
        weak, _ = federate(tmp_path / "1", **how, local_dp_epsilon=1e7)
        # noise is drawn from the system, not by the seed: so much that it is never better by chance
        strong, _ = federate(tmp_path / "2", **how, local_dp_epsilon=30.0, max_upload_norm=0)
        accuracies = [summary(f)["fedavg"]["accuracy_before_ft"] for f in (plain, weak, strong)]
        assert accuracies[1] == pytest.approx(accuracies[0], abs=3)
        assert accuracies[2] < accuracies[0]

    @pytest.mark.parametrize("method", ["fedfomo", "scaffold", "fedproto"])
    def test_a_method_whose_uploads_take_no_noise_is_refused(
        self, method: str, tmp_path: Path
    ) -> None:
        with pytest.raises(ConfigError, match=f"local-dp-epsilon: {method} uploads tensors other"):
            federate(tmp_path, method=f"fedavg,{method}", local_dp_epsilon=1.0)
        assert not (tmp_path / "run" / "events.jsonl").exists()

    def test_an_upload_that_it_does_not_take_is_named(self) -> None:
        with pytest.raises(ValueError, match="uploads other tensors than it is sent"):
            noisy(1.0, 1.0, torch.zeros(3), torch.ones(3), uploaded="other")

    def test_all_else_goes_with_it(self, tmp_path: Path) -> None:
        """Who uploads nothing, and who tries a second network on validation images."""
        how: dict[str, Any] = {"local_dp_epsilon": 1e6, "pfedgpa.rank": 2, "num_server_rounds": 5}
        folder, grid = federate(tmp_path, method="local,fedavg,pfedgpa", **how)
        assert summary(folder).keys() == {"local", "fedavg", "pfedgpa"}
        assert any("reference" in m.content.array_records for m in grid.sent)
        assert not any(" failed " in e["text"] for e in records(folder, "events.jsonl"))

    def test_who_alone_uploads_nothing_spends_nothing(self, tmp_path: Path) -> None:
        folder, _ = federate(tmp_path, method="local", local_dp_epsilon=1.0, max_epsilon=1.0)
        assert summary(folder).keys() == {"local"}

    def test_a_run_that_diverges_by_its_noise_says_so(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"local_dp_epsilon": 1e-3, "local_dp_clip": 1e30}
        with pytest.raises(NoUploadsError, match="diverged under it: raise local-dp-epsilon"):
            federate(tmp_path, method="fedavg", max_upload_norm=0, **how)

    def test_so_does_one_whose_noise_is_too_large_for_the_screening(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"local_dp_epsilon": 1.0, "local_dp_clip": 10.0}
        with pytest.raises(NoUploadsError, match="noise for privacy; it is far larger than the"):
            federate(tmp_path, method="fedavg", num_clients=2, **how)

    def test_class_counts_that_are_told_beside_it_are_warned_of(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg", "local_dp_epsilon": 1e4}
        folder, _ = federate(tmp_path, share_label_counts=True, **how)
        said = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "warning"]
        assert any("share-label-counts" in text for text in said)


class TestSum:
    """What all of a client's uploads tell together."""

    @pytest.mark.parametrize(("epsilon", "uploads"), [(1.0, 1), (0.5, 40), (1.0, 100), (30.0, 10)])
    def test_is_the_smallest_that_holds(self, epsilon: float, uploads: int) -> None:
        """δ = ∫ max(0, p − exp(ε) q) for all that an observer sees of two neighbours, p and q."""
        config = resolve({"local-dp-epsilon": epsilon, "local-dp-delta": 1e-5}).config
        deviation = math.sqrt(2 * math.log(1.25e5)) / epsilon  # of one upload, both 1 apart
        mu = math.sqrt(uploads) / deviation  # the mean of all tells as much, and no more
        found = privacy.epsilon_of(config, uploads)
        x = np.linspace(mu - 12, mu + 12, 400_001)
        p, q = (np.exp(-((x - mean) ** 2) / 2) / math.sqrt(2 * math.pi) for mean in (mu, 0.0))
        delta = np.trapezoid(np.maximum(0.0, p - math.exp(found) * q), x)
        assert delta == pytest.approx(1e-5, rel=1e-3)
        # Rényi's bound (Mironov 2017, Proposition 3) is above
        orders = np.linspace(1.01, 200, 20_000)
        assert found < (orders * mu**2 / 2 + math.log(1e5) / (orders - 1)).min()

    def test_one_upload_of_the_classical_mechanism_spends_less_than_it_says(self) -> None:
        config = resolve({"local-dp-epsilon": 1.0}).config
        assert privacy.epsilon_of(config, 1) < 1.0

    def test_a_run_says_it(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg,fedbabu", "local_dp_epsilon": 1e4}
        folder, _ = federate(tmp_path, num_server_rounds=4, fraction_train=0.5, **how)
        config = kept_config(folder)
        times = Counter(r["client"] for r in records(folder) if r["participated"])
        assert privacy.Uploads(config).most == max(times.values())
        spent = privacy.epsilon_of(config, max(times.values()))
        assert {row["epsilon_spent"] for row in summary(folder).values()} == {round(spent, 4)}
        said = [e["text"] for e in records(folder, "events.jsonl") if e["kind"] == "privacy"]
        assert [f"({spent:.3g}, 1e-05)" in text for text in said] == [True]
        assert "epsilon_spent" not in summary(federate(tmp_path / "plain")[0])["fedavg"]

    def test_one_upload_of_much_noise_or_little_is_told_exactly(self) -> None:
        """The classical ε holds up to 1 only: 25.44, as dp-accounting's loss distributions have."""
        config = resolve({"local-dp-epsilon": 20.0}).config
        assert privacy.epsilon_of(config, 1) == pytest.approx(25.4426, abs=1e-3)
        assert "each upload is (25.4, 1e-05)-" in privacy.in_words(config, 3)

    def test_clients_that_join_upload_for_every_method(self, tmp_path: Path) -> None:
        methods = "local,fedavg,client-mean,pfedgpa"
        given = {"method": methods, "num-server-rounds": 2, "local-dp-epsilon": 1.0}
        config = resolve(given | {"join-clients": 1, "join-iterations": 5}).config
        assert privacy.Uploads(config).most == 15  # local uploads nothing
        with pytest.raises(ConfigError, match=r"max-epsilon = 2: .* set join-iterations=1 to keep"):
            privacy.check(dataclasses.replace(config, max_epsilon=2.0))
        joined = {"join_clients": 1, "join_iterations": 2, "num_server_rounds": 2}
        folder, grid = federate(
            tmp_path, method="fedavg,client-mean", local_dp_epsilon=1e5, **joined
        )
        asked = [m.content.config_records["config"]["client"] for m in grid.sent if trains(m)]
        assert asked.count(3) == privacy.Uploads(kept_config(folder)).most == 4

    def test_rounds_that_are_repeated_count_again(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg", "local_dp_epsilon": 1e4, "num_server_rounds": 5}
        how |= {"checkpoint_every": 2, "evaluate_every": 0}
        asked: Counter[int] = Counter()

        def killed(message: Message, reply: Message) -> Message:
            settings: Any = message.content.config_records["config"]
            asked[settings["client"]] += trains(message)
            if settings["round"] == 4:
                raise KeyboardInterrupt
            return reply

        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                federate(tmp_path, killed, resume=(tmp_path / "run").exists(), **how)
        config = resolve({"local-dp-epsilon": 1e4}).config
        within = privacy.epsilon_of(config, 8) + 1
        with pytest.raises(ConfigError, match="since lost rounds are repeated"):
            federate(tmp_path, resume=True, max_epsilon=within, **how)
        folder, grid = federate(tmp_path, resume=True, max_epsilon=2 * within, **how)
        for message in filter(trains, grid.sent):
            settings: Any = message.content.config_records["config"]
            asked[settings["client"]] += 1
        # rounds 3 and 4 thrice; all clients are counted that a round asks
        assert asked[0] == 9
        spent = summary(folder)["fedavg"]["epsilon_spent"]
        assert spent == round(privacy.epsilon_of(config, 9), 4)

    def test_who_drops_out_uploads_nothing(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg", "local_dp_epsilon": 1e4, "num_server_rounds": 6}
        folder, grid = federate(tmp_path, dropout_share=0.5, straggler_share=0.25, **how)
        asked = Counter(
            m.content.config_records["config"]["client"] for m in grid.sent if trains(m)
        )
        config = kept_config(folder)
        assert privacy.Uploads(config).counts == asked
        assert privacy.Uploads(config).most == max(asked.values()) < 6
        spent = summary(folder)["fedavg"]["epsilon_spent"]
        assert spent == round(privacy.epsilon_of(config, max(asked.values())), 4)

    def test_methods_that_were_done_before_a_resumption_tell_the_same(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "fedavg,fedbabu", "local_dp_epsilon": 1e4}
        how |= {"checkpoint_every": 2, "num_server_rounds": 4, "report": True}

        def killed(message: Message, reply: Message) -> Message:
            settings: Any = message.content.config_records["config"]
            if settings["method"] == "fedbabu" and settings["round"] == 2:
                raise KeyboardInterrupt
            return reply

        with pytest.raises(KeyboardInterrupt):
            federate(tmp_path, killed, **how)
        folder, _ = federate(tmp_path, resume=True, **how)
        # all that upload twice in FedBABU's rounds 1 and 2
        spent = round(privacy.epsilon_of(kept_config(folder), 4 + 2 + 4), 4)
        assert [row["epsilon_spent"] for row in summary(folder).values()] == [spent, spent]
        page = (folder / "report.html").read_text()
        assert "10 together at most" in page
        assert "8 together at most" not in page

    def test_whom_a_torn_line_asked_is_everybody(self, tmp_path: Path) -> None:
        """A full disk tears it, and whatever it said may have been asked for."""
        config = resolve({"num-clients": 3, "method": "fedavg", "num-server-rounds": 2}).config
        file = tmp_path / privacy.FILE
        file.write_text('{"federation": "fedavg", "round": 1, "clients": [0, 1, 2]}\n{"federat')
        for _ in range(2):  # and it counts once
            uploads = privacy.Uploads(config, file, going=("fedavg", 1))
            assert uploads.counts == {0: 3, 1: 3, 2: 3}
        uploads.record_asked("fedavg", 2, [0])
        assert privacy.Uploads(config, file, going=("fedavg", 2)).counts == {0: 3, 1: 2, 2: 2}

    def test_an_account_that_is_damaged_is_refused_by_name(self, tmp_path: Path) -> None:
        config = resolve({"num-clients": 3, "method": "fedavg"}).config
        file = tmp_path / privacy.FILE
        file.write_text('{"clients": [0]}\n{"clients": [0, "a"]}\n{"clients": [1]}\n')
        with pytest.raises(ConfigError, match=r"asked\.jsonl: line 2 is damaged"):
            privacy.Uploads(config, file)

    def test_a_run_that_would_spend_more_is_refused(self) -> None:
        given = {"method": "fedavg", "local-dp-epsilon": 1.0, "num-server-rounds": 50}
        with pytest.raises(ConfigError, match="max-epsilon = 5") as refused:
            privacy.check(resolve(given | {"max-epsilon": 5.0}).config)
        found = re.search(r"set num-server-rounds=(\d+) to keep", str(refused.value))
        assert found
        rounds = int(found[1])
        privacy.check(resolve(given | {"max-epsilon": 5.0, "num-server-rounds": rounds}).config)
        more = resolve(given | {"max-epsilon": 5.0, "num-server-rounds": rounds + 1}).config
        with pytest.raises(ConfigError):
            privacy.check(more)
        with pytest.raises(ConfigError, match="even one round exceeds it"):
            privacy.check(resolve(given | {"max-epsilon": 0.01}).config)
        with pytest.raises(ConfigError, match="only with local-dp-epsilon"):
            privacy.check(resolve({"max-epsilon": 5.0}).config)


class TestMembership:
    def test_a_model_that_learned_by_heart_gives_itself_away(self, tmp_path: Path) -> None:
        how: dict[str, Any] = {"method": "last-upload,fedavg", "learning_rate": 0.2}
        folder, _ = federate(
            tmp_path, **how, local_epochs=30, num_server_rounds=3, train_per_client=20
        )
        config = kept_config(folder)
        assert config.num_clients == 4
        own, shared = (
            membership.examine(config, load_file(folder / "weights" / f"{name}.safetensors"))
            for name in ("last-upload", "fedavg")
        )
        assert own.areas.shape == shared.areas.shape == (4, 4)
        assert own.accuracies[:, 0].mean() > 95  # by heart
        mine = np.eye(4, dtype=bool)
        assert own.areas[mine].mean() > 0.6
        assert own.areas[mine].mean() > own.areas[~mine].mean() + 0.1  # not the others'
        # one model: what a client learns about others is what they learn about it
        assert np.ptp(shared.areas, axis=0).max() < 0.1

    def test_an_untrained_model_knows_nothing(self, tmp_path: Path) -> None:
        sizes = {"num-clients": 4, "train-per-client": 150, "test-per-client": 100}
        config = resolve(sizes).config
        weights = {f"global/{n}": t for n, t in build("digits", 10, 0).state_dict().items()}
        areas = membership.examine(config, weights).areas
        assert abs(areas.mean() - 0.5) < 0.05
