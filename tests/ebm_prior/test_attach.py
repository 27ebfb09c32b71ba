"""A prior in a model's `sample`: on our model, and on a live one that is not ours."""

from __future__ import annotations

import argparse
import copy
import importlib
from dataclasses import asdict

import pytest
import torch
from torch import nn

import ebm_prior
from ebm_prior import checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.fingerprint import fingerprint
from nvae import batchnorm
from tests.ebm_prior.small_vaes import Upstream, prior, vae


@pytest.fixture
def model():
    return vae()


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(model)), step=7)
    return path


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def test_an_attached_model_samples_from_the_prior(model, path):
    gaussian = model.sample(4, 0.7, generator=seeded())
    attached = ebm_prior.attach(model, path)
    logits = model.sample(4, 0.7, generator=seeded())
    u = attached.sample_u(4, generator=seeded())
    assert logits.shape == gaussian.shape
    assert not torch.equal(logits, gaussian)
    assert torch.equal(logits, attached.backbone.logits(u, 0.7))
    assert not logits.requires_grad


def test_the_attached_sample_is_what_the_loaded_prior_decodes(model, path):
    loaded = ebm_prior.load(path, model)
    ebm_prior.attach(model, path)
    generator = seeded()
    logits = model.sample(3, 1.0, generator=generator)
    images = model.decoder_output(logits).sample(generator=generator)
    assert torch.equal(images, loaded.sample(3, generator=seeded()))


def test_temperature_does_not_reach_the_chain(model, path):
    attached = ebm_prior.attach(model, path)
    u = attached.sample_u(2, generator=seeded())
    for temperature in (0.5, 1.0):
        logits = model.sample(2, temperature, generator=seeded())
        assert torch.equal(logits, attached.backbone.logits(u, temperature))


def test_in_training_mode_the_prior_stays_gaussian(model, path):
    plain = copy.deepcopy(model).train().sample(4, 0.7, generator=seeded())
    ebm_prior.attach(model, path)
    model.train()
    assert torch.equal(model.sample(4, 0.7, generator=seeded()), plain)


def test_a_given_u_is_decoded_without_a_chain(model, path, generator):
    u = [torch.randn(2, *shape, generator=generator) for shape in model.latent_shapes]
    plain = model.sample(2, 1.0, u=u)
    ebm_prior.attach(model, path)
    assert torch.equal(model.sample(2, 1.0, u=u), plain)
    drawn = model.sample(2, 1.0, u=None, generator=seeded())
    assert torch.equal(drawn, model.sample(2, 1.0, generator=seeded()))


def test_autocast_and_inference_mode_around_the_call_change_nothing(model, path):
    ebm_prior.attach(model, path)
    plain = model.sample(2, 0.7, generator=seeded())
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.sample(2, 0.7, generator=seeded())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, plain)


def test_chains_run_in_blocks_of_the_size_that_is_given(model, path):
    ebm_prior.attach(model, path, block_size=2)
    sizes, sample_u = [], model.sample.prior.sample_u

    def noted(num, **others):
        sizes.append(num)
        return sample_u(num, **others)

    model.sample.prior.sample_u = noted
    logits = model.sample(5, 0.7, generator=seeded())
    assert sizes == [2, 2, 1]
    assert len(logits) == 5
    again = seeded()
    u = torch.cat([sample_u(size, generator=again) for size in sizes])
    assert torch.equal(logits, model.sample.prior.backbone.logits(u, 0.7))
    with pytest.raises(ValueError, match="block_size is 0, expected at least 1"):
        ebm_prior.attach(model, path, block_size=0)


def test_attaching_again_replaces_and_deleting_detaches(model, path):
    gaussian = model.sample(2, 1.0, generator=seeded())
    first = ebm_prior.attach(model, path)
    second = ebm_prior.attach(model, prior(NVAEBackbone(model), seed=1))
    assert model.sample.prior is second is not first
    model.train()
    model.sample(2, 1.0)
    model.eval()
    del model.sample
    torch.testing.assert_close(model.sample(2, 1.0, generator=seeded()).shape, gaussian.shape)
    assert not hasattr(model.sample, "prior")


def test_readjustment_after_attaching_is_seen(model, path):
    ebm_prior.attach(model, path)
    before = model.sample(2, 1.0, generator=seeded())
    batchnorm.readjust(model, temperature=1.0, iterations=3, batch_size=8, generator=seeded())
    after = model.sample(2, 1.0, generator=seeded())
    assert not torch.equal(after, before)
    del model.sample
    ebm_prior.attach(model, path)
    assert torch.equal(after, model.sample(2, 1.0, generator=seeded()))


