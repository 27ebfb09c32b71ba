"""The chain as a map: exact drift, stationary variance, counted calls, held coordinates."""

from __future__ import annotations

import pytest
import torch

from ebm_prior import langevin


def standard_gaussian(u):
    return -0.5 * u.square().sum(1)


def test_without_noise_a_step_is_half_the_step_size_times_the_gradient(generator):
    u = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    s = torch.rand(5, generator=generator, dtype=torch.float64)
    state, info = langevin.step(langevin.init(u), standard_gaussian, s, torch.zeros_like(u))
    assert torch.equal(state.u, u + 0.5 * s[:, None] * -u)
    assert torch.equal(info.log_density, standard_gaussian(u))
    torch.testing.assert_close(info.gradient_norm, u.norm(dim=1))
    torch.testing.assert_close(info.move_norm, (state.u - u).norm(dim=1))


def test_noise_enters_with_the_root_of_the_step_size(generator):
    u, noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    state, _ = langevin.step(langevin.init(u), lambda u: 0 * u.sum(1), 0.3, noise)
    torch.testing.assert_close(state.u, u + 0.3**0.5 * noise, rtol=1e-15, atol=1e-15)


def test_a_float_and_a_per_sample_step_size_agree(generator):
    u, noise = torch.randn(2, 5, 3, generator=generator, dtype=torch.float64)
    ends = [
        langevin.run(u, standard_gaussian, step_size=s, num_steps=1, noise=[noise])
        for s in (0.3, torch.tensor(0.3).double(), torch.full((5,), 0.3).double())
    ]
    torch.testing.assert_close(ends[0], ends[2], rtol=0, atol=1e-7)  # 0.3 passed through float32
    assert torch.equal(ends[1], ends[2])


def test_on_the_standard_gaussian_the_variance_settles_above_one(generator):
    s, n = 0.8, 40_000
    u = torch.zeros(n, 1, dtype=torch.float64)
    u = langevin.run(u, standard_gaussian, step_size=s, num_steps=40, generator=generator)
    expected = 1 / (1 - s / 4)
    assert abs(u.var() - expected) < 4 * expected * (2 / n) ** 0.5
    assert abs(u.mean()) < 4 * (expected / n) ** 0.5


def test_k_steps_call_the_density_k_times_each_where_the_step_starts(generator):
    starts, states = [], []

    def counted(u):
        starts.append(u.detach().clone())
        return standard_gaussian(u)

    u = torch.randn(2, 3, generator=generator)
    end = langevin.run(
        u,
        counted,
        step_size=0.1,
        num_steps=4,
        generator=generator,
        callback=lambda k, state, info: states.append((k, state.u)),
    )
    assert [k for k, _ in states] == [0, 1, 2, 3]
    for start, state in zip(starts, [u, *(u for _, u in states[:-1])], strict=True):
        assert torch.equal(start, state)
    assert torch.equal(end, states[-1][1])
    assert not end.requires_grad


def test_masked_coordinates_keep_their_bits_and_the_others_move(generator):
    u = torch.randn(4, 6, generator=generator)
    mask = torch.tensor([True, False, False, True, False, True])
    end = langevin.run(
        u, standard_gaussian, step_size=0.3, num_steps=5, generator=generator, mask=mask
    )
    assert torch.equal(end[:, mask], u[:, mask])
    assert (end[:, ~mask] != u[:, ~mask]).all()


def test_a_samples_path_does_not_depend_on_the_others(generator):
    def density(u):
        return u.cos().prod(1) - 0.1 * u.pow(4).sum(1)

    u, *noise = torch.randn(6, 8, 3, generator=generator)
    whole = langevin.run(u, density, step_size=0.1, num_steps=5, noise=noise)
    other = u.clone()
    other[3] = 7.0
    changed = langevin.run(other, density, step_size=0.1, num_steps=5, noise=noise)
    rest = torch.arange(8) != 3
    assert torch.equal(whole[rest], changed[rest])
    halves = [
        langevin.run(u[part], density, step_size=0.1, num_steps=5, noise=[n[part] for n in noise])
        for part in (slice(4), slice(4, None))
    ]
    torch.testing.assert_close(torch.cat(halves), whole, rtol=1e-6, atol=1e-6)


def test_the_same_generator_state_gives_the_same_chain(seed):
    ends = [
        langevin.run(
            torch.zeros(2, 3),
            standard_gaussian,
            step_size=0.1,
            num_steps=3,
            generator=torch.Generator().manual_seed(seed),
        )
        for _ in range(2)
    ]
    assert torch.equal(*ends)


def test_a_density_that_is_no_vector_over_the_batch_is_refused():
    with pytest.raises(
        ValueError, match=r"returned shape \(\), expected \(8,\): one value per sample"
    ):
        langevin.run(torch.zeros(8, 2), lambda u: u.sum(), step_size=0.1, num_steps=1)


def test_recorded_noise_that_ends_early_is_refused():
    with pytest.raises(ValueError, match="noise has 1 entries, expected 2"):
        langevin.run(
            torch.zeros(1, 2),
            standard_gaussian,
            step_size=0.1,
            num_steps=2,
            noise=[torch.zeros(1, 2)],
        )


def test_a_chain_on_layers_instead_of_a_flat_u_is_refused():
    with pytest.raises(ValueError, match=r"expected \(B, D\)"):
        langevin.init(torch.zeros(2, 3, 4, 4))
