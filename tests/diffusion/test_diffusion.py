"""The schedule, the denoisers and the inversions against closed forms and golden values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pfedgpa_app.diffusion.denoiser import FiniteSetDenoiser, GaussianDenoiser, ResidualMLP
from pfedgpa_app.diffusion.inversion import calibrate_strength, dpm_encode, regenerate, reverse
from pfedgpa_app.diffusion.network import fit_network
from pfedgpa_app.diffusion.schedule import Schedule
from pfedgpa_app.diffusion.settings import DiffusionSettings

SCHEDULE = Schedule()
LAMBDAS = torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
GAUSSIAN = GaussianDenoiser(MEAN, torch.diag(LAMBDAS), SCHEDULE)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_source(rng: torch.Generator) -> Callable[[int], torch.Tensor]:
    return lambda rows: torch.randn(rows, 3, generator=rng, dtype=torch.float64)


def gains(t: int) -> torch.Tensor:
    """g = ᾱλ / (ᾱλ + 1 − ᾱ): what is left of the distance to the mean."""
    alpha_bar = float(SCHEDULE.alpha_bar[t])
    return alpha_bar * LAMBDAS / (alpha_bar * LAMBDAS + 1 - alpha_bar)


def random_network(dimensions: int = 3) -> object:
    """An untrained ε-network: what holds for it holds for any."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = ResidualMLP(dimensions, 32, 2, SCHEDULE.steps).double().eval()

    @torch.no_grad()
    def denoise(z: torch.Tensor, t: int) -> torch.Tensor:
        noise: torch.Tensor = network(z, torch.full((len(z),), float(t), dtype=z.dtype))
        return noise

    return denoise


def golden_input() -> torch.Tensor:
    """diffusers' test input: arange/768 as (3, 8, 8, 4), last axis first."""
    x = torch.arange(768, dtype=torch.float64) / 768
    return x.reshape(3, 8, 8, 4).permute(3, 0, 1, 2)


class TestSchedule:
    def test_linear_alpha_bar(self) -> None:
        # Π(1−β_s), β linear from 1e-4 to 0.02, computed independently and published with DDPM
        for t, value in ((50, 0.971), (100, 0.897), (200, 0.659), (500, 0.0786)):
            assert float(SCHEDULE.alpha_bar[t]) == pytest.approx(value, abs=6e-4)
        assert float(SCHEDULE.alpha_bar[1000]) == pytest.approx(4.0358e-5, rel=1e-4)
        assert float(SCHEDULE.alpha_bar[0]) == 1

    def test_ddpm_variances_are_diffusers(self) -> None:
        # tests/schedulers/test_scheduler_ddpm.py, whose t counts from 0
        for t, value in ((0, 0.0), (487, 0.00979), (999, 0.02)):
            assert float(SCHEDULE.sigma[t + 1]) ** 2 == pytest.approx(value, abs=1e-5)

    def test_ddim_golden_loop(self) -> None:
        # tests/schedulers/test_scheduler_ddim.py: ten steps with ε(x, t) = x·t/(t+1)
        x = golden_input()
        times = list(range(901, 0, -100))
        for t, to in zip(times, [*times[1:], 0], strict=True):
            x = SCHEDULE.ddim_step(x, x * (t - 1) / t, t, to)
        assert float(x.abs().sum()) == pytest.approx(172.0067, abs=1e-3)
        assert float(x.abs().mean()) == pytest.approx(0.223967, abs=1e-5)

    def test_reverse_means_golden_loop(self) -> None:
        # the mean-only chain on the same input; the paper's printed eq. 6 (1/√ᾱ_t) overflows
        x = literal = golden_input()
        for t in range(1000, 0, -1):
            x = SCHEDULE.reverse_mean(x, x * (t - 1) / t, t)
            wrong = math.sqrt(SCHEDULE.alpha[t] / SCHEDULE.alpha_bar[t])
            literal = SCHEDULE.reverse_mean(literal, literal * (t - 1) / t, t) * wrong
            if t == 994:
                assert float(literal.abs().max()) > 1e13
        assert float(x.abs().sum()) == pytest.approx(0.66094, abs=1e-5)

    @pytest.mark.parametrize("kind", ["linear", "cosine"])
    @pytest.mark.parametrize("steps", [50, 1000])
    def test_ends_in_noise(self, kind: str, steps: int) -> None:
        schedule = Schedule(steps, kind)
        assert (schedule.alpha_bar.diff() < 0).all()
        assert float(schedule.alpha_bar[-1]) < 1e-3

    @given(st.integers(1, 1000), st.integers(0, 2**31))
    @settings(max_examples=30)
    def test_conversions_agree(self, t: int, seed: int) -> None:
        clean, eps = torch.randn(2, 5, 3, generator=generator(seed), dtype=torch.float64)
        z = SCHEDULE.add_noise(clean, eps, t)
        v = SCHEDULE.signal(t) * eps - SCHEDULE.noise(t) * clean
        assert torch.allclose(SCHEDULE.clean(z, eps, t), clean, atol=1e-8)
        assert torch.allclose(SCHEDULE.eps_from_clean(z, clean, t), eps, atol=1e-8)
        assert torch.allclose(SCHEDULE.eps_from_v(z, v, t), eps, atol=1e-8)
        # the posterior mean two ways: through ẑ_0 and through ε
        assert torch.allclose(
            SCHEDULE.posterior_mean(z, clean, t), SCHEDULE.reverse_mean(z, eps, t), atol=1e-8
        )


