"""A prior's file: what goes in comes out, and what is broken is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ebm_prior
from ebm_prior import checkpoint
from ebm_prior._version import __version__
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.fingerprint import NOT_FINGERPRINTED, fingerprint
from nvae import batchnorm
from tests.ebm_prior.small_vaes import prior, vae
from tests.ebm_prior.toys import LinearGaussian


@pytest.fixture
def model():
    return vae()


@pytest.fixture
def saved(tmp_path, model):
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(model)), step=7)
    return path


def contents(path):
    with safe_open(path, framework="pt") as file:
        return {k: file.get_tensor(k) for k in file.keys()}, file.metadata()


def rewritten(path, change):
    """The file with `change(tensors, metadata)` applied."""
    tensors, metadata = contents(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)


# --- fingerprint


def test_the_fingerprint_sees_every_parameter_and_no_alias_or_statistic(model):
    state = model.state_dict()
    name = fingerprint(state)
    assert len(name) == 64
    assert name == fingerprint(dict(reversed(state.items())))
    ignored = {
        k: v + 1 if k.rpartition(".")[2] in NOT_FINGERPRINTED else v for k, v in state.items()
    }
    assert name == fingerprint(ignored)
    old = {k: v for k, v in state.items() if not k.endswith("weight_normalized")}
    assert name == fingerprint(old)
    for key in ("prior_ftr0", "stem.log_weight_norm", "dec_tower.0.conv.weight"):
        assert name != fingerprint({**state, key: state[key] + 1e-6})
        assert name != fingerprint({**state, key: state[key].flatten()})


def test_readjustment_and_precision_do_not_change_the_fingerprint(model):
    name = fingerprint(model.state_dict())
    batchnorm.readjust(model, temperature=1.0, iterations=2, batch_size=4)
    assert fingerprint(model.state_dict()) == name
    assert fingerprint(model.double().state_dict()) == name


# --- save and load


def test_a_saved_prior_comes_back_bit_for_bit(saved, model):
    original = prior(NVAEBackbone(model))
    loaded = ebm_prior.load(saved, model)
    assert loaded.config == original.config
    state = original.energies.state_dict()
    assert list(loaded.energies.state_dict()) == list(state)
    for key, value in loaded.energies.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(loaded.sample(2, seed=1), original.sample(2, seed=1))
    assert not loaded.training


@pytest.mark.parametrize("network", ["residual", "conv"])
def test_spectral_norm_vectors_come_back_too(tmp_path, network):
    backbone = NVAEBackbone(vae())
    original = prior(backbone, network=network, width=4, spectral_norm=True)
    checkpoint.save(tmp_path / "p.safetensors", original)
    loaded = ebm_prior.load(tmp_path / "p.safetensors", backbone)
    u = torch.ones(1, backbone.layout.dim)
    assert torch.equal(loaded.energy(u, 0), original.energy(u, 0))


def test_the_file_says_what_it_is(saved, model):
    file = checkpoint.read(saved)
    assert file.step == 7
    assert file.version == __version__
    assert file.fingerprint == fingerprint(model.state_dict())
    assert file.bn_statistics is None
    _, metadata = contents(saved)
    assert metadata["format"] == "1"
    assert json.loads(metadata["config"])["max_T"] == 3


def test_statistics_travel_with_the_prior_and_are_used(tmp_path, model):
    stored = {k: v + 1 for k, v in model.state_dict().items() if k.endswith("running_mean")}
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(model, stored)), bn_statistics=stored)
    expected = NVAEBackbone(model, stored)
    u = torch.ones(1, expected.layout.dim)
    for given in (model, NVAEBackbone(model)):
        loaded = ebm_prior.load(path, given)
        assert torch.equal(loaded.backbone.logits(u), expected.logits(u))
    assert not torch.equal(NVAEBackbone(model).logits(u), expected.logits(u))
    checkpoint.save(tmp_path / "again.safetensors", loaded)
    assert checkpoint.read(tmp_path / "again.safetensors").bn_statistics.keys() == stored.keys()


def test_loading_draws_nothing_from_the_callers_random_numbers(saved, model):
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    ebm_prior.load(saved, model)
    assert torch.equal(torch.rand(3), expected)


def test_a_backbone_of_ones_own_works_and_one_that_cannot_take_statistics_says_so(tmp_path):
    backbone = LinearGaussian(dtype=torch.float32)
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(backbone))
    assert ebm_prior.load(path, backbone).config.shapes == backbone.layout.shapes
    checkpoint.save(path, prior(backbone), bn_statistics={"a.running_mean": torch.zeros(1)})
    with pytest.raises(ValueError, match="LinearGaussian has no method with_bn_statistics"):
        ebm_prior.load(path, backbone)


def test_a_backbone_names_itself_if_it_can(tmp_path):
    class Named(LinearGaussian):
        def fingerprint(self):
            return self.name

    backbone = Named(dtype=torch.float32)
    backbone.name = "one"
    checkpoint.save(tmp_path / "p.safetensors", prior(backbone))
    backbone.name = "two"
    with pytest.raises(ValueError, match="trained on the backbone one, got the backbone two"):
        ebm_prior.load(tmp_path / "p.safetensors", backbone)


def test_a_crash_while_writing_leaves_the_old_file(saved, model, monkeypatch):
    before = saved.read_bytes()

    def half(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(saved, prior(NVAEBackbone(model), seed=1))
    assert saved.read_bytes() == before
    assert os.listdir(saved.parent) == [saved.name]


# --- what is refused


def test_another_backbone_is_refused_with_both_fingerprints(saved, model):
    other = vae(seed=1)
    names = [fingerprint(m.state_dict()) for m in (model, other)]
    with pytest.raises(ValueError, match=f"{names[0]}.*{names[1]}"):
        ebm_prior.load(saved, other)


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def cut_in_the_header(path):
    path.write_bytes(path.read_bytes()[:50])


def empty(path):
    path.write_bytes(b"")


def a_pickle(path):
    path.write_bytes(pickle.dumps({"netE0": 1}))


def giant_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + path.read_bytes()[8:])


def without_metadata(path):
    save_file(contents(path)[0], path)


def changed(change):
    return lambda path: rewritten(path, change)


def with_config(**settings):
    def change(_, metadata):
        metadata["config"] = json.dumps({**json.loads(metadata["config"]), **settings})

    return changed(change)


def with_tensor(key, value):
    return changed(lambda tensors, _: tensors.update({key: value}))


BROKEN = {
    "truncated": (truncated, "not a whole .safetensors file"),
    "cut in the header": (cut_in_the_header, "not a whole .safetensors file"),
    "empty": (empty, "not a whole .safetensors file"),
    "a pickle": (a_pickle, "not a whole .safetensors file"),
    "giant header": (giant_header, "not a whole .safetensors file"),
    "missing": (lambda path: path.unlink(), "no such file"),
    "no metadata": (without_metadata, "format number none, expected 1"),
    "newer": (changed(lambda _, m: m.update(format="2")), "format number 2, expected 1"),
    "no fingerprint": (changed(lambda _, m: m.pop("fingerprint")), "lacks 'fingerprint'"),
    "no JSON": (changed(lambda _, m: m.update(config="{")), "unreadable metadata"),
    "deep JSON": (changed(lambda _, m: m.update(config="[" * 10**5)), "unreadable metadata"),
    "a list": (changed(lambda _, m: m.update(config="[]")), "unreadable metadata"),
    "odd step": (changed(lambda _, m: m.update(step="x")), "unreadable metadata"),
    "unknown setting": (with_config(colour=1), "unknown prior settings colour"),
    "wrong type": (with_config(max_T="3"), "max_T is '3'"),
    "endless": (with_config(max_T=10**12), "max_T is"),
    "huge": (with_config(width=2**14), "config and tensors disagree"),
    "other network": (with_config(network="conv"), "missing .* unknown"),
    "many layers": (with_config(shapes=[[1]] * 10**5), "not whole"),
    "many deep layers": (with_config(shapes=[[1]] * 24, depth=24), "not whole"),
    "fewer": (changed(lambda t, _: t.pop("netE0.input.weight")), "1 tensors are missing"),
    "more": (with_tensor("netE9.x", torch.zeros(1)), r"1\s+are unknown \(netE9.x\)"),
    "shape": (with_tensor("netE0.input.bias", torch.zeros(3)), r"shape \(3,\), expected \(8,\)"),
    "NaN": (with_tensor("netE0.input.bias", torch.full((8,), torch.nan)), "NaN or infinite"),
    "bad BN": (with_tensor("bn.x.running_var", torch.tensor(torch.inf)), "NaN or infinite"),
    "BN of another type": (
        with_tensor("bn.x.running_var", torch.ones(1, dtype=torch.float64)),
        "x.running_var are of type torch.float64",
    ),
    "negative BN": (with_tensor("bn.x.running_var", -torch.ones(1)), "negative"),
    "other BN": (with_tensor("bn.x.running_var", torch.ones(1)), "belong to another backbone"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line(saved, model, damage, message):
    damage(saved)
    with pytest.raises(ValueError, match=message) as refused:
        ebm_prior.load(saved, model)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 1000
