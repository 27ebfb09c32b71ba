"""Hierarchical sampling: which layers change, and how coarse a change is."""

from __future__ import annotations

import itertools

import pytest
import torch

from ebm_prior import hierarchy
from ebm_prior.config import PriorConfig
from ebm_prior.hierarchy import Change
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import toys


@pytest.fixture
def backbone():
    return toys.LinearGaussian((2, 3, 4))


@pytest.fixture
def prior(backbone):
    settings = {"network": "mlp", "width": 8, "num_steps": 3, "b2": 0.1, "energy_scale": "none"}
    settings |= {"spectral_norm": False, "step_rule": "plain"}
    return EBMPrior(backbone, PriorConfig(shapes=backbone.layout.shapes, **settings)).double()


@pytest.fixture
def drawn(generator):
    """A reference (1, 9) and five variants."""
    return (torch.randn(n, 9, generator=generator, dtype=torch.float64) for n in (1, 5))


# --- groups


@pytest.mark.parametrize(
    ("layers", "number", "expected"),
    [
        (6, 4, [(0, 1), (2, 3), (4,), (5,)]),
        (8, 4, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (3, 4, [(0,), (1,), (2,)]),
        (3, 1, [(0, 1, 2)]),
    ],
)
def test_groups_are_contiguous_and_of_equal_counts(layers, number, expected):
    assert hierarchy.groups(Layout(((4, 8, 8),) * layers), number) == expected


def scales(*counts):
    shapes = [((2, 2 ** (i + 1), 2 ** (i + 1)),) * count for i, count in enumerate(counts)]
    return Layout(sum(shapes, ()))


def test_four_scales_or_more_are_cut_between_scales_only():
    assert hierarchy.groups(scales(1, 1, 2, 4)) == [(0,), (1,), (2, 3), (4, 5, 6, 7)]
    assert hierarchy.groups(scales(1, 1, 1, 2, 3)) == [(0, 1), (2,), (3, 4), (5, 6, 7)]
    assert hierarchy.groups(scales(1, 1, 2, 4), 2) == [(0, 1), (2, 3, 4, 5, 6, 7)]


def test_fewer_scales_than_four_or_than_groups_are_cut_by_count():
    assert hierarchy.groups(scales(1, 1, 4), 3) == [(0, 1), (2, 3), (4, 5)]
    assert len(hierarchy.groups(scales(2, 2, 2, 2), 8)) == 8


def test_no_groups_are_refused():
    with pytest.raises(ValueError, match="expected at least 1"):
        hierarchy.groups(Layout(((2,),)), 0)


# --- the three ways


def test_a_swap_leaves_the_other_coordinates_bit_identical(backbone, drawn):
    reference, variants = drawn
    group = backbone.layout.mask([1])
    u = hierarchy.swap(reference, variants, group)
    assert torch.equal(u[:, group], variants[:, group])
    assert torch.equal(u[:, ~group], reference[:, ~group].expand(5, -1))


def test_a_swap_in_z_keeps_the_z_of_the_other_layers(backbone, drawn):
    reference, variants = drawn
    u = hierarchy.swap_z(backbone, reference, variants, (0,))
    z, fixed, new = map(backbone.to_z, (u, reference.expand(5, -1), variants))
    torch.testing.assert_close(z[0], new[0])
    for i in (1, 2):
        torch.testing.assert_close(z[i], fixed[i])
    assert not torch.allclose(u[:, 2:], reference[:, 2:].expand(5, -1)), (
        "its u must make up for it"
    )


def test_in_u_the_lower_latents_follow_the_upper_ones(backbone, drawn):
    reference, variants = drawn
    u = hierarchy.swap(reference, variants, backbone.layout.mask([0]))
    z, fixed = backbone.to_z(u), backbone.to_z(reference.expand(5, -1))
    assert all(not torch.allclose(z[i], fixed[i]) for i in (1, 2))


def test_a_conditional_chain_moves_its_group_and_leaves_the_clamped_bits(prior, drawn, generator):
    reference, _ = drawn
    group = prior.layout.mask([1])
    u = hierarchy.conditional(prior, reference, 5, group, generator=generator)
    assert torch.equal(u[:, ~group], reference[:, ~group].expand(5, -1))
    assert len(set(u[:, group].flatten().tolist())) == 15, "each row draws its own"


def test_the_clamped_layers_follow_the_forward_process_at_every_index(prior, drawn, generator):
    reference, _ = drawn
    group, calls = prior.layout.mask([0]), []
    reverse = prior.reverse

    def noted(t, u_next, **further):
        calls.append((t, u_next, further["init"]))
        return reverse(t, u_next, **further)

    prior.reverse = noted
    hierarchy.conditional(prior, reference, 4, group, generator=generator)
    assert [t for t, _, _ in calls] == [2, 1, 0]
    for (_, u_next, init), (_, after, _) in itertools.pairwise(calls):
        assert torch.equal(init[:, group], u_next[:, group]), "the chain starts at u_{t+1}"
        assert torch.equal(init[:, ~group], after[:, ~group]), "held at t, conditioned on at t - 1"
    assert torch.equal(calls[-1][2][:, ~group], reference[:, ~group].expand(4, -1))


def test_a_forward_path_has_the_schedules_signal_and_noise(prior, generator):
    clean = torch.full((20_000, 9), 2.0, dtype=torch.float64)
    path = hierarchy.forward_path(clean, prior.schedule, generator)
    assert torch.equal(path[0], clean)
    signal = 1.0
    for k in range(1, 4):
        signal *= float(prior.schedule.alpha[k])
        spread = (1 - signal**2) ** 0.5
        n = clean.numel()
        assert abs(path[k].mean() - 2 * signal) < 4 * spread / n**0.5
        assert abs(path[k].std() - spread) < 4 * spread / (2 * n) ** 0.5


# --- the metric


def test_a_constant_shift_is_all_low_pass():
    reference = torch.rand(1, 3, 32, 32)
    found = hierarchy.change(reference + 0.1, reference)
    assert found.pixel == pytest.approx(0.01, rel=1e-5)
    assert found.low_pass_share == pytest.approx(1, rel=1e-5)


def test_a_checkerboard_has_no_low_pass():
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(16, 16)
    found = hierarchy.change(
        0.5 + 0.1 * board.expand(2, 3, 32, 32), torch.full((1, 3, 32, 32), 0.5)
    )
    assert found.pixel == pytest.approx(0.01, rel=1e-5)
    assert found.low_pass_share < 1e-10


def test_white_noise_has_the_share_of_one_block_mean(generator):
    noise = torch.randn(50, 3, 64, 64, generator=generator)
    assert hierarchy.change(noise, torch.zeros(1, 3, 64, 64)).low_pass_share == pytest.approx(
        1 / 64, rel=0.1
    )


def test_no_change_is_no_share():
    assert hierarchy.change(torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8)).low_pass_share == 0


@pytest.mark.parametrize(("side", "factor"), [(256, 8), (64, 8), (32, 8), (28, 7), (8, 2), (2, 1)])
def test_small_images_are_down_sampled_less(side, factor):
    assert hierarchy.low_pass_factor(side, side) == factor


def test_sides_that_do_not_divide_lose_their_rest_in_both_numbers():
    found = hierarchy.change(torch.ones(1, 1, 35, 33), torch.zeros(1, 1, 35, 33))
    assert found == Change(1.0, 1.0)


def test_panels_average_before_the_share_is_taken():
    mean = hierarchy.mean_change([Change(1.0, 1.0), Change(3.0, 0.0)])
    assert mean == Change(2.0, 0.5)
    assert mean.low_pass_share == 0.25


def test_falling_is_strict():
    assert hierarchy.falls([0.9, 0.5, 0.1])
    assert not hierarchy.falls([0.9, 0.9])
    assert not hierarchy.falls([0.1, 0.5])
