"""The authors' files through the command."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import ebm_prior
from ebm_prior import checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone, bn_statistics
from ebm_prior.commands import convert
from tests.conftest import golden_files
from tests.ebm_prior.small_vaes import prior, vae, written


def run(*arguments):
    parser = argparse.ArgumentParser()
    convert.add_arguments(parser)
    return convert.run(parser.parse_args([str(a) for a in (*arguments, "--device", "cpu")]))


@pytest.fixture
def model():
    return vae(dataset="cifar10", num_latent=4)  # latents 4x8x8 and 4x16x16


@pytest.fixture
def backbone(tmp_path, model):
    return written(tmp_path / "checkpoint.pt", model)


@pytest.mark.parametrize("authors", golden_files("checkpoint_layout.pth"), ids=lambda p: p.stem)
def test_golden_authors_file_becomes_a_prior_that_samples(tmp_path, model, backbone, authors):
    out = tmp_path / "prior.safetensors"
    arguments = ("--authors", authors, "--checkpoint", backbone, "--out", out)
    settings = ("--preset", "celeba256", "--num_steps", 2, "--b2", 1e-5)
    assert run(*arguments, *settings) == 0
    loaded = ebm_prior.load(out, model)
    config = loaded.config
    assert (config.network, config.width, config.preset) == ("residual", 4, "celeba256")
    assert (config.max_T, config.num_steps, config.b2) == (3, 2, 1e-5)
    assert checkpoint.read(out).bn_statistics is None
    assert loaded.sample(2, seed=0).isfinite().all()


def test_statistics_are_estimated_again_where_the_authors_did(
    tmp_path, model, backbone, monkeypatch
):
    original = prior(NVAEBackbone(model), network="residual", width=4, spectral_norm=True)
    nets = {f"netE{i}": original.energies.layer(i).state_dict() for i in range(2)}
    torch.save(nets, tmp_path / "authors.pth")
    monkeypatch.setitem(convert.presets.PRESETS["cifar10"]["settings"], "bn_iterations", 2)
    out = tmp_path / "prior.safetensors"
    arguments = ("--authors", tmp_path / "authors.pth", "--checkpoint", backbone, "--out", out)
    assert run(*arguments, "--preset", "cifar10") == 0
    stored = checkpoint.read(out).bn_statistics
    before = bn_statistics(model)
    assert stored.keys() == before.keys()
    assert all(key.startswith(("dec_tower", "post_process")) for key in stored)
    assert any(not torch.equal(stored[key], value) for key, value in before.items())
    again = tmp_path / "again.safetensors"
    assert run(*arguments[:-1], again, "--preset", "cifar10") == 0
    repeated = checkpoint.read(again).bn_statistics
    assert all(torch.equal(stored[key], repeated[key]) for key in stored)


def test_a_dry_run_prints_the_settings_and_writes_nothing(tmp_path, capsys):
    arguments = ("--authors", "a.pth", "--checkpoint", "c.pt", "--out", tmp_path / "p.safetensors")
    assert run(*arguments, "--preset", "cifar10", "--max_T", 6, "--dry_run") == 0
    settings = json.loads(capsys.readouterr().out)
    assert (settings["max_T"], settings["num_steps"]) == (6, 50)
    assert not list(tmp_path.iterdir())


def test_a_prior_that_is_there_already_is_not_written_over(tmp_path, backbone):
    out = tmp_path / "p.safetensors"
    out.write_bytes(b"hours of training")
    with pytest.raises(ValueError, match=r"p\.safetensors is there already; give another --out"):
        run("--authors", "a", "--checkpoint", backbone, "--out", out, "--preset", "cifar10")
    assert out.read_bytes() == b"hours of training"


def test_a_file_for_other_latents_is_refused(tmp_path, backbone):
    other = NVAEBackbone(vae(dataset="cifar10", num_latent=3))
    original = prior(other, network="conv", width=4)
    nets = {f"netE{i}": original.energies.layer(i).state_dict() for i in range(2)}
    torch.save(nets, tmp_path / "authors.pth")
    with pytest.raises(ValueError, match="is for latents 3x8x8, 3x16x16, the backbone has 4x8x8"):
        run(
            "--authors",
            tmp_path / "authors.pth",
            "--checkpoint",
            backbone,
            "--preset",
            "celeba256",
            "--out",
            tmp_path / "p.safetensors",
        )
    assert not (tmp_path / "p.safetensors").exists()
