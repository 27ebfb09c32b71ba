"""`python -m nvae.evaluate`: its flags, what it writes, and what it refuses."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nvae import checkpoint, evaluate, flags
from nvae.arch import ModelConfig
from nvae.evaluation.blocks import Block
from nvae.evaluation.job import Job
from nvae.model import AutoEncoder
from tests.conftest import nvae_cases

UPSTREAM = {  # flag: default; None marks a switch
    "checkpoint": "/tmp/expr/checkpoint.pt",
    "save": "/tmp/expr",
    "eval_mode": "sample",
    "eval_on_train": None,
    "data": "/tmp/data",
    "readjust_bn": None,
    "temp": 0.7,
    "num_iw_samples": 1000,
    "fid_dir": "/tmp/fid-stats",
    "batch_size": 0,
    "local_rank": 0,
    "world_size": 1,
    "seed": 1,
    "master_address": "127.0.0.1",
}


def tiny(path, dataset="cifar10", seed=0):
    """A checkpoint of a random model, small enough for a test."""
    torch.manual_seed(seed)
    sizes = {"num_preprocess_cells": 1, "num_postprocess_cells": 1, "num_mixture_dec": 2}
    blocks = {"num_preprocess_blocks": 1, "num_postprocess_blocks": 1}
    widths = {"num_channels_enc": 4, "num_channels_dec": 4, "num_latent_per_group": 2}
    config = ModelConfig(dataset, num_groups_per_scale=2, **sizes, **blocks, **widths)
    model = AutoEncoder(config)
    checkpoint.write(path, checkpoint.Checkpoint(model.state_dict(), config, {}))
    return path


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("model") / "checkpoint.pt")


def run(model, folder, *more):
    arguments = ["--checkpoint", str(model), "--save", str(folder), "--device", "cpu", *more]
    assert evaluate.main(arguments) == 0
    return {f.name: np.load(f)["samples"] for f in sorted(folder.glob("*.npz"))}


# --- the command line


def test_upstreams_flags_have_upstreams_types_and_defaults():
    group = flags.parser()._action_groups[2]
    assert group.title == "NVAE's flags"
    actions = {action.dest: action for action in group._group_actions}
    assert actions.keys() == UPSTREAM.keys()
    for name, default in UPSTREAM.items():
        assert actions[name].option_strings == [f"--{name}"]
        assert actions[name].default == (False if default is None else default)
        if default is None:
            assert actions[name].nargs == 0
        else:
            kind = actions[name].type or str
            assert kind is type(default)


def test_help_teaches_by_example_and_does_not_import_torch():
    code = (
        "import sys; from nvae import evaluate\n"
        "try: evaluate.main(['--help'])\n"
        "except SystemExit: sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "examples:" in done.stdout
    assert "--ebm_prior prior.safetensors" in done.stdout


def test_a_dry_run_prints_the_settings_and_does_nothing(tmp_path, capsys):
    folder = tmp_path / "none"
    assert evaluate.main(["--save", str(folder), "--temp", "0.5", "--grid", "--dry_run"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert (printed["temp"], printed["num_samples"], printed["grid"]) == (0.5, 50000, 64)
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval_mode", "encode", "--ebm_prior", "p"], "no part in --eval_mode encode"),
        (["--num_iw_samples", "0"], "--num_iw_samples 0: expected at least 1"),
        (["--pixel_temp", "-1"], "--pixel_temp -1.0: expected a positive number"),
        (["--temp", "0"], "--temp 0.0: expected a positive number"),
        (["--temp", "nan"], "expected a positive number"),
        (["--num_samples", "0"], "--num_samples 0: expected at least 1"),
        (["--seed", "-1"], "--seed -1: expected at least 0"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        flags.settings(arguments)


def test_world_size_starts_that_many_processes_through_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda command: started.append(command) or SimpleNamespace(returncode=3)
    )
    assert evaluate.main(["--world_size", "2", "--temp", "0.9"]) == 3
    assert started[0][-5:] == ["nvae.evaluate", "--world_size", "2", "--temp", "0.9"]
    assert "--nproc_per_node=2" in started[0]


def test_world_size_must_not_contradict_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ValueError, match="torchrun started 3 processes"):
        evaluate.main(["--world_size", "2"])


# --- what it writes


def test_samples_are_written_as_npz_png_and_grid(cifar10, tmp_path):
    samples = run(cifar10, tmp_path, "--num_samples", "5", "--block_size", "3")
    assert list(samples) == ["gpu_0_samples_0.npz", "gpu_0_samples_1.npz"]
    images = np.concatenate(list(samples.values()))
    assert images.shape == (5, 3, 32, 32)
    assert images.dtype == np.float32
    assert images.min() >= 0
    assert images.max() <= 1
    pngs = sorted((tmp_path / "png").iterdir())
    assert [p.name for p in pngs] == [f"{i:05}.png" for i in range(5)]
    stored = np.stack([np.array(Image.open(p)) for p in pngs]).transpose(0, 3, 1, 2)
    assert np.abs(stored / 255 - images).max() <= 0.5 / 255 + 1e-6
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 64


def test_the_settings_the_seed_and_the_commit_are_written_beside_the_samples(cifar10, tmp_path):
    run(cifar10, tmp_path, "--num_samples", "1", "--seed", "7")
    written = json.loads((tmp_path / "args.json").read_text())
    assert written["seed"] == 7
    assert written["checkpoint"] == str(cifar10)
    assert {"version", "commit"} <= written.keys()


@pytest.mark.parametrize(
    ("form", "expected"),
    [("npz", {"gpu_0_samples_0.npz", "args.json"}), ("png", {"png", "args.json"})],
)
def test_only_the_wanted_form_is_written(cifar10, tmp_path, form, expected):
    run(cifar10, tmp_path, "--num_samples", "2", "--format", form, "--grid", "0")
    assert {p.name for p in tmp_path.iterdir()} == expected


def test_the_seed_decides_and_more_samples_leave_the_first_blocks_alone(cifar10, tmp_path):
    common = ("--format", "npz", "--block_size", "4", "--num_samples")
    first = run(cifar10, tmp_path / "a", *common, "4")["gpu_0_samples_0.npz"]
    more = run(cifar10, tmp_path / "b", *common, "8")
    other = run(cifar10, tmp_path / "c", *common, "4", "--seed", "2")["gpu_0_samples_0.npz"]
    assert np.array_equal(first, more["gpu_0_samples_0.npz"])
    assert not np.allclose(first, more["gpu_0_samples_1.npz"])
    assert not np.allclose(first, other)


def test_the_number_of_processes_changes_nothing(cifar10, tmp_path, monkeypatch):
    arguments = ("--num_samples", "5", "--block_size", "2", "--readjust_bn")
    arguments += ("--readjust_iterations", "2")
    alone = run(cifar10, tmp_path / "alone", *arguments)
    for rank in range(2):
        for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", 2)):
            monkeypatch.setenv(name, str(value))
        both = run(cifar10, tmp_path / "both", *arguments)
    for block in range(3):
        theirs = both[f"gpu_{block % 2}_samples_{block // 2}.npz"]
        assert np.array_equal(theirs, alone[f"gpu_0_samples_{block}.npz"])
    names = [sorted(p.name for p in (tmp_path / d / "png").iterdir()) for d in ("alone", "both")]
    assert names[0] == names[1]


@pytest.mark.slow
def test_two_real_processes_draw_what_one_draws(cifar10, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's choice; another rounds differently
    command = [sys.executable, "-m", "nvae.evaluate", "--checkpoint", str(cifar10)]
    command += ["--num_samples", "4", "--block_size", "2", "--device", "cpu", "--format", "npz"]
    command += ["--readjust_bn", "--readjust_iterations", "2"]
    for name, count in (("one", "1"), ("two", "2")):
        more = ["--save", str(tmp_path / name), "--world_size", count]
        subprocess.run([*command, *more], check=True, capture_output=True)
    for block in range(2):
        one = np.load(tmp_path / "one" / f"gpu_0_samples_{block}.npz")["samples"]
        two = np.load(tmp_path / "two" / f"gpu_{block}_samples_0.npz")["samples"]
        assert np.array_equal(one, two)


def test_a_bernoulli_image_is_its_mean(tmp_path):
    model = tiny(tmp_path / "checkpoint.pt", "mnist")
    (images,) = run(model, tmp_path, "--num_samples", "2", "--format", "npz").values()
    assert images.shape == (2, 1, 32, 32)
    assert len(np.unique(images)) > 2


def test_temperature_and_readjusted_statistics_change_the_images(cifar10, tmp_path):
    common = ("--num_samples", "2", "--format", "npz", "--grid", "0")
    variants = {
        "plain": (),
        "hot": ("--temp", "1.0"),
        "readjusted": ("--readjust_bn", "--readjust_iterations", "3"),
    }
    drawn = [
        run(cifar10, tmp_path / name, *common, *more)["gpu_0_samples_0.npz"]
        for name, more in variants.items()
    ]
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize("case", nvae_cases(), ids=lambda case: case.name)
def test_golden_checkpoints_give_finite_images(case, tmp_path):
    (images,) = run(case / "checkpoint.pt", tmp_path, "--num_samples", "2", "--grid", "2").values()
    assert images.shape[2] == images.shape[3]
    assert np.isfinite(images).all()
    assert len(list((tmp_path / "png").iterdir())) == 2


# --- what it refuses


def test_images_that_are_not_finite_are_refused_with_advice():
    model = SimpleNamespace(
        config=SimpleNamespace(data=SimpleNamespace(output="color")),
        sample=lambda count, t, generator: torch.zeros(count, 3, 4, 4).log(),
        decoder_output=lambda logits: SimpleNamespace(sample=lambda t, generator: logits),
    )
    here = SimpleNamespace(device="cpu")
    job = Job(flags.settings([]), here, None, model, {}, {})
    with pytest.raises(ValueError, match=r"4 of 4 images hold NaN .* try --readjust_bn"):
        job.draw(Block(0, 0, 4, 0))


def test_a_missing_checkpoint_and_a_folder_that_cannot_be_are_one_line(tmp_path, cifar10):
    with pytest.raises(ValueError, match="there is no such file"):
        run(tmp_path / "none.pt", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"--save .*file/out cannot be written to"):
        run(cifar10, tmp_path / "file" / "out")


# --- the prior


@pytest.fixture(scope="module")
def prior(cifar10, tmp_path_factory):
    """An untrained prior for the model, with batch-norm statistics of its own."""
    from ebm_prior import EBMPrior, PriorConfig
    from ebm_prior import checkpoint as prior_file
    from ebm_prior.backbones.nvae import NVAEBackbone

    model = checkpoint.load(cifar10)
    backbone = NVAEBackbone(model)
    small = {"network": "mlp", "width": 8, "depth": 1, "spectral_norm": False}
    config = PriorConfig(backbone.layout.shapes, **small, max_T=2, num_steps=2)
    statistics = {k: v + 1 for k, v in model.state_dict().items() if k.endswith("running_var")}
    path = tmp_path_factory.mktemp("prior") / "prior.safetensors"
    prior_file.save(path, EBMPrior(backbone, config), bn_statistics=statistics)
    return path


def test_a_prior_changes_the_samples_and_keeps_the_seed(cifar10, prior, tmp_path):
    common = ("--num_samples", "3", "--format", "npz")
    with_prior = (*common, "--ebm_prior", str(prior))
    (gaussian,) = run(cifar10, tmp_path / "gaussian", *common).values()
    (first,) = run(cifar10, tmp_path / "first", *with_prior).values()
    (again,) = run(cifar10, tmp_path / "again", *with_prior).values()
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)
    assert not np.array_equal(first, gaussian)


def test_readjusting_overrides_the_priors_statistics_and_says_so(cifar10, prior, tmp_path, capsys):
    common = ("--num_samples", "2", "--format", "npz", "--ebm_prior", str(prior))
    readjust = ("--readjust_bn", "--readjust_iterations", "2")
    (plain,) = run(cifar10, tmp_path / "plain", *common).values()
    assert "note" not in capsys.readouterr().err
    (readjusted,) = run(cifar10, tmp_path / "readjusted", *common, *readjust).values()
    assert "replaces the batch-norm statistics that the prior" in capsys.readouterr().err
    assert not np.array_equal(plain, readjusted)
    (cached,) = run(cifar10, tmp_path / "readjusted", *common, *readjust).values()
    assert np.array_equal(cached, readjusted)


def test_a_prior_of_another_backbone_is_refused_with_both_fingerprints(prior, tmp_path):
    other = tiny(tmp_path / "checkpoint.pt", seed=1)
    with pytest.raises(ValueError, match=r"[0-9a-f]{64}.*[0-9a-f]{64}"):
        run(other, tmp_path / "out", "--ebm_prior", str(prior))
    assert not list((tmp_path / "out").glob("*.npz"))
