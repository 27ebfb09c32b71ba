"""The frozen copy of NVAE's walk: the plain walk's values and gradients, in less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from ebm_prior.backbones.folded import walk as walks
from ebm_prior.backbones.folded.stages import Tape
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.steps import Steps
from nvae import batchnorm
from nvae.arch import ARCHITECTURES, ModelConfig
from nvae.model import AutoEncoder

DEFINED = [name for name in ARCHITECTURES if name != "res_mbconv9"]  # see arch.py


def model(arch="res_mbconv", dtype=torch.float64, **changes):
    """Two scales of two groups with BatchNorm statistics of all kinds, in eval mode."""
    settings = {
        "dataset": "cifar10",
        "use_se": True,
        "num_latent_scales": 2,
        "num_groups_per_scale": 2,
        "num_latent_per_group": 3,
        "num_channels_enc": 8,
        "num_channels_dec": 8,
        "num_preprocess_cells": 1,
        "num_postprocess_cells": 2,
        "num_cell_per_cond_dec": 2,
        "arch_instance": arch,
    }
    found = AutoEncoder(ModelConfig(**(settings | changes)))
    for module in found.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
        if hasattr(module, "initialised"):
            module.initialised = True
    return found.eval().to(dtype)


def compared(plain, folded, generator, batch=3):
    """z and the gradient of a random linear function of it, by both, each as one vector."""
    dtype = plain.model.prior_ftr0.dtype
    u, weight = torch.randn(2, batch, plain.layout.dim, generator=generator, dtype=dtype)
    u.requires_grad_()
    found = []
    for backbone in (plain, folded):
        z = plain.layout.join(backbone.to_z(u))
        (gradient,) = torch.autograd.grad((weight * z).sum(), u)
        found += [z.detach(), gradient]
    return found


def assert_alike(plain, folded, generator, **tolerance):
    z, gradient, z_folded, gradient_folded = compared(plain, folded, generator)
    torch.testing.assert_close(z_folded, z, **tolerance)
    torch.testing.assert_close(gradient_folded, gradient, **tolerance)


@pytest.mark.parametrize("arch", DEFINED)
def test_every_architecture_folds_exactly(arch, generator):
    backbone = NVAEBackbone(model(arch))
    assert_alike(backbone, backbone.folded(Steps()), generator, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_latent_scales": 1, "num_groups_per_scale": 1},
        {"use_se": False},
        {"num_latent_per_group": 1},
        {"num_cell_per_cond_dec": 1, "num_latent_scales": 3, "num_preprocess_blocks": 1}
        | {"num_postprocess_blocks": 1},
    ],
    ids=["one group", "no gate", "one channel", "three scales"],
)
def test_every_shape_folds_exactly(changes, generator):
    backbone = NVAEBackbone(model(**changes))
    assert_alike(backbone, backbone.folded(Steps()), generator, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("arch", ["res_mbconv", "mbconv_res"])
@pytest.mark.parametrize(
    "steps",
    [Steps(fold=False), Steps(commute=False), Steps(fold=False, commute=False, recompute=True)],
    ids=["not folded", "not commuted", "neither, recomputed"],
)
def test_each_step_can_be_left_out(arch, steps, generator):
    backbone = NVAEBackbone(model(arch))
    assert_alike(backbone, backbone.folded(steps), generator, rtol=1e-11, atol=1e-11)


def test_in_float32_the_difference_is_rounding(generator):
    backbone = NVAEBackbone(model(dtype=torch.float32))
    assert_alike(backbone, backbone.folded(Steps()), generator, rtol=1e-4, atol=1e-5)


def test_bf16_cells_leave_the_gradient_within_half_a_percent(generator):
    backbone = NVAEBackbone(model(dtype=torch.float32))
    _, gradient, z, in_bf16 = compared(
        backbone, backbone.folded(Steps(precision="bf16")), generator
    )
    assert z.dtype == torch.float32
    assert 0 < (in_bf16 - gradient).norm() < 0.005 * gradient.norm()


def test_samples_do_not_depend_on_each_other(generator):
    folded = NVAEBackbone(model()).folded(Steps())
    u = torch.randn(4, folded.layout.dim, generator=generator, dtype=torch.float64)
    whole = folded.layout.join(folded.to_z(u))
    alone = folded.layout.join(folded.to_z(u[2:3]))
    torch.testing.assert_close(whole[2:3], alone, rtol=1e-12, atol=1e-12)


def test_another_temperature_is_the_plain_walks(generator):
    backbone = NVAEBackbone(model())
    u = torch.randn(2, backbone.layout.dim, generator=generator, dtype=torch.float64)
    ours, theirs = (b.to_z(u, 0.7) for b in (backbone.folded(Steps()), backbone))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- memory


def kept(folded, batch=2):
    """Bytes on the tape after a forward pass."""
    u = torch.randn(batch, folded.layout.dim, dtype=folded.model.prior_ftr0.dtype)
    return folded.walk().kept(u)


def test_recomputing_keeps_a_fifth_and_bf16_less():
    backbone = NVAEBackbone(model(dtype=torch.float32, num_latent_scales=1))
    whole = kept(backbone.folded(Steps()))
    assert kept(backbone.folded(Steps(recompute=True))) < 0.2 * whole
    assert kept(backbone.folded(Steps(precision="bf16"))) < 0.6 * whole


def test_without_a_backward_pass_nothing_is_kept(monkeypatch, generator):
    tapes = []
    monkeypatch.setattr(walks, "Tape", lambda keep: tapes.append(Tape(keep)) or tapes[-1])
    folded = NVAEBackbone(model()).folded(Steps())
    u = torch.randn(1, folded.layout.dim, dtype=torch.float64)
    folded.to_z(u)
    with torch.no_grad():
        folded.to_z(u.requires_grad_())
    folded.to_z(u)
    assert [bool(tape._kept) for tape in tapes] == [False, False, True]


def test_the_backward_pass_takes_all_that_was_kept(generator):
    walk = NVAEBackbone(model()).folded(Steps()).walk()
    tape = Tape()
    u = torch.randn(2, walk.layout.dim, dtype=torch.float64)
    walk.backward(torch.ones_like(walk.forward(u, tape)), tape)
    assert not tape._kept


def test_a_second_backward_pass_is_refused_with_what_to_do(generator):
    folded = NVAEBackbone(model()).folded(Steps())
    u = torch.randn(1, folded.layout.dim, dtype=torch.float64, requires_grad=True)
    z = folded.layout.join(folded.to_z(u)).sum()
    z.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="whose tape is used up; call to_z again"):
        z.backward()


def test_a_second_derivative_is_refused(generator):
    folded = NVAEBackbone(model()).folded(Steps())
    u = torch.randn(1, folded.layout.dim, dtype=torch.float64, requires_grad=True)
    z = folded.layout.join(folded.to_z(u))
    (gradient,) = torch.autograd.grad(z.square().sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- the model changes


def test_after_a_change_of_weights_a_refresh_makes_another_copy(generator):
    live = model()
    folded = NVAEBackbone(live).folded(Steps())
    before = folded.walk()
    folded.refresh()
    assert folded.walk() is before
    with torch.no_grad():
        live.dec_tower[0].conv.weight.mul_(1.5)
    folded.refresh()
    assert_alike(NVAEBackbone(live), folded, generator, rtol=1e-11, atol=1e-11)


def test_a_weight_replaced_and_then_changed_is_seen(generator):
    live = model()
    folded = NVAEBackbone(live).folded(Steps())
    folded.walk()
    conv = live.dec_tower[0].conv
    conv.weight = torch.nn.Parameter(1.5 * conv.weight.detach())
    folded.refresh()
    folded.walk()
    with torch.no_grad():
        conv.weight.mul_(1.5)
    folded.refresh()
    assert_alike(NVAEBackbone(live), folded, generator, rtol=1e-11, atol=1e-11)


def test_a_fused_optimisers_step_is_seen(generator):
    live = model()
    folded = NVAEBackbone(live).folded(Steps())
    folded.walk()
    weight = live.dec_tower[0].conv.weight.requires_grad_()
    weight.square().sum().backward()
    torch.optim.Adam([weight], lr=0.1, fused=True).step()  # changes no version
    folded.refresh()
    assert_alike(NVAEBackbone(live), folded, generator, rtol=1e-11, atol=1e-11)


def test_re_estimated_statistics_are_seen(generator):
    live = model()
    folded = NVAEBackbone(live).folded(Steps())
    before = folded.walk()
    folded.readjust_bn(iterations=2, batch_size=2, generator=generator)
    assert folded.walk() is not before
    assert_alike(NVAEBackbone(live), folded, generator, rtol=1e-11, atol=1e-11)


def test_statistics_of_another_training_are_used_and_replaced(generator):
    live = model()
    other = copy.deepcopy(live)
    batchnorm.readjust(other, temperature=1.0, iterations=3, batch_size=2, generator=generator)
    statistics = dict(other.named_buffers())
    folded = NVAEBackbone(live).folded(Steps()).with_bn_statistics(statistics)
    assert_alike(NVAEBackbone(other), folded, generator, rtol=1e-11, atol=1e-11)
    folded.bn_statistics = None
    folded.refresh()
    assert_alike(NVAEBackbone(live), folded, generator, rtol=1e-11, atol=1e-11)


def test_steps_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="precision is 'fp8', expected one of float32, bf16"):
        Steps(precision="fp8")
    with pytest.raises(ValueError, match="steps of the tower: leave `tower` on"):
        Steps(tower=False, recompute=True)
