"""`ebm_prior train` for the baselines and with labels: what is made, kept and refused."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

import ebm_prior
from ebm_prior import checkpoint
from ebm_prior.commands import main
from ebm_prior.coupling import Attribute
from ebm_prior.presets import PRESETS, resolved
from ebm_prior.training import run_state
from nvae import checkpoint as nvae_checkpoint
from tests.conftest import needs_digits
from tests.ebm_prior import small_vaes

needs_digits()
CHEAP = ["--width", "8", "--batch_size", "16", "--log_every", "1", "--device", "cpu"]


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return small_vaes.written(tmp_path_factory.mktemp("vae") / "checkpoint.pt", small_vaes.vae())


def train(vae_file, out, *flags):
    words = ["train", "--checkpoint", str(vae_file), "--preset", "digits", "--out", str(out)]
    return main([*words, "--grid_size", "4", *CHEAP, *flags])


@pytest.mark.parametrize(
    ("kind", "flags"),
    [
        ("joint", ["--num_steps", "2"]),
        ("joint", ["--num_steps", "2", "--sampler", "z", "--b2", "1e-4"]),
        ("joint", ["--num_steps", "2", "--joint_logdet", "released"]),
        ("ncp", ["--proposals", "4"]),
        ("ncp", ["--sampler", "langevin", "--no-context", "--num_steps", "2"]),
    ],
)
def test_every_kind_is_trained_saved_and_drawn_from(vae_file, tmp_path, kind, flags):
    assert train(vae_file, tmp_path, "--prior", kind, "--iterations", "2", *flags) == 0
    prior = ebm_prior.load(tmp_path / "prior.safetensors", nvae_checkpoint.load(vae_file))
    assert prior.config.kind == kind
    assert prior.sample(3, seed=0).shape == (3, 1, 8, 8)
    names = {path.name for path in (tmp_path / "grids").iterdir()}
    assert names == {"gaussian.png", "step_0000002.png"}


@pytest.mark.parametrize("rank", [0, 5])
def test_the_fitted_kind_takes_no_steps_and_samples_with_the_aggregates_spread(
    vae_file, tmp_path, rank, capsys
):
    flags = ["--prior", "fitted", "--rank", str(rank), "--draws", "1"]
    assert train(vae_file, tmp_path, *flags) == 0
    assert "Fitted a Gaussian" in capsys.readouterr().out
    assert not (tmp_path / "last.pt").exists()
    vae = nvae_checkpoint.load(vae_file)
    prior = ebm_prior.load(tmp_path / "prior.safetensors", vae)
    u = prior.sample_u(4000, generator=torch.Generator().manual_seed(0))
    fitted = prior.learned.state_dict()
    variance = fitted["factor"].square().sum(1) + fitted.get("diagonal", torch.zeros(()))
    error = 5 * variance * (2 / len(u)) ** 0.5
    assert ((u.var(0) - variance).abs() < error).all()
    assert train(vae_file, tmp_path, *flags) == 2
    assert "of another run" in capsys.readouterr().err


def test_a_fit_is_found_again_if_it_is_the_same(vae_file, tmp_path, capsys):
    flags = ["--prior", "fitted", "--draws", "1", "--resume", "auto"]
    prior, report = tmp_path / "prior.safetensors", tmp_path / "report.json"
    assert train(vae_file, tmp_path, *flags) == 0
    written, first = prior.read_bytes(), json.loads(report.read_text())
    assert first["posterior_draws"] > 1000
    assert first["prior_sha256"] == hashlib.sha256(written).hexdigest()
    assert train(vae_file, tmp_path, *flags) == 0
    assert "is there already" in capsys.readouterr().err
    for other in (["--rank", "5"], ["--seed", "1"]):
        assert train(vae_file, tmp_path, *flags, *other) == 2
        assert f"{other[0].strip('-')} 0 (now {other[1]})" in capsys.readouterr().err
    other_vae = small_vaes.written(tmp_path / "other.pt", small_vaes.vae(seed=1))
    assert train(other_vae, tmp_path, *flags) == 2
    assert "was trained with backbone" in capsys.readouterr().err
    assert prior.read_bytes() == written
    before = checkpoint.read(prior).learned
    report.unlink()  # stopped before the end
    assert train(vae_file, tmp_path, *flags) == 0
    assert report.exists()
    after = checkpoint.read(prior).learned
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_fit_does_not_take_the_folder_of_a_training(vae_file, tmp_path, capsys):
    assert train(vae_file, tmp_path, "--iterations", "1") == 0
    assert train(vae_file, tmp_path, "--prior", "fitted", "--resume", "auto") == 2
    assert "holds the training of another kind" in capsys.readouterr().err


def test_labels_reach_their_layers_and_the_file_remembers_them(vae_file, tmp_path, capsys):
    flags = ["--attribute", "parity:0", "--attribute", "class:1", "--label_steps", "2"]
    flags += ["--num_steps", "2", "--iterations"]
    assert train(vae_file, tmp_path, *flags, "30") == 0
    assert "% of the labels at t = 0 are right" in capsys.readouterr().out
    config = checkpoint.read(tmp_path / "prior.safetensors").config
    assert config.attributes == (Attribute("parity", 2, (0,)), Attribute("class", 10, (1,)))
    assert config.label_steps == 2
    rows = [json.loads(row) for row in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= rows[-1]["accuracy"] <= 1
    state = run_state.read(tmp_path)
    # Another attribute is another run.
    assert train(vae_file, tmp_path, "--iterations", "30", "--resume", "auto") == 2
    assert "attributes" in capsys.readouterr().err
    assert state["step"] == 30


def test_a_run_with_other_labels_is_another_run(vae_file, tmp_path, capsys):
    def go(shift):
        rows = "\n".join(str((i + shift) % 2) for i in range(1500))
        (tmp_path / "train.csv").write_text(f"tone\n{rows}\n")
        flags = ["--labels", str(tmp_path), "--attribute", "tone:0", "--num_steps", "2"]
        return train(vae_file, tmp_path / "run", *flags, "--iterations", "1", "--resume", "auto")

    assert go(0) == go(0) == 0
    assert go(1) == 2
    assert "was trained with labels" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--attribute", "class"], "expected NAME:LAYERS"),
        (["--attribute", "class:b"], "expected NAME:LAYERS"),
        (["--attribute", "class:7"], "is at layer 7; this hierarchy has layers 0 (top) to 1"),
        (["--attribute", "colour:0"], "digits has class, parity, loop"),
        (["--attribute", "class:0", "--attribute", "loop:0"], "layer 0 is coupled to"),
        (["--attribute", "class:0", "--prior", "joint"], "belongs to --prior diffusion"),
        (["--labels", "."], "--labels without --attribute"),
        (["--prior", "joint", "--sampler", "sir"], "sampler is 'sir', expected one of u, z"),
        (["--prior", "joint", "--max_T", "3"], "max_T"),
        (["--prior", "fitted", "--draws", "0"], "--draws 0"),
    ],
)
def test_what_cannot_work_is_one_line(vae_file, tmp_path, capsys, flags, message):
    assert train(vae_file, tmp_path / "run", "--iterations", "1", *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.splitlines()[-1].startswith("error: ")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_knows_every_kind(preset):
    kinds = ("diffusion", "joint", "ncp", "fitted")
    rows = {kind: resolved(preset, {}, kind) for kind in kinds}
    assert rows["diffusion"] == PRESETS[preset]["settings"]
    assert rows["joint"]["max_T"] == rows["ncp"]["max_T"] == 1
    for row in rows.values():
        assert (row["epochs"] is None) != (row["iterations"] is None)