class TestClosedForms:
    def test_finite_set_picks_the_nearest_then_the_mean(self) -> None:
        points = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
        denoiser = FiniteSetDenoiser(points, SCHEDULE)
        z = torch.tensor([[3.0, 0.5]], dtype=torch.float64)
        near = SCHEDULE.clean(z, denoiser(z, 1), 1)
        far = SCHEDULE.clean(z * 0, denoiser(z * 0, 1000), 1000)
        assert torch.allclose(near, points[1:2], atol=1e-6)
        assert torch.allclose(far, points.mean(0, keepdim=True), atol=2e-3)

    def test_finite_set_by_hand(self) -> None:
        # two points ±1, one dimension: E[z_0|z] = tanh(√ᾱ z / (1 − ᾱ))
        points = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
        signal, variance = SCHEDULE.signal(300), SCHEDULE.noise(300) ** 2
        clean = SCHEDULE.clean(z, FiniteSetDenoiser(points, SCHEDULE)(z, 300), 300)
        assert torch.allclose(clean, torch.tanh(signal * z / variance), atol=1e-12)

    def test_one_blurred_point_is_a_gaussian(self) -> None:
        z = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
        blurred = FiniteSetDenoiser(MEAN[None], SCHEDULE, blur=0.7)
        gaussian = GaussianDenoiser(MEAN, 0.49 * torch.eye(3, dtype=torch.float64), SCHEDULE)
        assert torch.allclose(blurred(z, 250), gaussian(z, 250), atol=1e-10)

    def test_sampling_the_gaussian_returns_its_moments(self) -> None:
        rng = generator(1)
        normal = noise_source(rng)
        out = reverse(normal(8_000), GAUSSIAN, SCHEDULE, 1000, normal)
        assert torch.allclose(out.mean(0), MEAN, atol=0.08)
        assert torch.allclose(out.var(0), LAMBDAS, rtol=0.08)


