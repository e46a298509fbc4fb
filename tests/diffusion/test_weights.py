"""Buffer, drift removal, the linear autoencoder and the weight distribution as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from pfedgpa_app.core.uploads import Buffer
from pfedgpa_app.core.weights import Layout, layers
from pfedgpa_app.diffusion import autoencoder
from pfedgpa_app.diffusion.autoencoder import (
    Deltas,
    LayeredAutoencoder,
    LinearAutoencoder,
    remove_drift,
)
from pfedgpa_app.diffusion.convolutional import ConvolutionalAutoencoder, ConvolutionalSettings
from pfedgpa_app.diffusion.copies import novelty
from pfedgpa_app.diffusion.directions import (
    Likeness,
    client_means,
    directions_of_likeness,
    principal_directions,
)
from pfedgpa_app.diffusion.distribution import WeightDistribution, likeness_of
from pfedgpa_app.diffusion.rank import choose_rank, hard_threshold
from pfedgpa_app.diffusion.saved import load, save
from pfedgpa_app.diffusion.settings import RULES, DiffusionSettings
from pfedgpa_app.models.networks import weights_of

SHAPES = {"body": (20, 30), "bias": (20,), "head": (5, 20)}
GROUPS, CLIENTS, ROUNDS = 4, 12, 6


def uploads(seed: int = 0, clients: int = CLIENTS) -> torch.Tensor:
    """[rounds, clients, P]: drift a round, a group's direction, a client's own, and noise."""
    rng = torch.Generator().manual_seed(seed)
    p = sum(torch.Size(s).numel() for s in SHAPES.values())

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, p, generator=rng)

    group = torch.arange(clients) % GROUPS
    drift = 0.5 * normal(ROUNDS).cumsum(0)[:, None]
    return (
        drift + 0.3 * normal(GROUPS)[group] + 0.1 * normal(clients) + 0.2 * normal(ROUNDS, clients)
    )


def unflatten(vector: torch.Tensor) -> dict[str, torch.Tensor]:
    like = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    return Layout.of(like).unflatten(vector)


def buffer(vectors: torch.Tensor, taking_part: torch.Tensor | None = None) -> Buffer:
    filled = Buffer(ROUNDS)
    for r in range(vectors.shape[0]):
        for c in range(vectors.shape[1]):
            if taking_part is None or taking_part[r, c]:
                filled.add(r, c, unflatten(vectors[r, c]))
        filled.drop_old(r)
    return filled


def distribution(vectors: torch.Tensor, **settings: Any) -> WeightDistribution:
    chosen: dict[str, Any] = {"denoiser": "finite-set", **settings}
    return WeightDistribution(buffer(vectors), DiffusionSettings(**chosen), seed=0)


def generated(fitted: WeightDistribution, mode: str = "tweedie", **knobs: Any) -> torch.Tensor:
    weights = fitted.generate(mode, **({"draws": 16} | knobs))
    return torch.stack([fitted.layout.flatten(weights[c]) for c in fitted.newest])


class TestBuffer:
    def test_round_trip_keeps_shapes_and_dtypes(self) -> None:
        weights = {"a": torch.randn(2, 3), "b": torch.tensor(4.0), "c": torch.randn(3).half()}
        layout = Layout.of(weights)
        back = layout.unflatten(layout.flatten(weights))
        for name, tensor in weights.items():
            assert torch.equal(back[name], tensor)
            assert back[name].dtype == tensor.dtype

    def test_keeps_the_window_and_each_clients_newest(self) -> None:
        kept = Buffer(2)
        for server_round, client in ((1, 0), (1, 1), (2, 1), (3, 1), (4, 1)):
            kept.add(server_round, client, {"w": torch.tensor([float(server_round + client)])})
            kept.drop_old(server_round)
        _, _, rounds, clients = kept.stack()
        assert rounds.tolist() == [3, 4]
        assert clients.tolist() == [1, 1]
        newest = kept.newest()
        assert newest[0].server_round == 1
        assert newest[0].round_mean == pytest.approx(1.5)  # of uploads 1 and 2 in round 1
        assert newest[1].server_round == 4

    def test_a_view_of_the_last_tensors(self) -> None:
        buffer = Buffer(1)
        uploads = [
            {
                "a": torch.full((2,), float(i)),
                "b": torch.arange(4.0).view(2, 2) * i,
                "c": torch.ones(1),
            }
            for i in range(3)
        ]
        buffer.add(1, 0, uploads[0])
        buffer.add(1, 1, uploads[1])
        buffer.add(2, 1, uploads[2])
        buffer.drop_old(2)  # client 0's is kept though its round has left, with that round's mean
        view = buffer.last(["b", "c"])
        layout, vectors, rounds, clients = view.stack()
        assert (layout.names, rounds.tolist(), clients.tolist()) == (("b", "c"), [2], [1])
        assert torch.equal(vectors[0], torch.tensor([0.0, 2, 4, 6, 1]))
        stale = view.newest()[0]
        assert stale.round_mean is not None
        assert torch.equal(stale.round_mean, torch.tensor([0.0, 0.5, 1, 1.5, 1]))
        whole = buffer.newest()[1].vector
        assert view.newest()[1].vector.data_ptr() == whole[2:].data_ptr()  # nothing is copied
        with pytest.raises(ValueError, match="not the last tensors"):
            buffer.last(["a", "b"])

    def test_refuses_what_is_not_finite_or_of_another_layout(self) -> None:
        kept = Buffer(2)
        kept.add(1, 0, {"w": torch.zeros(2)})
        for bad in ({"w": torch.tensor([1.0, float("nan")])}, {"w": torch.zeros(3)}):
            with pytest.raises(ValueError):
                kept.add(1, 1, bad)
        assert len(kept) == 1

    def test_the_head_is_the_last_matrix(self) -> None:
        layout = Layout.of({name: torch.zeros(shape) for name, shape in SHAPES.items()})
        assert layout.classifier() == slice(620, 720)
        empty = {"w": torch.ones(2, 3), "b": torch.ones(2), "none": torch.ones(0, 4)}
        assert Layout.of(empty).classifier() == slice(0, 6)

    def test_what_a_round_has_in_common_may_be_known(self) -> None:
        kept = Buffer(1)
        for client in (0, 1):
            kept.add(1, client, {"a": torch.zeros(1), "b": torch.tensor([float(client)])})
        kept.means[1] = torch.tensor([7.0, 8.0])
        known = kept.last(["b"])
        deltas = remove_drift(*known.stack()[1:], known=known.means)
        assert deltas.rows(torch.arange(2)).tolist() == [[-8.0], [-7.0]]
        kept.add(2, 1, {"a": torch.zeros(1), "b": torch.zeros(1)})
        kept.forget(2, 0)  # is not there
        kept.drop_old(2)  # client 0's is kept with what is known of its round
        mean = kept.newest()[0].round_mean
        assert mean is not None
        assert mean.tolist() == [7.0, 8.0]
        assert not kept.means
        kept.forget(2, 1)
        assert not kept.entries()


class TestDrift:
    def test_full_participation_subtracts_the_round_mean(self) -> None:
        vectors = uploads()
        deltas = remove_drift(*buffer(vectors).stack()[1:])
        assert torch.allclose(deltas.means, vectors.mean(1), atol=1e-5)

    def test_partial_participation_is_not_mistaken_for_drift(self) -> None:
        # clients differ a lot, there is no drift at all: means must stay nearly put although
        # other clients take part in each round, where plain round means jump about
        rng = torch.Generator().manual_seed(0)
        own = torch.randn(20, 1, 50, generator=rng).transpose(0, 1)
        vectors = own + 0.01 * torch.randn(15, 20, 50, generator=rng)
        part = torch.rand(15, 20, generator=rng) < 0.4
        filled = Buffer(15)
        for r, c in part.nonzero().tolist():
            filled.add(r, c, {"w": vectors[r, c]})
        _, stacked, rounds, clients = filled.stack()
        means = remove_drift(stacked, rounds, clients).means
        plain = torch.stack([vectors[r, part[r]].mean(0) for r in range(15)])
        assert means.std(0).mean() < 0.35 * plain.std(0).mean()


class TestAutoencoder:
    def test_exact_at_full_rank(self) -> None:
        deltas = remove_drift(*buffer(uploads()).stack()[1:])
        whole = principal_directions(deltas.gram(), len(deltas))
        coder, latents = LinearAutoencoder.fit(deltas, whole)
        assert len(coder.scale) == ROUNDS * (CLIENTS - 1)  # each round's mean is gone
        rows = deltas.rows(torch.arange(len(deltas)))
        assert torch.allclose(coder.encode(rows), latents, atol=1e-3)
        assert torch.allclose(coder.decode(latents), rows, atol=1e-4)
        assert torch.allclose(latents.var(0, correction=0), torch.ones(latents.shape[1]), atol=1e-3)

    def test_is_the_singular_value_decomposition(self) -> None:
        deltas = remove_drift(*buffer(uploads()).stack()[1:])
        coder, _ = LinearAutoencoder.fit(deltas, principal_directions(deltas.gram(), 3))
        _, sizes, right = torch.linalg.svd(deltas.rows(torch.arange(len(deltas))).double())
        assert torch.allclose(coder.scale.double(), sizes[:3] / len(deltas) ** 0.5, rtol=1e-5)
        overlap = (coder.components.double() @ right[:3].T).abs()
        assert torch.allclose(overlap, torch.eye(3).double(), atol=1e-4)

    def test_a_span_is_what_inner_products_of_all_weights_tell(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(autoencoder, "_NUMBERS", 1)  # three blocks
        _, vectors, rounds, clients = buffer(uploads()).stack()
        deltas = remove_drift(vectors, rounds, clients)
        rows, means = deltas.rows(torch.arange(len(deltas))).double(), client_means(clients)
        span = deltas.span(means.T)
        assert torch.allclose(span.weights, means @ rows, atol=1e-6)
        assert torch.allclose(span.products, rows @ rows.T @ means.T, atol=1e-5)
        assert torch.allclose(deltas.gram(), rows @ rows.T, atol=1e-5)
        head = rows[:, 620:]
        among = means @ head @ head.T @ means.T
        assert torch.allclose(deltas.gram(means.T, slice(620, 720)), among, atol=1e-5)
        mixing, deviations = span.axes()
        assert len(deviations) == CLIENTS - 1  # the means' mean is 0
        directions = mixing.T @ span.weights
        assert torch.allclose(directions @ directions.T, torch.eye(CLIENTS - 1).double(), atol=1e-5)
        latents = span.products @ mixing / deviations
        assert torch.allclose(latents, rows @ directions.T / deviations, atol=1e-5)
        alike = latents.T @ latents / len(latents)
        assert torch.allclose(alike, torch.eye(CLIENTS - 1).double(), atol=1e-5)

    def test_error_falls_with_the_rank(self) -> None:
        deltas = remove_drift(*buffer(uploads()).stack()[1:])
        gram, rows = deltas.gram(), deltas.rows(torch.arange(ROUNDS * CLIENTS))
        errors = []
        for rank in (1, 3, 8, 20):
            coder, _ = LinearAutoencoder.fit(deltas, principal_directions(gram, rank))
            errors.append(float((coder.decode(coder.encode(rows)) - rows).square().sum()))
        assert errors == sorted(errors, reverse=True)

    def test_layers_are_coded_each_by_itself(self) -> None:
        layout, vectors, rounds, clients = buffer(uploads()).stack()
        deltas = remove_drift(vectors, rounds, clients)
        assert layout.layers() == [slice(0, 600), slice(600, 620), slice(620, 720)]
        means = client_means(clients)  # what clients differ in: 11 directions in every layer
        coder, learned = LayeredAutoencoder.fit(deltas, layout.layers(), means.T)
        assert coder.tokens == (3, CLIENTS - 1)
        rows = deltas.rows(torch.arange(len(deltas)))
        latents = coder.encode(rows)
        assert torch.allclose(learned, latents, atol=1e-4)
        changed = rows.clone()
        changed[:, :600] += 1
        same = coder.encode(changed).split(CLIENTS - 1, 1)
        for layer, before in enumerate(latents.split(CLIENTS - 1, 1)):
            assert torch.allclose(same[layer], before, atol=1e-4) == (layer > 0)
        inside = (means.float() @ rows).repeat(2, 1)
        assert torch.allclose(coder.decode(coder.encode(inside)), inside, atol=1e-4)

    def test_layers_with_one_name_are_neighbours_only(self) -> None:
        like = {name: torch.zeros(2) for name in ("a.weight", "a.bias", "b.weight", "a.other", "c")}
        found = Layout.of(like).layers()
        assert found == [slice(0, 4), slice(4, 6), slice(6, 8), slice(8, 10)]

    @pytest.mark.parametrize("inside", [True, False])
    def test_a_parametrised_layer_is_one(self, inside: bool) -> None:
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
        like = weights_of(nn.Sequential(normed) if inside else normed)
        assert len(like) == 3
        assert layers(like) == [list(like)]
        assert not inside or Layout.of(like).layers() == [slice(0, 10)]

    def test_convolutional_learns_to_reconstruct_what_it_has_latents_for(self) -> None:
        # three directions, in 4,000 weights of two tensors of very different size
        rng = torch.Generator().manual_seed(0)
        scores, axes = torch.randn(64, 3, generator=rng), torch.randn(3, 4_000, generator=rng)
        rows = scores @ axes
        rows[:, 3_000:] *= 1e-3
        deltas = Deltas(rows, torch.zeros(1, 4_000), torch.zeros(64, dtype=torch.long), (1,))
        layout = Layout.of({"a": torch.zeros(3_000), "b": torch.zeros(1_000)})
        few = ConvolutionalSettings(latents=8, steps=400, latent_noise=0.02, chunk=2048)
        coder, latents = ConvolutionalAutoencoder.fit(deltas, layout, few, 0, torch.device("cpu"))
        assert coder.tokens == (2, 8)
        assert torch.allclose(coder.encode(rows), latents, atol=1e-5)
        assert torch.allclose(latents.std(0, correction=0), torch.ones(16), atol=1e-3)
        error = coder.decode(latents) - rows
        for part in (slice(0, 3_000), slice(3_000, None)):
            assert error[:, part].square().mean() < 0.1 * rows[:, part].square().mean()


def rank_by(rule: str, deltas: Deltas, clients: torch.Tensor, seed: int) -> int:
    return rank_of(rule, deltas, slice(620, 720), clients, seed)


def rank_of(rule: str, deltas: Deltas, head: slice, clients: torch.Tensor, seed: int) -> int:
    classifiers = deltas.gram(client_means(clients).T, head)
    return choose_rank(rule, deltas, head, classifiers, clients, seed)


class TestRank:
    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("seed", range(3))
    def test_counts_what_groups_differ_in(self, rule: str, seed: int) -> None:
        _, vectors, rounds, clients = buffer(uploads(seed, clients=16)).stack()
        deltas = remove_drift(vectors, rounds, clients)
        assert rank_by(rule, deltas, clients, seed) == GROUPS - 1

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("clients", [1, 2, 3, 4, 5])
    def test_stays_within_what_few_or_equal_clients_span(self, rule: str, clients: int) -> None:
        for vectors in (uploads(clients=clients), torch.ones(ROUNDS, clients, 720)):
            _, stacked, rounds, who = buffer(vectors[:, :, :720]).stack()
            deltas = remove_drift(stacked, rounds, who)
            rank = rank_by(rule, deltas, who, 0)
            assert 1 <= rank <= max(1, clients - 1)

    @pytest.mark.parametrize("rule", RULES)
    @pytest.mark.parametrize("columns", [1, 2, 3])
    def test_a_head_smaller_than_clients_are_many(self, rule: str, columns: int) -> None:
        _, vectors, rounds, clients = buffer(uploads(clients=16)).stack()
        deltas, head = remove_drift(vectors, rounds, clients), slice(720 - columns, 720)
        assert 2 <= rank_of(rule, deltas, head, clients, 0) <= 15

    @pytest.mark.parametrize("rule", sorted({*RULES} - {"likelihood"}))
    def test_clients_that_are_equal_raise_no_rank(self, rule: str) -> None:
        """As those that take no step: what is left of their differences is rounding."""
        vectors = uploads(clients=16)
        vectors[:, :8] = vectors[:, :8].mean(1, keepdim=True)
        _, stacked, rounds, who = buffer(vectors).stack()
        deltas = remove_drift(stacked, rounds, who)
        assert rank_by(rule, deltas, who, 0) <= GROUPS + 1

    def test_shrinkage_does_not_count_noise_where_clients_are_many(self) -> None:
        # 60 clients, 100 head weights, no groups: the noise's own spread passes twice the median
        rng = torch.Generator().manual_seed(0)
        vectors = torch.randn(1, 60, 720, generator=rng)
        _, stacked, rounds, who = buffer(vectors).stack()
        deltas = remove_drift(stacked, rounds, who)
        ranks = {r: rank_by(r, deltas, who, 0) for r in RULES}
        assert ranks["head-gap"] > 5
        assert ranks["shrinkage"] == ranks["likelihood"] == ranks["cross-validation"] == 2

    def test_the_widest_gap_is_not_fooled_by_noise_that_prefers_directions(self) -> None:
        # 100 clients in five groups; what each memorised has a deviation of j^-0.7 along axis j
        rng = torch.Generator().manual_seed(0)
        own = torch.randn(100, 720, generator=rng)
        own[:, 620:] *= torch.arange(1, 101).pow(-0.7)
        groups = 2 * torch.randn(5, 720, generator=rng)[torch.arange(100) % 5]
        _, stacked, rounds, who = buffer((own + groups)[None]).stack()
        deltas = remove_drift(stacked, rounds, who)
        assert rank_by("shrinkage", deltas, who, 0) > 8
        assert rank_by("widest-gap", deltas, who, 0) == 4

    def test_many_directions_do_not_hide_the_weakest_of_them(self) -> None:
        # 20 clients, no two alike: ten directions whose variances in the head fall from 30 to
        # 4.5 times the noise's. The median of all 19 eigenvalues is then one of theirs.
        rng = torch.Generator().manual_seed(0)
        scores = torch.randn(20, 10, generator=rng)
        scores = torch.linalg.qr(scores - scores.mean(0)).Q
        axes = torch.linalg.qr(torch.randn(100, 10, generator=rng)).Q.T
        vectors = torch.randn(20, 720, generator=rng)
        vectors[:, 620:] += scores * (100 * torch.logspace(1.48, 0.65, 10)).sqrt() @ axes
        _, stacked, rounds, who = buffer(vectors[None]).stack()
        deltas = remove_drift(stacked, rounds, who)
        assert rank_by("shrinkage", deltas, who, 0) < 10
        assert rank_by("widest-gap", deltas, who, 0) == 10

    @pytest.mark.parametrize(
        ("aspect", "squared"),
        # ω(β)² of Gavish and Donoho (2014), Table IV: ω = 1.5194, 1.6089, 2.1711, 2.8582
        [(0.05, 1.5194**2), (0.1, 1.6089**2), (0.5, 2.1711**2), (1.0, 2.8582**2)],
    )
    def test_hard_threshold_is_the_published_one(self, aspect: float, squared: float) -> None:
        assert hard_threshold(aspect) == pytest.approx(squared, rel=1e-3)


class TestNovelty:
    def test_is_relative_to_the_distance_between_uploads(self) -> None:
        # uploads at 0, 3 and 10 on a line, far from the origin; the clients' newest are 3 and 10
        uploads = 1000 + torch.tensor([[0.0], [3.0], [10.0]]).repeat(1, 20_000)
        generated = 1000 + torch.tensor([[2.0], [10.0]]).repeat(1, 20_000)
        got = novelty(list(generated), torch.tensor([1, 2]), list(uploads))
        # 2 is 1 from an upload, where 3 is 3 from the next one; 10 is an upload
        assert got.tolist() == pytest.approx([1 / 3, 0], abs=1e-6)

    def test_equal_uploads_have_no_distance_to_compare_with(self) -> None:
        uploads = torch.ones(3, 5)
        assert novelty([torch.zeros(5)], torch.tensor([0]), list(uploads)).isnan().all()


class TestDistribution:
    def test_gathers_groups_better_than_averaging_ones_own(self) -> None:
        vectors = uploads()
        fitted = distribution(vectors)
        group = torch.arange(CLIENTS) % GROUPS
        truth = torch.stack([vectors[-1][group == g].mean(0) for g in group])
        own = vectors.sub(vectors.mean(1, keepdim=True)).mean(0) + vectors[-1].mean(0)
        noise_free = torch.stack(
            [own[group == g].mean(0) for g in group]
        )  # what the group shares, over all rounds
        assert truth.shape == noise_free.shape
        ours = (generated(fitted) - noise_free).square().sum()
        assert ours < 0.5 * (own - noise_free).square().sum()

    def test_places_a_client_that_it_has_never_seen(self) -> None:
        # the last client of each group is held back
        vectors = uploads(clients=CLIENTS + GROUPS)
        fitted = distribution(vectors[:, :CLIENTS])
        drift_free = vectors - vectors.mean(1, keepdim=True)
        group = torch.arange(CLIENTS + GROUPS) % GROUPS
        truth = torch.stack([drift_free[:, group == g].mean((0, 1)) for g in range(GROUPS)])
        new = vectors[-1, CLIENTS:]  # client CLIENTS + g is of group g
        placed = fitted.place(
            {g: unflatten(upload) for g, upload in enumerate(new)}, fitted.strength, draws=32
        )
        got = torch.stack([fitted.layout.flatten(placed[g]) for g in range(GROUPS)])

        def known(deltas: torch.Tensor) -> torch.Tensor:
            return fitted.autoencoder.decode(fitted.autoencoder.encode(deltas))

        before, after = (known(x - fitted.anchor - truth).square().sum() for x in (new, got))
        assert after < 0.7 * before
        # what the directions do not tell of them stays their own
        left, kept = (x - fitted.anchor - known(x - fitted.anchor) for x in (new, got))
        assert torch.allclose(left, kept, atol=1e-4)
        assert left.square().sum() > before

    def test_takes_who_has_only_begun_on_to_where_its_like_are(self) -> None:
        """A third of the way, clients lie nearer to the middle than to their own."""
        vectors = uploads(clients=CLIENTS + GROUPS)
        fitted = distribution(vectors[:, :CLIENTS])
        way = vectors[-1, CLIENTS:] - fitted.anchor
        new = {g: unflatten(fitted.anchor + way[g] / 3) for g in range(GROUPS)}
        group = fitted.clients % GROUPS
        truth = torch.stack([fitted.latents[group == g].mean(0) for g in range(GROUPS)])

        def distances(begun: list[int]) -> torch.Tensor:
            placed = fitted.place(new, fitted.strength, draws=32, begun=begun)
            away: torch.Tensor = (fitted._seen(placed)[0] - truth).norm(dim=1)
            return away

        short, taken = distances([]), distances([0, 1])
        assert (taken[:2] < 0.5 * short[:2]).all()
        assert torch.equal(taken[2:], short[2:])  # who has not is left where it is
        # at most four times as far: who is like nobody may go any other way
        step = fitted.autoencoder.decode(0.01 * truth) + fitted.anchor
        near = {g: unflatten(step[g]) for g in range(GROUPS)}
        placed = fitted.place(near, 0, draws=1, begun=range(GROUPS))
        assert torch.allclose(fitted._seen(placed)[0], 0.04 * truth, atol=1e-3)

    def test_guidance_leads_along_local_progress(self) -> None:
        vectors = uploads()
        fitted = distribution(vectors)
        new, before = {0: unflatten(vectors[-1, 0])}, {0: unflatten(vectors[-2, 0])}
        progress = fitted._seen(new)[0] - fitted._seen(before)[0]
        plain, led = (fitted._seen(fitted.guide(new, before, w))[0] for w in (0.0, 0.5))
        assert float(((led - plain) * progress).sum()) > 0
        still = fitted.guide(new, new, 5.0)  # no progress, no guidance
        assert torch.allclose(fitted._seen(still)[0], plain, atol=1e-4)

    def test_a_stale_upload_from_wilder_rounds_stays_near(self) -> None:
        # client 1 of group 1 last took part in round 0, where clients differed twenty times more
        taking_part = torch.ones(ROUNDS, CLIENTS, dtype=torch.bool)
        taking_part[1:, 1] = False
        vectors = uploads()
        vectors[0] = vectors[0].mean(0) + 20 * (vectors[0] - vectors[0].mean(0))
        filled = buffer(vectors, taking_part)
        filled.drop_before(1)
        fitted = WeightDistribution(filled, DiffusionSettings(denoiser="finite-set"), seed=0)
        assert fitted.newest == list(range(CLIENTS))
        assert not bool((fitted.clients == 1).any())
        furthest = fitted.latents.norm(dim=1).max()
        assert fitted.newest_latents[1].norm() == pytest.approx(float(furthest), rel=1e-5)
        got = generated(fitted)
        group = torch.arange(CLIENTS) % GROUPS
        others = (group == 1) & (torch.arange(CLIENTS) != 1)
        near = (got[1] - got[others].mean(0)).norm()
        assert near < 0.5 * (got[1] - got[group != 1]).norm(dim=1).min()

    def test_a_client_unlike_all_others_keeps_its_own(self) -> None:
        vectors = uploads()
        far = torch.randn(vectors.shape[2], generator=torch.Generator().manual_seed(5))
        vectors[:, 3] += 2 * far
        fitted = distribution(vectors)
        own = vectors[:, 3].sub(vectors.mean(1)).mean(0) + fitted.anchor
        got = generated(fitted)
        others = torch.cat([got[:3], got[4:]])
        distance = (got[3] - own).norm()
        assert distance < 0.1 * (others - own).norm(dim=1).min()

    @pytest.mark.parametrize(("clients", "wanted"), [(2 * GROUPS, 0.5**0.5), (16 * GROUPS, 0.25)])
    def test_the_more_clients_of_a_kind_the_more_each_is_like_them(
        self, clients: int, wanted: float
    ) -> None:
        """Its own uploads keep √(kinds / clients): more than a half under four of a kind."""
        vectors, group = uploads(clients=clients), torch.arange(clients) % GROUPS

        def apart(**settings: object) -> float:
            fitted = distribution(vectors, latent_noise=0.0, **settings)
            assert fitted.rank == GROUPS - 1
            assert fitted.own_weight == pytest.approx(settings.get("own_weight", wanted))
            made = generated(fitted)
            kind = torch.stack([made[group == g].mean(0) for g in group])
            return float((made - kind).norm() / made.std(0).norm())

        assert (apart() > apart(own_weight=0.5)) == (wanted > 0.5)

    def test_same_seed_same_weights(self) -> None:
        settings = {"denoiser": "mlp", "fit_steps": 30, "width": 16}
        one, two = (generated(distribution(uploads(), **settings)) for _ in range(2))
        assert torch.equal(one, two)

    @pytest.mark.parametrize(
        ("settings", "tolerance"),
        [
            ({"denoiser": "finite-set"}, 1e-3),
            ({"denoiser": "gaussian"}, 1e-3),
            ({"denoiser": "mlp", "fit_steps": 50, "width": 32}, 1e-2),
            ({"autoencoder": "layers"}, 1e-3),
            (
                {
                    "autoencoder": "layers",
                    "denoiser": "transformer",
                    "fit_steps": 20,
                    "width": 16,
                    "blocks": 1,
                },
                1e-2,
            ),
            ({"autoencoder": "conv", "autoencoder_steps": 20, "chunk_latents": 4}, 1e-2),
        ],
    )
    def test_permuting_clients_permutes_the_output(
        self, settings: dict[str, object], tolerance: float
    ) -> None:
        vectors = uploads()
        order = torch.randperm(CLIENTS, generator=torch.Generator().manual_seed(5))
        straight = generated(distribution(vectors, **settings))
        permuted = generated(distribution(vectors[:, order], **settings))
        assert torch.allclose(permuted, straight[order], atol=tolerance)

    def test_equal_uploads_get_equal_weights(self) -> None:
        vectors = uploads()
        vectors[:, 1] = vectors[:, 0]
        out = generated(distribution(vectors))
        assert torch.allclose(out[0], out[1], atol=1e-6)

    def test_a_common_shift_shifts_everyone(self) -> None:
        shift = torch.randn(uploads().shape[-1], generator=torch.Generator().manual_seed(9))
        out, shifted = (generated(distribution(uploads() + s)) for s in (0, shift))
        assert torch.allclose(shifted, out + shift, atol=1e-3)

    def test_scaling_the_differences_scales_the_result(self) -> None:
        vectors = uploads()
        centre = vectors.mean(1, keepdim=True)
        out = generated(distribution(vectors)) - centre[-1]
        scaled = generated(distribution(centre + 3 * (vectors - centre))) - centre[-1]
        assert torch.allclose(scaled, 3 * out, atol=1e-2)

    def test_full_rank_identity_returns_the_newest_uploads(self) -> None:
        vectors = uploads()
        fitted = distribution(vectors, directions="principal", rank=ROUNDS * CLIENTS, strength=0)
        assert torch.allclose(generated(fitted, "identity"), vectors[-1], atol=1e-3)

    def test_full_strength_is_the_population_mean(self) -> None:
        out = generated(distribution(uploads(), denoiser="gaussian", strength=1000))
        mean = uploads()[-1].mean(0)
        assert (out - mean).square().sum() < 1e-3 * (uploads()[-1] - mean).square().sum()

    def test_idle_clients_are_served_from_their_last_upload(self) -> None:
        vectors = uploads()
        taking_part = torch.ones(ROUNDS, CLIENTS, dtype=torch.bool)
        taking_part[1:, 0] = False  # client 0 only ever took part in round 0
        filled = buffer(vectors, taking_part)
        filled.window = ROUNDS - 1
        filled.drop_old(ROUNDS - 1)
        fitted = WeightDistribution(filled, DiffusionSettings(denoiser="finite-set"), seed=0)
        assert 0 not in fitted.clients
        assert fitted.newest == list(range(CLIENTS))
        out = generated(fitted)
        group = torch.arange(CLIENTS) % GROUPS
        same = (out[0] - out[group == 0][1:]).square().sum(1).mean()
        other = (out[0] - out[group != 0]).square().sum(1).mean()
        assert same < 0.5 * other

    @pytest.mark.parametrize("clients", [1, 2, 3])
    def test_few_clients(self, clients: int) -> None:
        out = generated(distribution(uploads()[:, :clients]))
        assert out.shape[0] == clients
        assert torch.isfinite(out).all()

    def test_identical_uploads_come_back(self) -> None:
        vectors = uploads()[:, :1].expand(ROUNDS, 4, -1)
        out = generated(distribution(vectors))
        assert torch.allclose(out, vectors[-1], atol=1e-6)


class TestSaved:
    @pytest.mark.parametrize(
        "settings",
        [
            {"denoiser": "mlp", "fit_steps": 20, "width": 16},
            {"denoiser": "gaussian"},
            {"autoencoder": "layers", "denoiser": "transformer", "fit_steps": 5, "width": 16},
            {"autoencoder": "conv", "autoencoder_steps": 5, "chunk_latents": 3},
            *({"autoencoder": kind, "rank": 0} for kind in ("linear", "layers", "conv")),
        ],
    )
    def test_round_trip(self, tmp_path: Path, settings: dict[str, object]) -> None:
        vectors = uploads()
        fitted = distribution(vectors, **settings)
        save(fitted, tmp_path / "d.safetensors")
        again = load(tmp_path / "d.safetensors")
        new = {7: unflatten(vectors[0, 3]), 9: unflatten(vectors[1, 4])}
        one, two = (d.place(new, d.strength, draws=8) for d in (fitted, again))
        assert list(one) == list(two) == [7, 9]
        for client in one:
            for name, tensor in one[client].items():
                assert torch.equal(tensor, two[client][name])
        assert again.strength == fitted.strength
        assert torch.equal(again.latents, fitted.latents)
        assert torch.equal(again.clients, fitted.clients)

    def test_refuses_other_files(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read"):
            load(tmp_path / "none.safetensors")
        (tmp_path / "text").write_text("no tensors at all")
        with pytest.raises(ValueError, match="cannot be read"):
            load(tmp_path / "text")
        save_file({"anchor": torch.zeros(2)}, tmp_path / "other.safetensors")
        with pytest.raises(ValueError, match="its format is None"):
            load(tmp_path / "other.safetensors")
        described = {"format": "pfedgpa-distribution-1", "distribution": '{"tensors": []}'}
        save_file({"anchor": torch.zeros(2)}, tmp_path / "half.safetensors", described)
        with pytest.raises(ValueError, match="is damaged"):
            load(tmp_path / "half.safetensors")

    @pytest.mark.parametrize(
        ("name", "damaged"),
        [
            ("anchor", torch.full((720 + 5,), float("nan"))),
            ("anchor", torch.zeros(3)),
            ("latents", torch.zeros(())),
            ("latents", torch.full((12, 2), float("inf"))),
        ],
        ids=["NaN", "another size", "no table", "infinite"],
    )
    def test_refuses_damaged_tensors(
        self, name: str, damaged: torch.Tensor, tmp_path: Path
    ) -> None:
        save(distribution(uploads()), tmp_path / "d.safetensors")
        with safe_open(tmp_path / "d.safetensors", "pt") as file:
            tensors = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            save_file(tensors | {name: damaged}, tmp_path / "bad.safetensors", file.metadata())
        with pytest.raises(ValueError, match=r"is (damaged|not finite)"):
            load(tmp_path / "bad.safetensors")


class TestLikeness:
    """Who is like whom, seen before clients differ by what they know by heart."""

    def uploads(self, noise: float, rounds: int, seed: int) -> Buffer:
        """Of six clients in three groups, each with something of its own as large as ``noise``."""
        buffer, draws = Buffer(rounds), torch.Generator().manual_seed(seed)
        groups = torch.randn(3, 40, generator=torch.Generator().manual_seed(7))
        own = noise * torch.randn(6, 40, generator=draws)
        for number in range(1, rounds + 1):
            for client in range(6):
                mine = groups[client % 3] + own[client]
                buffer.add(number, client, {"head.weight": mine.view(4, 10)})
        return buffer

    def test_directions_that_go_with_groups_are_those_of_group_means(self) -> None:
        late = self.uploads(3.0, 2, 1)
        _, vectors, _, clients = late.stack()
        groups = Likeness(3, {client: torch.eye(3)[client % 3].double() for client in range(6)})
        found = (directions_of_likeness(clients, groups, 3).T @ vectors.double()).T
        means = torch.stack([vectors[clients % 3 == g].double().mean(0) for g in range(3)])
        spread = (means - means.mean(0)).T
        assert torch.linalg.matrix_rank(torch.cat([found, spread], 1)) == 2

    def test_late_uploads_go_by_what_early_ones_tell(self) -> None:
        early, late = self.uploads(0.1, 2, 0), self.uploads(3.0, 2, 1)
        known = likeness_of(early, "shrinkage", 0)
        assert known.rank == 2
        settings = DiffusionSettings(denoiser="gaussian", strength=0)
        made = WeightDistribution(late, settings, 0, known=known).generate()
        alone = WeightDistribution(late, settings, 0).generate()
        _, vectors, _, clients = late.stack()

        def apart(found: dict[int, dict[str, torch.Tensor]]) -> float:
            """How far clients are from their group's mean."""
            total = 0.0
            for client in range(6):
                mean = vectors[clients % 3 == client % 3].mean(0)
                total += float((found[client]["head.weight"].flatten() - mean).square().sum())
            return total

        assert apart(made) < 0.5 * apart(alone)

    def test_clients_of_whom_nothing_is_known_take_no_part(self) -> None:
        _, _, _, clients = self.uploads(1.0, 2, 0).stack()
        known = {client: torch.eye(6)[client].double() for client in range(5)}
        combinations = directions_of_likeness(clients, Likeness(4, known), 4)
        all_six = Likeness(4, known | {5: torch.zeros(6).double()})
        assert combinations.equal(directions_of_likeness(clients, all_six, 4))
