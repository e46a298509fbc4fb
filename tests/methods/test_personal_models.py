"""Methods whose clients have models of their own: Ditto, pFedMe, Per-FedAvg, FedProto, FedFomo."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pfedgpa_app.core.uploads import Upload
from pfedgpa_app.methods.fedfomo import AFFINITY
from pfedgpa_app.methods.fedproto import NEVER, FedProto
from tests.support.by_hand import (
    by_hand,
    column,
    configured,
    deep,
    linear,
    near,
    server,
    train,
)


@by_hand
class TestOneStepByHand:
    def test_ditto(self) -> None:
        more: dict[str, Any] = {"ditto.lam": 0.5}
        uploaded, kept, _ = train("ditto", linear(), {"1.weight": column(1, -1)}, **more)
        # v from (0, 0): −0.5 + 0.5·(0 − 1) = −1
        assert near(kept["1.weight"], 1, -1)
        # w from (1, −1): + 0.119203
        assert near(uploaded["1.weight"], 1.119203, -1.119203)

    def test_pfedme(self) -> None:
        more: dict[str, Any] = {"pfedme.lam": 0.5, "pfedme.steps": 2}
        more |= {"pfedme.learning-rate": 1.0, "pfedme.personal-learning-rate": 1.0}
        uploaded, kept, _ = train("pfedme", linear(), **more)
        # θ: 0.5, then −0.268941 + 0.5·0.5 further: 0.518941; w ← 0 − 1·0.5·(0 − 0.518941)
        assert near(kept["1.weight"], 0.518941, -0.518941)
        assert near(uploaded["1.weight"], 0.259471, -0.259471)

    def test_per_fedavg(self) -> None:
        uploaded, kept, _ = train("per-fedavg", linear())
        # θ' = 0.5; the gradient there, −0.268941, moves θ = 0
        assert near(uploaded["1.weight"], 0.268941, -0.268941)
        assert not kept

    def test_fedproto(self) -> None:
        sent = {"means": column(3, 0), "counts": torch.tensor([5.0, 0.0])}
        more: dict[str, Any] = {"fedproto.lam": 0.5}
        uploaded, kept, _ = train("fedproto", deep(1, 0, 0), sent, **more)
        # the body: 2·0.5·(1 − 3) = −2, nothing through a head of 0; the head as ever
        assert near(kept["1.weight"], 3)
        assert near(kept["2.weight"], 0.5, -0.5)
        assert near(uploaded["means"], 3, 0)
        assert near(uploaded["counts"], 1, 0)

    def test_fedfomo(self) -> None:
        sent = {"0/1.weight": column(1, -1), "1/1.weight": column(-1, 1)}
        uploaded, kept, _ = train("fedfomo", linear(), sent)
        # own loss 0.693147; the first's 0.126928, √2 away: (0.693147 − 0.126928)/√2 = 0.400377;
        # the second's 2.126928: (0.693147 − 2.126928)/√2 = −1.013836; the first alone helps
        assert near(uploaded[AFFINITY][:2], 0.400377, -1.013836)
        # so that it trains from (1, −1)
        assert near(kept["1.weight"], 1.119203, -1.119203)


class TestServers:
    def test_pfedme_goes_part_of_the_way(self) -> None:
        beta: dict[str, Any] = {"pfedme.beta": 0.25}
        method = server("pfedme", **beta)
        four = {n: torch.full_like(t, 4.0) for n, t in method.expected_upload().items()}
        method.aggregate(1, {0: Upload(four, 1), 1: Upload(four, 9)})
        assert all(near(t, *[1.0] * t.numel()) for t in method.download(0).values())

    def test_fedproto_means_and_nearest_prototype(self) -> None:
        config, kind = configured(method="fedproto"), FedProto
        initial = {
            "body.weight": column(0),
            "head.weight": column(0, 0),
            "head.bias": torch.zeros(2),
        }
        method = kind(config, kind.begin(config, initial))
        counts = [torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])]
        sent = [
            {"means": column(2, 9), "counts": counts[0]},
            {"means": column(6, 9), "counts": counts[1]},
        ]
        method.aggregate(1, {i: Upload(upload, 4) for i, upload in enumerate(sent)})
        # class 0: (1·2 + 3·6)/4 = 5; class 1 has never been shown, whatever its mean says
        assert near(method.download(0)["means"], 5, 0)
        head = method.evaluation_download(0)
        assert near(head["head.weight"], 10, 0)
        assert head["head.bias"].tolist() == [-25, NEVER]

    def test_fedfomo_sends_what_helped(self) -> None:
        method = server("fedfomo", clients=4, **{"fedfomo.models": 2, "fedfomo.explore": 0.0})
        assert method.download(0) == {}
        like = method.expected_upload()

        def upload(client: int, *affinity: float) -> Upload:
            model = {n: torch.full_like(t, client) for n, t in like.items()}
            return Upload(model | {AFFINITY: torch.tensor(affinity)}, 1)

        method.aggregate(1, {i: upload(i, 0, 0) for i in range(4)})
        first = method.state.sent[0]
        assert len(first) == 2
        assert 0 not in first
        method.aggregate(2, {0: upload(0, 0.1, 0.5)})
        # the better of the two stays, and comes first; the other one's place is open
        assert method.state.sent[0][0] == first[1]
        assert method.state.affinity[0, first[0]] == pytest.approx(0.1)
        sent = method.download(0)
        assert near(sent["0/1.weight"], first[1])
        assert len(sent) == 2 * (len(like) - 1)


class TestRefusals:
    @pytest.mark.parametrize("partition", ["iid", "natural", "shards", "dirichlet"])
    def test_groups_that_a_partition_has_not(self, partition: str) -> None:
        from pfedgpa_app.core.settings import ConfigError

        with pytest.raises(ConfigError, match="has no hidden groups"):
            configured(method="group-mean", partition=partition)

    def test_fedfomo_needs_validation_images(self) -> None:
        from pfedgpa_app.core.settings import ConfigError

        with pytest.raises(ConfigError, match="validation-share"):
            configured(method="fedfomo", validation_share=0.0)
        with pytest.raises(ConfigError, match=r"train-per-client = 30 sets no image aside"):
            configured(method="fedfomo", validation_share=0.01, train_per_client=30)

    def test_pfedmes_inner_steps_must_come_to_rest(self) -> None:
        """Each goes from θ − w to (1 − ηλ)(θ − w)."""
        from pfedgpa_app.core.settings import ConfigError

        with pytest.raises(ConfigError, match=r"personal-learning-rate = 0\.09: .* less than 2"):
            configured(method="pfedme", **{"pfedme.lam": 23.0})
        configured(method="pfedme", **{"pfedme.lam": 22.0})

    @pytest.mark.parametrize(("method", "name"), [("ditto", "lam"), ("fedprox", "mu")])
    def test_no_pull_may_overshoot(self, method: str, name: str) -> None:
        """A step of plain SGD makes (1 − ηλ)(v − w) of v − w; with momentum ηλ may be larger."""
        from pfedgpa_app.core.settings import ConfigError

        how: dict[str, Any] = {"method": method, "learning_rate": 0.1, "momentum": 0.5}
        with pytest.raises(ConfigError, match=rf"{method}.{name} = 30: .* 0\.1, .* less than 3 "):
            configured(**how, **{f"{method}.{name}": 30.0})
        configured(**how, **{f"{method}.{name}": 29.0})
