"""The forward process: identities, marginals, step sizes (contract, README 2 and testbed 5)."""

from __future__ import annotations

import pytest
import torch

from ebm_prior.schedule import LONGEST, Schedule, forward_pair


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 10, LONGEST])
def test_signal_and_noise_have_unit_power_and_the_signal_falls(steps):
    s = Schedule(steps)
    one = torch.ones(steps + 1, dtype=torch.float64)
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(s.alpha_bar**2 + s.sigma_bar**2, one, rtol=0, atol=1e-12)
    # Two steps make one: the variance of state t+1 in terms of state t's.
    both = s.alpha[1:] ** 2 * s.sigma_bar[:-1] ** 2 + s.sigma[1:] ** 2
    torch.testing.assert_close(s.sigma_bar[1:] ** 2, both, rtol=0, atol=1e-12)
    assert (s.alpha_bar.diff() < 0).all()
    assert (s.knots[0], s.knots[-1], len(s.knots)) == (0, 999, steps + 1)


def test_three_steps_have_the_published_signal_coefficients():
    published = torch.tensor([0.999950, 0.722132, 0.386265, 0.022776], dtype=torch.float64)
    torch.testing.assert_close(Schedule(3).alpha, published, rtol=0, atol=5e-7)


def test_one_step_jumps_over_the_whole_line():
    s = Schedule(1)
    assert s.knots == [0, 999]
    expected = torch.tensor([0.99995, 0.00635], dtype=torch.float64)
    torch.testing.assert_close(s.alpha, expected, rtol=0, atol=5e-6)
    assert s.recovery.tolist() == [1, 0]


@pytest.mark.parametrize("steps", [0, -1, LONGEST + 1, 2.0, True, "3"])
def test_an_impossible_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match=f"expected a whole number.*from 1 to {LONGEST}"):
        Schedule(steps)


def test_the_last_kernel_is_dropped_as_released_and_kept_as_in_the_paper():
    assert Schedule(3).recovery.tolist() == [1, 1, 1, 0]
    assert Schedule(3, last_step_kernel=True).recovery.tolist() == [1, 1, 1, 1]


def test_step_rules_differ_by_the_cumulated_noise_ratio_not_squared():
    s = Schedule(3)
    cumulative, plain = s.step_size(3e-5, "cumulative"), s.step_size(3e-5, "plain")
    torch.testing.assert_close(plain, 3e-5 * s.sigma[1:] ** 2)
    torch.testing.assert_close(cumulative / plain, s.sigma_bar[:-1] / s.sigma_bar[0])
    assert (cumulative / plain).round().tolist() == [1, 69, 96]
    with pytest.raises(ValueError, match="cumulative, plain"):
        s.step_size(3e-5, "squared")


def test_forward_pairs_have_the_marginals_of_their_own_t(generator):
    n, s, u0 = 1_000_000, Schedule(3), 0.8
    t = torch.randint(3, (n,), generator=generator)
    noise, noise_next = torch.randn(2, n, 1, generator=generator)
    u_t, u_next = (
        u.squeeze(1) for u in forward_pair(torch.full((n, 1), u0), t, s, noise, noise_next)
    )
    for k in range(3):
        a, b = u_t[t == k], u_next[t == k]
        errors = [
            a.mean() - s.alpha_bar[k] * u0,
            a.std() - s.sigma_bar[k],
            b.mean() - s.alpha_bar[k + 1] * u0,
            b.std() - s.sigma_bar[k + 1],
            torch.cov(torch.stack([a, b]))[0, 1] - s.alpha[k + 1] * s.sigma_bar[k] ** 2,
        ]
        # A third of the samples each: the deviation of each estimate is at most 1/sqrt(n/3).
        assert max(abs(float(e)) for e in errors) < 5 * (3 / n) ** 0.5


def test_the_prior_is_invariant_under_the_forward_process(generator):
    n = 300_000
    u, noise, noise_next = torch.randn(3, n, 1, generator=generator)
    for k in range(3):
        for state in forward_pair(u, torch.full((n,), k), Schedule(3), noise, noise_next):
            assert abs(state.mean()) < 5 * n**-0.5
            assert abs(state.var() - 1) < 5 * (2 / n) ** 0.5