def test_statistics_of_the_file_are_used_until_the_model_is_readjusted(model, tmp_path):
    shifted = {k: v + 1 for k, v in model.state_dict().items() if k.endswith("running_mean")}
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(model, shifted)), bn_statistics=shifted)
    attached = ebm_prior.attach(model, path)
    u = attached.sample_u(2, generator=seeded())
    logits = model.sample(2, 1.0, generator=seeded())
    assert torch.equal(logits, NVAEBackbone(model, shifted).logits(u))
    batchnorm.readjust(model, temperature=1.0, iterations=2, batch_size=8, generator=seeded())
    logits = model.sample(2, 1.0, generator=seeded())
    u = attached.sample_u(2, generator=seeded())
    assert torch.equal(logits, NVAEBackbone(model).logits(u))


def test_a_prior_in_memory_is_attached_with_its_own_energies(model):
    energies = prior(NVAEBackbone(model))
    same_weights_elsewhere = copy.deepcopy(vae())
    for vae_ in (model, same_weights_elsewhere):
        attached = ebm_prior.attach(vae_, energies)
        pairs = zip(attached.learned.parameters(), energies.learned.parameters(), strict=True)
        assert all(ours is theirs for ours, theirs in pairs)


def test_a_prior_of_another_backbone_is_refused_with_both_fingerprints(model, path):
    other = vae(seed=1)
    names = [fingerprint(m.state_dict()) for m in (model, other)]
    for given in (path, prior(NVAEBackbone(model))):
        with pytest.raises(ValueError, match=f"{names[0]}.*{names[1]}"):
            ebm_prior.attach(other, given)
    assert "sample" not in vars(other)


@pytest.mark.parametrize("form", ["namespace", "mapping"])
def test_a_live_upstream_model_samples_as_ours_does(model, path, form):
    live = Upstream(copy.deepcopy(model))
    args = {**asdict(model.config), "seed": 1, "distributed": True}
    ebm_prior.attach(model, path)
    ebm_prior.attach(live, path, args=argparse.Namespace(**args) if form == "namespace" else args)
    expected = model.sample(3, 0.7, generator=seeded())
    assert torch.equal(live.sample(3, 0.7, generator=seeded()), expected)
    torch.manual_seed(5)
    first = live.sample(3, 0.7)  # as upstream calls it
    torch.manual_seed(5)
    assert torch.equal(first, live.sample(3, 0.7))


def test_readjustment_of_a_live_upstream_model_is_seen_though_it_replaces_buffers(model, path):
    live = Upstream(model)
    attached = ebm_prior.attach(live, path, args=asdict(model.config))
    before = live.sample(2, 1.0, generator=seeded())
    live.train()
    for _ in range(3):
        live.sample(8, 1.0)
    live.eval()
    for module in live.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean = module.running_mean.clone()
            module.running_var = module.running_var.clone() * 2
    after = live.sample(2, 1.0, generator=seeded())
    assert not torch.equal(after, before)
    u = attached.sample_u(2, generator=seeded())
    assert torch.equal(after, NVAEBackbone(model).logits(u))


def test_a_live_upstream_model_keeps_its_gradients_and_shares_its_tensors(model, path):
    live = Upstream(model)
    attached = ebm_prior.attach(live, path, args=asdict(model.config))
    assert all(p.requires_grad for p in live.parameters())
    mine = {p.data_ptr() for p in attached.backbone.model.parameters()}
    assert mine == {p.data_ptr() for p in live.parameters()}


def test_a_live_upstream_model_without_args_gets_told_what_to_give(model, path):
    with pytest.raises(ValueError, match=r"Upstream is not an nvae.AutoEncoder: give .*args"):
        ebm_prior.attach(Upstream(model), path)


def test_args_of_another_model_are_refused(model, path):
    args = asdict(vae(num_latent=3).config)
    with pytest.raises(ValueError, match="not the model that its arguments describe"):
        ebm_prior.attach(Upstream(model), path, args=args)


def test_the_module_of_the_same_name_can_be_called_too(model, path):
    module = importlib.import_module("ebm_prior.attach")
    assert module.attach(model, path).config == module(model, path).config
