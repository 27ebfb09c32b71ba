"""The commands `train` and `sample`, on a small digits VAE with random weights."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ebm_prior
from ebm_prior import checkpoint, parallel
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import COMMANDS, main
from ebm_prior.presets import PRESETS
from ebm_prior.prior import EBMPrior
from ebm_prior.training import run_state
from nvae import checkpoint as nvae_checkpoint
from nvae import data, runtime
from nvae.digest import sha256
from tests.conftest import needs_digits
from tests.ebm_prior import small_vaes
from tests.ebm_prior.test_trainer import trainer
from tests.processes import together

needs_digits()
ROOT = Path(__file__).parent.parent.parent
CHEAP = [
    *("--preset", "digits", "--width", "8", "--num_steps", "2", "--batch_size", "16"),
    *("--grid_size", "4", "--log_every", "1", "--device", "cpu"),
]


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return small_vaes.written(tmp_path_factory.mktemp("vae") / "checkpoint.pt", small_vaes.vae())


def train(vae_file, out, *flags):
    return main(["train", "--checkpoint", str(vae_file), "--out", str(out), *CHEAP, *flags])


def sample(vae_file, run, out, *flags):
    prior = ["--prior", str(run / "prior.safetensors"), "--device", "cpu"]
    return main(["sample", "--checkpoint", str(vae_file), "--out", str(out), *prior, *flags])


@pytest.fixture(scope="module")
def run(vae_file, tmp_path_factory):
    """A finished run of three steps."""
    out = tmp_path_factory.mktemp("run") / "digits"
    assert train(vae_file, out, "--iterations", "3") == 0
    return out


# --- train


def test_a_second_run_in_the_same_folder_is_refused(vae_file, tmp_path, capsys):
    out = tmp_path / "run"
    with runtime.kept(out, runtime.Runtime(torch.device("cpu"))):
        assert train(vae_file, out, "--iterations", "1") == 2
    assert f"another process is running in {out}" in capsys.readouterr().err
    assert train(vae_file, out, "--iterations", "1") == 0


def test_training_writes_what_the_help_says(run):
    assert {path.name for path in run.iterdir()} == {
        *("last.pt", "prior.safetensors", "config.json", "args.json", "metrics.jsonl"),
        *("report.json", "grids", "tensorboard", ".lock"),
    }
    names = {path.name for path in (run / "grids").iterdir()}
    assert names == {"gaussian.png", "step_0000003.png"}
    arguments = json.loads((run / "args.json").read_text())
    assert arguments["settings"]["width"] == 8
    assert arguments["options"]["seed"] == 0
    assert arguments["source"] == PRESETS["digits"]["source"]
    assert {"version", "commit"} <= arguments.keys()
    report = json.loads((run / "report.json").read_text())
    assert report["prior_sha256"] == sha256(run / "prior.safetensors")
    assert (report["step"], report["halvings"]) == (3, 0)
    assert report["protocol"]["settings"] == arguments["settings"]


def test_the_prior_of_a_run_belongs_to_its_checkpoint(run, vae_file, tmp_path):
    vae = nvae_checkpoint.load(vae_file)
    prior = ebm_prior.load(run / "prior.safetensors", vae)
    assert prior.config.preset == "digits"
    assert prior.sample(2, seed=0).shape == (2, 1, 8, 8)
    with pytest.raises(ValueError, match="was trained on the backbone"):
        ebm_prior.load(run / "prior.safetensors", small_vaes.vae(seed=1))


def test_the_last_lines_tell_what_was_written_and_what_comes_next(vae_file, tmp_path, capsys):
    assert train(vae_file, tmp_path / "run", "--iterations", "1") == 0
    told = capsys.readouterr().out
    assert "Trained 1 of 1 steps" in told
    assert "holds prior.safetensors (the prior), last.pt (to go on from), config.json" in told
    assert "report.json" in told
    command = told.strip().splitlines()[-1].split()
    assert command[:4] == ["python", "-m", "ebm_prior", "sample"]
    assert main([*command[3:], "--num_samples", "2", "--device", "cpu"]) == 0


def test_a_run_is_not_overwritten_and_goes_on_when_asked(run, vae_file, tmp_path, capsys):
    assert train(vae_file, run, "--iterations", "3") == 2
    assert "holds last.pt and prior.safetensors of another run" in capsys.readouterr().err
    assert train(vae_file, run, "--iterations", "3", "--resume", "auto") == 0
    assert "going on from step 3" in capsys.readouterr().err
    assert train(vae_file, run, "--iterations", "3", "--resume", "auto", "--lr", "1") == 2
    assert "lr 0.002 (now 1.0)" in capsys.readouterr().err


def test_re_estimated_statistics_are_kept_with_the_prior_and_used_when_going_on(
    vae_file, tmp_path
):
    flags = ["--bn_readjust", "--bn_iterations", "3", "--lr_schedule", "epoch"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train(vae_file, whole, *flags, "--iterations", "4") == 0
    assert train(vae_file, parts, *flags, "--iterations", "2") == 0
    file = checkpoint.read(parts / "prior.safetensors")
    stored = nvae_checkpoint.load(vae_file).state_dict()
    assert file.bn_statistics
    assert all(key.startswith(("dec_tower", "post_process")) for key in file.bn_statistics)
    assert any(not torch.equal(stored[k], v) for k, v in file.bn_statistics.items())
    assert train(vae_file, parts, *flags, "--iterations", "4", "--resume", "auto") == 0
    one, two = (run_state.read(folder) for folder in (whole, parts))
    for state in ("bn_statistics", "energies"):
        a, b = (x[state] if state in x else x["learned"][state] for x in (one, two))
        assert all(torch.equal(a[key], value) for key, value in b.items())


def test_no_epochs_are_refused_by_name(vae_file, tmp_path, capsys):
    assert train(vae_file, tmp_path / "run", "--epochs", "0") == 2
    assert "--epochs 0: expected at least 1" in capsys.readouterr().err


def test_going_on_with_another_checkpoint_is_one_line(vae_file, tmp_path, capsys):
    flags = ["--bn_readjust", "--bn_iterations", "1", "--lr_schedule", "epoch"]
    assert train(vae_file, tmp_path / "run", *flags, "--iterations", "1") == 0
    for told_of, other in (
        ("was trained with backbone", small_vaes.vae(seed=1)),
        ("they belong to another backbone", small_vaes.vae(arch_instance="res_bnswish")),
    ):
        file = small_vaes.written(tmp_path / "other.pt", other)
        again = [*flags, "--iterations", "2", "--resume", "auto"]
        assert train(file, tmp_path / "run", *again) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("error: ")
        assert told_of in told


def test_statistics_of_a_wider_model_are_refused():
    model = small_vaes.vae()
    name = next(key for key in model.state_dict() if key.endswith("running_mean"))
    with pytest.raises(ValueError, match=r"have shape \(99,\).*belong to another backbone"):
        NVAEBackbone(model).with_bn_statistics({name: torch.zeros(99)})


def test_a_dry_run_prints_the_settings_and_touches_nothing(vae_file, tmp_path, capsys):
    assert train(vae_file, tmp_path / "run", "--dry_run", "--lr", "5", "--epochs", "2") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["lr"] == 5
    assert (told["settings"]["epochs"], told["settings"]["iterations"]) == (2, None)
    assert told["paper"] == PRESETS["digits"]["paper"]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--checkpoint", "missing.pt"], "--checkpoint missing.pt: no such file"),
        (["--data", "missing"], "--data missing: no such folder"),
        (["--out", "{file}"], "is a file; expected a folder"),
        (["--b2", "-1"], "b2 is -1.0, expected a positive number"),
        (["--ema", "1"], "ema is 1.0"),
        (["--iterations", "0"], "iterations is 0, expected 1"),
        (["--dataset", "cifar10"], "give --data, the folder that holds the images of cifar10"),
        (["--batch_size", "1501"], "fewer than one batch"),
        (["--network", "residual", "--b2", "0"], "b2 is 0.0"),
        (["--device", "cuda:99"], "cuda"),
        (["--plain", "--recompute"], "--plain goes without --recompute"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(vae_file, tmp_path, capsys, flags, message):
    file = tmp_path / "file"
    file.touch()
    flags = [flag.format(file=file) for flag in flags]
    assert train(vae_file, tmp_path / "run", "--iterations", "1", *flags) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.splitlines()[-1].startswith("error: ")
    assert not (tmp_path / "run").exists()


def test_the_images_are_those_for_training_and_never_flipped(vae_file, tmp_path, monkeypatch):
    asked, load = [], data.load

    def noted(name, root, train, **others):
        asked.append((train, others["augment"]))
        return load(name, root, train, **others)

    monkeypatch.setattr(data, "load", noted)
    assert train(vae_file, tmp_path / "run", "--iterations", "1") == 0
    assert asked == [(True, False)]


def test_a_preset_for_other_images_is_remarked_upon(vae_file, tmp_path, capsys):
    flags = ["--preset", "celeba64", "--network", "mlp", "--iterations", "1", "--no-bn_readjust"]
    assert train(vae_file, tmp_path / "run", *flags) == 0
    assert "preset celeba64 is for celeba_64, the VAE is one of digits" in capsys.readouterr().err


# --- sample


def test_samples_are_written_as_pictures_numbers_and_a_grid(run, vae_file, tmp_path, capsys):
    flags = ["--num_samples", "6", "--batch_size", "4", "--progressive"]
    assert sample(vae_file, run, tmp_path / "out", *flags) == 0
    assert "6 images in" in capsys.readouterr().out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"png", "samples.npz", "grid.png", "progressive.png", "report.json"}
    samples = np.load(tmp_path / "out" / "samples.npz")["samples"]
    assert samples.shape == (6, 1, 8, 8)
    assert samples.dtype == np.float32
    assert 0 <= samples.min() < samples.max() <= 1
    for index, image in enumerate(samples):
        with Image.open(tmp_path / "out" / "png" / f"{index:05}.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), np.round(255 * image[0]))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    protocol = report["protocol"]
    assert report["images"] == 6
    assert protocol["sha256"] == {
        "checkpoint": sha256(vae_file),
        "prior": sha256(run / "prior.safetensors"),
    }
    assert (protocol["seed"], protocol["temperature"], protocol["prior_step"]) == (0, 1.0, 3)


def test_samples_depend_on_seed_and_block_and_not_on_how_many_follow(run, vae_file, tmp_path):
    def drawn(name, *flags):
        out = tmp_path / name
        assert sample(vae_file, run, out, "--format", "npz", "--grid", "0", *flags) == 0
        return np.load(out / "samples.npz")["samples"]

    eight = drawn("eight", "--num_samples", "8", "--batch_size", "4")
    four = drawn("four", "--num_samples", "4", "--batch_size", "4")
    other = drawn("other", "--num_samples", "4", "--batch_size", "4", "--seed", "1")
    np.testing.assert_array_equal(eight[:4], four)
    assert not np.array_equal(four, other)
    assert not np.array_equal(eight[:4], eight[4:])


def test_the_fast_path_draws_what_the_plain_one_does_and_bf16_nearly(run, vae_file, tmp_path):
    found = {}
    for name, flags in {
        "plain": ["--plain"],
        "fast": [],
        "recomputed": ["--recompute"],
        "bf16": ["--precision", "bf16"],
    }.items():
        flags = ["--num_samples", "4", "--format", "npz", *flags]
        assert sample(vae_file, run, tmp_path / name, *flags) == 0
        found[name] = np.load(tmp_path / name / "samples.npz")["samples"]
        protocol = json.loads((tmp_path / name / "report.json").read_text())["protocol"]
        assert (
            protocol["path"]
            == {
                "plain": "plain",
                "fast": "fast, float32",
                "recomputed": "fast, float32, recomputed",
                "bf16": "fast, bf16",
            }[name]
        )
    for name in ("fast", "recomputed"):
        np.testing.assert_allclose(found[name], found["plain"], atol=1e-4)
    difference = np.abs(found["bf16"] - found["plain"]).mean()
    assert 0 < difference < 0.02


def test_pictures_of_two_runs_are_not_mixed(run, vae_file, tmp_path, capsys):
    assert sample(vae_file, run, tmp_path, "--num_samples", "3") == 0
    assert sample(vae_file, run, tmp_path, "--num_samples", "3") == 0
    assert sample(vae_file, run, tmp_path, "--num_samples", "2") == 2
    assert "holds 1 images of another run" in capsys.readouterr().err


def test_a_dry_run_of_sampling_prints_the_settings(run, vae_file, tmp_path, capsys):
    assert sample(vae_file, run, tmp_path / "out", "--dry_run", "--seed", "4") == 0
    assert json.loads(capsys.readouterr().out)["seed"] == 4
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--num_samples", "0"], "--num_samples 0: expected at least 1"),
        (["--temperature", "-1"], "expected a positive number"),
        (["--prior", "missing"], "--prior missing: no such file"),
        (["--plain", "--precision", "bf16"], "--plain goes without"),
    ],
)
def test_bad_sampling_flags_are_one_line(run, vae_file, tmp_path, capsys, flags, message):
    assert sample(vae_file, run, tmp_path, *flags) == 2
    assert message in capsys.readouterr().err


# --- several processes, and the entry

SEVEN = ["--num_samples", "7", "--batch_size", "2"]


def _train_a_toy(rank, out):
    with runtime.started("cpu"):
        training = trainer(out, ema=0.9, prior={"spectral_norm": True})
        drawn = parallel.gather(torch.randn(4, generator=training.generator))
        assert not torch.equal(drawn[0], drawn[1]), "the processes draw the same noise"
        assert training.run().done
        assert parallel.alike(training.prior.energies)
        with torch.no_grad():
            next(training.prior.energies.parameters()).add_(rank)
        assert not parallel.alike(training.prior.energies)


def test_two_processes_learn_one_prior_from_noise_of_their_own(tmp_path):
    together(_train_a_toy, tmp_path)


def _train(rank, vae, out):
    with (out.parent / f"{rank}.txt").open("w") as told, contextlib.redirect_stderr(told):
        bn = ["--bn_readjust", "--bn_iterations", "2"]
        assert train(vae, out, "--iterations", "2", *bn) == 0


def test_two_processes_train_one_prior(vae_file, tmp_path):
    together(_train, vae_file, tmp_path / "run")
    assert "drifted apart" not in (tmp_path / "0.txt").read_text()
    assert (tmp_path / "run" / "prior.safetensors").is_file()
    assert run_state.read(tmp_path / "run")["facts"]["processes"] == 2
    assert len(run_state.read(tmp_path / "run")["rng"]) == 2


def _sample(rank, vae, run, out):
    assert sample(vae, run, out, *SEVEN) == 0


def test_two_processes_draw_the_images_of_one(run, vae_file, tmp_path):
    together(_sample, vae_file, run, tmp_path / "two")
    assert sample(vae_file, run, tmp_path / "one", *SEVEN) == 0
    one, two = (np.load(tmp_path / name / "samples.npz")["samples"] for name in ("one", "two"))
    np.testing.assert_allclose(one, two, atol=1e-5)
    grids = [(tmp_path / name / "grid.png").read_bytes() for name in ("one", "two")]
    assert grids[0] == grids[1]


def test_a_full_gpu_is_one_line_with_advice(run, vae_file, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(EBMPrior, "sample_u", full)
    monkeypatch.delenv("EBM_DEBUG", raising=False)
    assert sample(vae_file, run, tmp_path, "--num_samples", "1") == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "error: CUDA out of memory; a smaller --batch_size needs less memory"


def test_every_command_has_what_the_entry_needs():
    from ebm_prior.commands import command

    for name in COMMANDS:
        module = command(name)
        assert module.HELP
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_naming_a_command_imports_that_one_alone():
    code = (
        "import sys; from ebm_prior.commands import parser; parser(['train']);"
        "print([m for m in ('torch', 'ebm_prior.commands.sample') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert told.stdout.strip() == "[]"
