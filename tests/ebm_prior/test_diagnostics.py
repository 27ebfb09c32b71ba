"""What the diagnosis says of chains whose behaviour is known."""

from __future__ import annotations

import json
import math

import pytest
import torch

from ebm_prior import kinds
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.config import PriorConfig
from ebm_prior.diagnostics import examine
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import at
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import EightModes, Energies, LinearGaussian


def make(backbone, function, **settings):
    """A prior with plain, unscaled energies given by a function, unless told otherwise."""
    settings = {"energy_scale": "none", "step_rule": "plain", "network": "mlp", **settings}
    config = PriorConfig(shapes=backbone.layout.shapes, **settings)
    prior = EBMPrior(backbone, config)
    prior.energies = Energies(function)
    return prior.eval()


def nothing(z, t):
    return torch.cat([0 * part[:, :1] for part in z], dim=1)


def published(backbone, function):
    """The published CIFAR-10 settings."""
    return make(backbone, function, energy_scale="step", step_rule="cumulative")


def push(backbone, size):
    """Energies that move every coordinate of u by `size` in each step, beside all else."""
    force = torch.linalg.solve(
        backbone.M.T, torch.full((backbone.layout.dim,), 2.0 * size).double()
    )
    parts = backbone.layout.split(force.unsqueeze(0))
    return lambda z, t: torch.stack([z_i @ part[0] for z_i, part in zip(z, parts, strict=True)], 1)


def test_the_published_settings_are_a_learned_short_run_denoiser(generator):
    backbone = LinearGaussian()
    found = examine(published(backbone, push(backbone, 0.014)), 64, generator=generator)
    last = found[-1]
    assert [kernel.t for kernel in found] == [2, 1, 0]
    assert last.injected == pytest.approx(0.027, abs=0.0005)  # contract, Section 4
    assert last.travelled == pytest.approx(50 * 0.014, rel=0.01)
    assert last.share["f"] == pytest.approx(1, abs=0.01)
    assert not any(kernel.mixes for kernel in found)
    verdict = last.verdict()
    assert verdict.startswith("learned short-run denoiser (injected noise 0.027 per coordinate")
    assert "the f gradient carries 100% of the move" in verdict


def test_with_the_published_steps_a_true_energy_moves_nothing(generator):
    toy = EightModes()
    prior = published(toy, nothing)
    oracle = toy.oracle(prior.schedule)
    prior.energies = Energies(lambda z, t: at(prior.step_sizes, t, z[0]) * oracle(z, t))
    last = examine(prior, 64, generator=generator)[-1]
    assert last.needed == pytest.approx(math.hypot(1 - 0.72213, 0.69175), rel=1e-4)
    assert last.verdict().startswith("hardly moves")


def test_long_chains_on_the_true_energy_mix_where_its_modes_are_no_hindrance(generator):
    toy = EightModes()
    prior = make(toy, nothing, b2=0.3, num_steps=200)
    prior.energies = Energies(toy.oracle(prior.schedule))
    found = examine(prior, 32, generator=generator)
    for kernel in found[:2]:
        assert kernel.mixes, kernel
        assert kernel.verdict().startswith("mixes (")
        assert kernel.acceptance > 0.9
        assert kernel.effective_sample_size > 5
    last = found[-1]  # modes of deviation .3 at distance 1.6 and more
    assert last.r_hat > max(kernel.r_hat for kernel in found[:2])
    assert last.share["f"] > 0.5  # F* undoes the Gaussian terms; still noise is what moves
    assert "denoiser" not in last.verdict()


def test_chains_at_rest_drift_nowhere_and_chains_of_noise_travel_as_far_as_the_noise(generator):
    rest = make(LinearGaussian(), nothing, max_T=1, b2=0.2, num_steps=60)
    (kernel,) = examine(rest, 2000, generator=generator)
    # 4 standard errors of a mean of |u|^2 / 2, and the discretisation's 7/2 s/4.
    assert abs(kernel.log_density.total) < 4 * math.sqrt(7 / 2000) + 0.18
    assert kernel.f.total == 0
    assert kernel.share["f"] == 0
    assert sum(kernel.share.values()) == pytest.approx(1)

    noise = make(LinearGaussian(), nothing, max_T=1, b2=1e-8, num_steps=20)
    (kernel,) = examine(noise, 2000, generator=generator)
    assert kernel.travelled / kernel.injected == pytest.approx(1, abs=4 / math.sqrt(2 * 14000))
    assert kernel.share["noise"] == pytest.approx(1, abs=1e-2)
    assert kernel.acceptance == pytest.approx(1, abs=1e-6)


def test_a_chain_that_climbs_drifts_at_first_and_rests_at_last(generator):
    def well(z, t):
        return torch.stack([-3 * (part - 2).square().sum(1) for part in z], dim=1)

    prior = make(LinearGaussian(), well, max_T=1, b2=0.05, num_steps=80)
    (kernel,) = examine(prior, 500, generator=generator)
    assert kernel.f.first_quarter > 10
    assert abs(kernel.f.last_quarter) < 0.05 * kernel.f.total
    assert kernel.f.total == pytest.approx(kernel.f_path[-1] - kernel.f_path[0])
    assert len(kernel.f_path) == 81


def test_the_chains_are_those_of_sampling_and_leave_the_prior_as_it_was():
    prior = small_vaes.prior(NVAEBackbone(small_vaes.vae()), num_steps=4).train()
    found = examine(prior, 8, replicas=4, generator=torch.Generator().manual_seed(3))
    u = prior.sample_u(8, generator=torch.Generator().manual_seed(3))
    widths = [float(part.std()) for part in prior.layout.split(u)]
    assert [layer.u_std for layer in found[-1].layers] == widths
    assert prior.training
    assert all(p.requires_grad for p in prior.energies.parameters())
    assert json.loads(json.dumps([kernel.report() for kernel in found], allow_nan=False))


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_the_joint_prior_is_examined_with_either_sampler(sampler, generator):
    backbone = EightModes()
    config = PriorConfig(
        shapes=backbone.layout.shapes,
        kind="joint",
        sampler=sampler,
        network="mlp",
        width=8,
        spectral_norm=False,
        energy_scale="none",
        step_rule="plain",
        max_T=1,
        b2=0.2,
        num_steps=100,
    )
    prior = kinds.build(backbone, config).double()
    (kernel,) = examine(prior, 200, generator=generator)
    assert kernel.verdict().startswith("forgets its start")
    assert kernel.acceptance > 0.9
    assert (kernel.needed is None) == (sampler == "z")
    assert all(layer.u_std == pytest.approx(1, abs=0.15) for layer in kernel.layers)


def test_chains_of_three_steps_have_no_r_hat_and_one_chain_is_refused(generator):
    prior = make(LinearGaussian(), nothing, num_steps=3, b2=0.1)
    kernel = examine(prior, 16, generator=generator)[0]
    assert kernel.r_hat is None
    assert kernel.effective_sample_size is None
    with pytest.raises(ValueError, match="at least 2"):
        examine(prior, 1, generator=generator)


def test_a_prior_without_chains_is_told_apart(generator):
    backbone = EightModes()
    config = PriorConfig(shapes=backbone.layout.shapes, kind="fitted")
    with pytest.raises(ValueError, match="fitted has no chains"):
        examine(kinds.build(backbone, config), 16, generator=generator)