class TestInversion:
    x = MEAN + torch.tensor([[1.0, -1.0, 0.3], [0.0, 2.0, -0.5]], dtype=torch.float64)

    def out(self, denoiser: Any = GAUSSIAN, seed: int = 0, **knobs: Any) -> torch.Tensor:
        return regenerate(self.x, denoiser, SCHEDULE, generator(seed), **knobs)

    @pytest.mark.parametrize("mode", ["invert"])
    @pytest.mark.parametrize("strength", [1, 300, 1000])
    def test_full_replay_is_the_identity_for_any_network(self, mode: str, strength: int) -> None:
        out = self.out(random_network(), mode=mode, strength=strength, keep=1.0)
        assert torch.allclose(out, self.x, atol=1e-9)

    def test_full_replay_in_float32(self) -> None:
        x = self.x.float()
        gaussian = GaussianDenoiser(MEAN.float(), torch.diag(LAMBDAS.float()), SCHEDULE)
        out = regenerate(x, gaussian, SCHEDULE, generator(), mode="invert", strength=1000, keep=1.0)
        assert torch.allclose(out, x, atol=1e-5)

    @pytest.mark.parametrize("mode", ["identity", "invert", "ddim", "sdedit", "tweedie"])
    def test_strength_zero_is_the_identity(self, mode: str) -> None:
        assert torch.equal(self.out(mode=mode, strength=0, keep=0.0), self.x)

    @pytest.mark.parametrize("strength", [50, 200, 500])
    def test_tweedie_shrinks_by_the_gain(self, strength: int) -> None:
        # antithetic draws cancel exactly under a linear denoiser
        out = self.out(mode="tweedie", strength=strength, draws=2)
        assert torch.allclose(out - MEAN, gains(strength) * (self.x - MEAN), atol=1e-10)

    def test_full_strength_is_the_population_mean(self) -> None:
        out = self.out(mode="tweedie", strength=1000, draws=2)
        assert torch.allclose(out, MEAN.expand(2, 3), atol=1e-3)

    def test_one_tweedie_draw_has_the_variance_of_the_table(self) -> None:
        # ᾱλ²(1−ᾱ)/s², s = ᾱλ + 1 − ᾱ
        draws = torch.stack(
            [self.out(seed=i, mode="tweedie", strength=200)[0] for i in range(2000)]
        )
        a = float(SCHEDULE.alpha_bar[200])
        s = a * LAMBDAS + 1 - a
        assert torch.allclose(draws.var(0), a * LAMBDAS**2 * (1 - a) / s**2, rtol=0.12)

    def test_sdedit_has_the_moments_of_the_table(self) -> None:
        # mean g(x−μ); variance λ(1−ᾱ)/s + ᾱλ²(1−ᾱ)/s²
        rng = generator(2)
        normal = noise_source(rng)
        rows = 8_000
        noisy = SCHEDULE.add_noise(self.x[:1].expand(rows, 3), normal(rows), 300)
        out = reverse(noisy, GAUSSIAN, SCHEDULE, 300, normal)
        a = float(SCHEDULE.alpha_bar[300])
        s = a * LAMBDAS + 1 - a
        variance = LAMBDAS * (1 - a) / s + a * LAMBDAS**2 * (1 - a) / s**2
        assert torch.allclose(out.mean(0) - MEAN, gains(300) * (self.x[0] - MEAN), atol=0.05)
        assert torch.allclose(out.var(0), variance, rtol=0.08)

    @pytest.mark.parametrize("keep", [0.25, 0.8])
    def test_keep_is_a_straight_line(self, keep: float) -> None:
        out = self.out(mode="invert", strength=300, keep=keep)
        none = self.out(mode="invert", strength=300, keep=0.0)
        assert torch.allclose(out, keep * self.x + (1 - keep) * none, atol=1e-9)

    def test_ddim_tends_to_the_identity_with_its_steps(self) -> None:
        errors = [
            float((self.out(mode="ddim", strength=1000, ddim_steps=n) - self.x).abs().max())
            for n in (25, 100, 1000)
        ]
        assert errors[0] > errors[1] > errors[2]
        assert errors[2] < 0.05

    def test_stored_noise_is_white(self) -> None:
        # with the exact score: deviation 1 and no correlation between steps
        normal = noise_source(generator(5))
        x = MEAN + normal(400) * LAMBDAS.sqrt()
        sigma = SCHEDULE.sigma[2:].flip(0)[:, None, None]  # t = 1000..2
        _, residuals = dpm_encode(x, GAUSSIAN, SCHEDULE, 1000, normal)
        noise = torch.stack(residuals[:-1]) / sigma
        assert abs(float((noise[1:] * noise[:-1]).mean())) < 0.02
        assert float(noise.std()) == pytest.approx(1, abs=0.03)

    def test_refuses_nonsense(self) -> None:
        refused: tuple[dict[str, Any], ...] = (
            {"mode": "telepathy", "strength": 1},
            {"mode": "invert", "strength": 1001},
            {"mode": "invert", "strength": 1, "keep": 1.1},
        )
        for knobs in refused:
            with pytest.raises(ValueError):
                self.out(**knobs)


