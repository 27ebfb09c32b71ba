"""Hierarchical sampling: which layers change, and how coarse a change is."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from ebm_prior import checkpoint, hierarchy, kinds
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.config import PriorConfig
from ebm_prior.hierarchy import Change
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes, toys


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
    u = hierarchy.conditional(prior, reference.expand(5, -1), group, generator=generator)
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
    hierarchy.conditional(prior, reference.expand(4, -1), group, generator=generator)
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


def changes(share, spread, count=100, seed=0):
    """References with pixel changes of about 2 and this share, give or take `spread`."""
    g = torch.Generator().manual_seed(seed)
    pixel = 1 + 2 * torch.rand(count, generator=g, dtype=torch.float64)
    shares = share + spread * torch.randn(count, generator=g, dtype=torch.float64)
    return [Change(float(p), float(p * s)) for p, s in zip(pixel, shares, strict=True)]


def test_the_error_of_a_share_is_that_of_repeated_references():
    shares = [hierarchy.mean_change(changes(0.5, 0.1, seed=i)).low_pass_share for i in range(400)]
    told = hierarchy.standard_error(hierarchy.deviations(changes(0.5, 0.1)))
    assert told == pytest.approx(torch.tensor(shares).std().item(), rel=0.25)


def test_common_fluctuations_of_the_references_cancel_in_a_fall():
    upper = changes(0.5, 0.2)
    step = hierarchy.fall(upper, [Change(c.pixel, c.low_pass - 0.01 * c.pixel) for c in upper])
    assert step.by == pytest.approx(0.01)
    assert step.standard_error < 1e-9
    assert hierarchy.falls([step]) is True


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ((0.9, 0.5, 0.1), True),
        ((0.9, 0.5, 0.505), None),
        ((0.9, 0.1, 0.5), False),
        ((0.5, 0.51), None),
        ((0.5, 0.9), False),
    ],
)
def test_falling_is_told_beyond_the_error_only(shares, expected):
    panels = [changes(share, 0.2, seed=i) for i, share in enumerate(shares)]
    steps = [hierarchy.fall(*pair) for pair in itertools.pairwise(panels)]
    assert hierarchy.falls(steps) is expected


def test_a_top_that_shifts_above_a_bottom_that_roughens_falls(generator):
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)
    board[0] = 1.0  # not wholly without block means

    def decode(u):
        return 0.5 + 0.1 * (u[:, :1, None, None] + u[:, 1:, None, None] * board)

    panels = []
    for layer in (0, 1):
        group = Layout(((1,), (1,))).mask([layer])
        found = []
        for _ in range(20):
            reference, variants = (torch.randn(n, 2, generator=generator) for n in (1, 8))
            new = hierarchy.swap(reference, variants, group)
            found.append(hierarchy.change(decode(new), decode(reference)))
        panels.append(found)
    step = hierarchy.fall(*panels)
    assert step.by > 0.8
    assert hierarchy.falls([step]) is True


def test_one_reference_cannot_tell():
    step = hierarchy.fall([Change(1.0, 0.9)], [Change(1.0, 0.1)])
    assert step.standard_error is None
    assert hierarchy.falls([step]) is None


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, vae = tmp_path_factory.mktemp("files"), small_vaes.vae()
    checkpoint.save(folder / "prior", small_vaes.prior(NVAEBackbone(vae)))
    fitted = PriorConfig(tuple(vae.config.latent_shapes), kind="fitted", max_T=1)
    checkpoint.save(folder / "fitted", kinds.build(NVAEBackbone(vae), fitted))
    return small_vaes.written(folder / "checkpoint.pt", vae), folder


@pytest.fixture
def run(files):
    vae, folder = files

    def run(out, *flags, prior="prior"):
        paths = ["--checkpoint", vae, "--prior", folder / prior, "--out", out]
        few = ["--num_variants", "3", "--num_references", "4", "--batch_size", "8"]
        return main(["hierarchy", *map(str, paths), *few, "--device", "cpu", *flags])

    return run


@pytest.mark.parametrize("flags", ["", "--space z", "--mode conditional"])
def test_the_command_draws_panels_and_reports_shares(run, tmp_path, capsys, flags):
    assert run(tmp_path, *flags.split()) == 0
    assert "low-pass share" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"panels.png", "shares.png", "report.json"}
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["layers"] for row in report["groups"]] == [[0], [1]]
    assert all(0 <= row["low_pass_share"] <= 1 for row in report["groups"])
    assert all(row["pixel_distance"] > 0 for row in report["groups"])
    assert report["all_layers"]["changed"] == 1
    assert set(report["groups"][0]["low_pass_share_by_block"]) == {"2", "4", "8"}
    assert report["low_pass_share_falls"] in (True, False, None)
    assert report["protocol"]["block"] == 2


def test_one_group_of_all_layers_changes_as_much_as_a_new_sample(run, tmp_path):
    assert run(tmp_path, "--groups", "1") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    (row,) = report["groups"]
    assert row["layers"] == [0, 1]
    assert row["changed"] == 1
    assert report["low_pass_share_falls"] is None


def test_a_prior_of_another_kind_can_be_swapped_but_has_no_chain(run, tmp_path, capsys):
    assert run(tmp_path, prior="fitted") == 0
    assert run(tmp_path, "--mode", "conditional", prior="fitted") == 2
    assert "this one is of kind fitted; take --mode swap" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--groups 0", "--groups 0: expected at least 1"),
        ("--num_variants 0", "--num_variants 0: expected at least 1"),
        ("--temperature 0", "--temperature 0.0: expected a positive number"),
        ("--mode conditional --space z", "--space z is of --mode swap"),
    ],
)
def test_what_cannot_work_is_one_line(run, tmp_path, capsys, flags, message):
    assert run(tmp_path / "out", *flags.split()) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
