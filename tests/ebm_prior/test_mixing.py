"""Acceptance, R-hat and effective sample size against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_prior.mixing import effective_sample_size, mala_log_acceptance, split_r_hat


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quartic(u):
    """An unnormalised log density that is no Gaussian, and its gradient."""
    return (-0.25 * u**4 + u).sum(1), 1 - u**3


def proposal(u_new, u, gradient, s):
    """log N(u_new; u + s/2 gradient, s I), (B,)."""
    mean = u + 0.5 * s * gradient
    return torch.distributions.Normal(mean, math.sqrt(s)).log_prob(u_new).sum(1)


def test_acceptance_is_the_metropolis_hastings_ratio_and_keeps_detailed_balance(generator):
    u, u_new, s = normal(50, 3, generator=generator), normal(50, 3, generator=generator), 0.4
    (p, g), (p_new, g_new) = quartic(u), quartic(u_new)
    there = mala_log_acceptance(p, g, u, p_new, g_new, u_new, s)
    back = mala_log_acceptance(p_new, g_new, u_new, p, g, u, s)
    ratio = p_new + proposal(u, u_new, g_new, s) - p - proposal(u_new, u, g, s)
    assert torch.allclose(there, ratio.clamp(max=0), atol=1e-12)
    flow = p + proposal(u_new, u, g, s) + there
    assert torch.allclose(flow, p_new + proposal(u, u_new, g_new, s) + back, atol=1e-12)


@pytest.mark.parametrize("s", [0.01, 0.5, 2.0])
def test_on_a_gaussian_the_mean_acceptance_is_that_of_quadrature(s, generator):
    x = torch.linspace(-6, 6, 401, dtype=torch.float64)
    weight = (-x.square() / 2).exp() / math.sqrt(2 * math.pi) * (x[1] - x[0])
    u, noise = torch.meshgrid(x, x, indexing="ij")
    u_new = (1 - s / 2) * u + math.sqrt(s) * noise
    accepted = (s / 8 * (u**2 - u_new**2)).clamp(max=0).exp()  # what the ratio is for N(0, 1)
    exact = float((weight[:, None] * weight * accepted).sum())
    n = 40_000
    u = normal(n, 1, generator=generator)
    u_new = (1 - s / 2) * u + math.sqrt(s) * normal(n, 1, generator=generator)
    ends = (-u.square().sum(1) / 2, -u, u, -u_new.square().sum(1) / 2, -u_new, u_new)
    measured = mala_log_acceptance(*ends, s).exp()
    assert abs(float(measured.mean()) - exact) < 4 * float(measured.std()) / math.sqrt(n) + 1e-6
    assert exact > 0.999 or s > 0.1  # to 1 as s goes to 0


def ar1(rho, n, chains, generator, more=()):
    """Stationary, of unit variance, (n, chains, *more)."""
    x = [normal(chains, *more, generator=generator)]
    for _ in range(n - 1):
        noise = normal(chains, *more, generator=generator)
        x.append(rho * x[-1] + math.sqrt(1 - rho**2) * noise)
    return torch.stack(x)


@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.5, 0.9])
def test_an_autoregression_is_worth_its_known_number_of_draws(rho, generator):
    n = 1000
    draws = ar1(rho, n, 400, generator)
    assert effective_sample_size(draws) / n == pytest.approx((1 - rho) / (1 + rho), rel=0.08)


def test_r_hat_is_one_for_draws_of_one_target_and_large_for_chains_apart(generator):
    draws = normal(500, 8, 3, generator=generator)
    assert split_r_hat(draws) == pytest.approx(1, abs=0.01)
    offset = torch.arange(8.0)
    exact = math.sqrt(1 + float(offset.repeat(2).var()))  # var+ of many draws: W + B / n
    offset = offset.unsqueeze(1)
    assert split_r_hat(draws + offset) == pytest.approx(exact, rel=0.03)
    assert effective_sample_size(draws + offset) < 2


def test_r_hat_sees_a_trend_that_all_chains_share(generator):
    draws = normal(100, 8, generator=generator)
    assert split_r_hat(draws + torch.linspace(0, 4, 100).unsqueeze(1)) > 1.3


def test_targets_that_differ_are_no_disagreement_of_chains(generator):
    draws = normal(200, 4, 10, generator=generator) + 100 * torch.arange(10)
    assert split_r_hat(draws) == pytest.approx(1, abs=0.02)


def test_three_states_have_no_halves_to_compare(generator):
    with pytest.raises(ValueError, match="at least 4"):
        split_r_hat(normal(3, 8, generator=generator))