class TestTraining:
    @pytest.mark.parametrize("tokens", [None, (2, 2)])
    def test_network_learns_a_gaussian(self, tokens: tuple[int, int] | None) -> None:
        dimensions = 4
        variances = torch.tensor([2.0, 1.0, 0.5, 0.1])
        latents = torch.randn(2000, dimensions, generator=generator(1)) * variances.sqrt()
        fitted = fit_network(
            latents,
            SCHEDULE,
            DiffusionSettings(
                denoiser="mlp" if tokens is None else "transformer",
                fit_steps=400 if tokens is None else 800,
                width=128 if tokens is None else 32,
                blocks=2,
                latent_noise=0.0,
            ),
            0,
            torch.device("cpu"),
            tokens or (1, 1),
        )
        exact = GaussianDenoiser(torch.zeros(dimensions), torch.diag(variances), SCHEDULE)
        errors = []
        for t in (50, 200, 400, 700):
            clean = torch.randn(500, dimensions, generator=generator(2)) * variances.sqrt()
            z = SCHEDULE.add_noise(clean, torch.randn(500, dimensions, generator=generator(3)), t)
            errors.append(float((fitted(z, t) - exact(z, t)).square().mean()))
        assert sum(errors) / len(errors) < 0.02

    def test_network_beats_the_gaussian_on_clusters(self) -> None:
        centres = 3**0.5 * torch.cat([torch.eye(3), -torch.eye(3)])  # unit variance, 2.4 apart
        labels = torch.arange(360) % 6
        latents = centres[labels] + 0.1 * torch.randn(360, 3, generator=generator(2))
        settings = DiffusionSettings(fit_steps=1000, width=128, blocks=2, latent_noise=0.1)
        fitted = fit_network(latents, SCHEDULE, settings, 0, torch.device("cpu"))
        baseline = GaussianDenoiser.fit(latents, SCHEDULE)
        errors = []
        for denoiser in (fitted, baseline):
            out = regenerate(
                latents, denoiser, SCHEDULE, generator(), mode="tweedie", strength=150, draws=32
            )
            errors.append(float((out - centres[labels]).square().mean()))
        assert errors[0] < 0.5 * errors[1]

    @pytest.mark.parametrize("kind", ["mlp", "transformer"])
    def test_descriptors_tell_clients_apart_where_latents_cannot(self, kind: str) -> None:
        centres = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        who = torch.arange(200) % 2
        latents = centres[who] + 0.2 * torch.randn(200, 2, generator=generator(1))
        names = torch.eye(2)
        how: dict[str, Any] = {"fit_steps": 600, "width": 32, "blocks": 2, "latent_noise": 0.0}
        settings = DiffusionSettings(denoiser=kind, **how)
        fitted = fit_network(
            latents,
            SCHEDULE,
            settings,
            0,
            torch.device("cpu"),
            (1, 2),
            names[who],
        )
        noisy = torch.randn(8, 2, generator=generator(2))  # at T nothing is left of a latent
        rows = noisy.repeat_interleave(2, 0)  # each for both clients in turn

        def clean(omega: float) -> torch.Tensor:
            eps = fitted.of(names, omega)(rows, 900)
            return SCHEDULE.clean(rows, eps, 900).view(8, 2, 2)

        unknown = SCHEDULE.clean(rows, fitted(rows, 900), 900).view(8, 2, 2)
        assert torch.allclose(clean(-1.0), unknown, atol=1e-4)  # ω = −1: unconditional
        assert torch.equal(unknown[:, 0], unknown[:, 1])
        told = clean(0.0).mean(0)
        assert torch.allclose(told, centres, atol=0.35)
        further = clean(1.0).mean(0)  # E[z|e] + ω (E[z|e] − E[z]), in the linear parametrisation
        assert torch.allclose(further, 2 * told - unknown[:, 0].mean(0), atol=1e-3)
        hidden = fitted.of(torch.full((2, 2), torch.nan), 0.7)(rows, 900)
        assert torch.allclose(hidden, fitted(rows, 900), atol=1e-4)

    def test_order_of_latents_does_not_matter(self) -> None:
        latents = torch.randn(60, 2, generator=generator(1))
        shuffled = latents[torch.randperm(60, generator=generator(2))]
        settings = DiffusionSettings(fit_steps=20, width=16, blocks=1, latent_noise=0.0)
        z = torch.randn(5, 2, generator=generator(3))
        one, two = (
            fit_network(rows, SCHEDULE, settings, 0, torch.device("cpu"))(z, 100)
            for rows in (latents, shuffled)
        )
        assert torch.equal(one, two)

    def test_calibrated_strength_leaves_the_wanted_weight(self) -> None:
        clients = torch.arange(10).repeat(6)
        latents = torch.randn(10, 2, generator=generator(1))[clients] + 0.3 * torch.randn(
            60, 2, generator=generator(2)
        )
        newest = torch.arange(50, 60)
        previous = 0
        for wanted in (0.9, 0.5, 0.2):
            t = calibrate_strength(latents, clients, newest, SCHEDULE, wanted, 0)
            noise = torch.randn(500, 2, generator=generator(7))
            noisy = SCHEDULE.add_noise(latents[newest], noise[:, None], t).view(-1, 2)
            weights = FiniteSetDenoiser(latents, SCHEDULE).weights(noisy, t).view(500, 10, 60)
            own = (clients[newest][:, None] == clients).float()
            assert float((weights * own).sum(2).mean()) == pytest.approx(wanted, abs=0.05)
            assert t > previous
            previous = t

    def test_clients_unlike_each_other_are_not_blurred_away(self) -> None:
        """No noise is enough to hide them; the most that is allowed is."""
        clients = torch.arange(5)
        latents = 3 * torch.eye(5)
        free = calibrate_strength(latents, clients, clients, SCHEDULE, 0.5, 0)
        t = calibrate_strength(latents, clients, clients, SCHEDULE, 0.5, 0, most_noise=0.5)
        assert t < free
        assert SCHEDULE.noise(t) <= 0.5 * SCHEDULE.signal(t)
        assert SCHEDULE.noise(t + 1) > 0.5 * SCHEDULE.signal(t + 1)
        near = latents / 10  # little noise is enough: the bound has no part
        free = calibrate_strength(near, clients, clients, SCHEDULE, 0.5, 0)
        assert free < t
        assert free == calibrate_strength(near, clients, clients, SCHEDULE, 0.5, 0, most_noise=0.5)
