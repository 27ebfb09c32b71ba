"""What `nvae.evaluate` measures: likelihood, FID, reconstructions, latents; and its BN cache."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import linalg

from nvae import batchnorm, checkpoint, evaluate, feature_networks, fid_stats, flags
from nvae import data as data_sets
from nvae.arch import ModelConfig
from nvae.distributions import NormalDecoder
from nvae.evaluation import bn_cache, source
from nvae.likelihood import bounds
from nvae.model import AutoEncoder
from nvae.seeds import seeded


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A checkpoint of a random model of 8x8 digits."""
    torch.manual_seed(0)
    sizes = {"num_preprocess_cells": 1, "num_postprocess_cells": 1, "num_mixture_dec": 2}
    blocks = {"num_preprocess_blocks": 1, "num_postprocess_blocks": 1}
    widths = {"num_channels_enc": 4, "num_channels_dec": 4, "num_latent_per_group": 2}
    config = ModelConfig("digits", num_groups_per_scale=2, **sizes, **blocks, **widths)
    state = AutoEncoder(config).state_dict()
    path = tmp_path_factory.mktemp("model") / "checkpoint.pt"
    checkpoint.write(path, checkpoint.Checkpoint(state, config, {"batch_size": 30}))
    return path


@pytest.fixture(autouse=True)
def _no_pictures_at_upstreams_default(monkeypatch):
    monkeypatch.setattr(flags, "NO_DATA", "/no/such/folder")


@pytest.fixture(scope="module")
def statistics(tmp_path_factory):
    """Reference statistics of the digits under the random network."""
    folder = tmp_path_factory.mktemp("stats")
    arguments = ["--dataset", "digits", "--data", "none", "--fid_dir", str(folder)]
    assert fid_stats.main([*arguments, "--features", "random", "--device", "cpu"]) == 0
    return folder


def run(model, folder, *more):
    arguments = ["--checkpoint", str(model), "--save", str(folder), "--device", "cpu"]
    assert evaluate.main([*arguments, *more]) == 0
    report = folder / "report.json"
    return json.loads(report.read_text()) if report.exists() else {}


# --- likelihood


def test_evaluate_prints_upstreams_lines_and_reports_the_protocol(digits, tmp_path, capsys):
    mode = ("--eval_mode", "evaluate", "--num_iw_samples", "3")
    report = run(digits, tmp_path, *mode)
    lines = dict(line.rsplit(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines.keys() == {
        "final valid nelbo",
        "final valid neg log p",
        "final valid nelbo in bpd",
        "final valid neg log p in bpd",
    }
    assert float(lines["final valid nelbo"]) == pytest.approx(report["nelbo"], abs=1e-5)
    assert report["neg_log_p"] < report["nelbo"]
    assert report["nelbo_bpd"] == pytest.approx(report["nelbo"] / (64 * np.log(2)))
    protocol = report["protocol"]
    assert (protocol["num_images"], protocol["num_iw_samples"]) == (297, 3)
    assert protocol["batch_size"] == 30  # the training's, as no other was given
    assert protocol["images"] == "digits, held-out images"

    model = checkpoint.load(digits)
    images = data_sets.load("digits", None, False)
    x = torch.stack([images[i] for i in range(297)])
    nelbo = [
        bounds(model, part, 3, generator=seeded("cpu", 1, block))[0]
        for block, part in enumerate(x.split(30))
    ]
    assert report["nelbo"] == pytest.approx(torch.cat(nelbo).mean().item(), rel=1e-5)


# --- FID


def reference_distance(a, b):
    """SciPy's, from features."""
    a, b = (x.double().numpy() for x in (a, b))
    cov_a, cov_b = np.cov(a.T), np.cov(b.T)
    half = linalg.sqrtm(cov_a + 1e-13 * np.eye(len(cov_a))).real
    root = np.sqrt(np.linalg.eigvalsh(half @ cov_b @ half).clip(0)).sum()
    shift = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return shift + np.trace(cov_a) + np.trace(cov_b) - 2 * root


def fid_of(statistics, samples=70, *more):
    common = ("--eval_mode", "evaluate_fid", "--features", "random", "--fid_dir", str(statistics))
    return (*common, "--num_samples", str(samples), *more)


def test_fid_counts_exactly_and_agrees_with_scipy(digits, statistics, tmp_path, capsys):
    report = run(digits, tmp_path, *fid_of(statistics, 70, "--num_reconstructions", "45"))
    protocol = report["protocol"]
    assert (protocol["num_samples"], protocol["num_reconstructions"]) == (70, 45)
    assert protocol["comparable"] is False
    assert protocol["reference_protocol"]["num_images"] == 1500
    assert {"checkpoint_sha256", "reference_sha256", "network_sha256"} <= protocol.keys()
    said = capsys.readouterr().out
    assert "not comparable with any FID" in said
    assert "fid is" not in said

    model, network = checkpoint.load(digits), feature_networks.network(None, "random")
    drawn = []
    for block, count in enumerate((30, 30, 10)):
        with torch.no_grad():
            logits = model.sample(count, 1.0, generator=seeded("cpu", 1, block))
            drawn.append(model.decoder_output(logits).mean())
    images = data_sets.load("digits", None, True)
    reference = network(torch.stack([images[i] for i in range(1500)])).pooled
    expected = reference_distance(reference, network(torch.cat(drawn)).pooled)
    assert report["gaussian"]["fid_random"] == pytest.approx(expected, rel=1e-3)
    assert report["gaussian"].keys() == {"fid_random", "kid_random", "kid_random_std"}
    assert report["reconstruction"]["fid_random"] > 0


@pytest.mark.slow
def test_the_whole_inception_network_gives_fid_kid_and_is(digits, tmp_path, capsys):
    from nvae import inception

    network = inception.Inception()
    state = {f"{n}.weight": u.weight.detach() * 2 for n, u in network.units().items()}
    state |= {f"{n}.bias": u.bias.detach() for n, u in network.units().items()}
    state |= {"fc.weight": torch.randn(1008, 2048), "fc.bias": torch.randn(1008)}
    torch.save(state, tmp_path / "weights.pth")
    weights = ("--inception", str(tmp_path / "weights.pth"), "--device", "cpu")
    folder = ("--fid_dir", str(tmp_path))
    arguments = ("--dataset", "digits", "--data", "none", "--max_samples", "30")
    assert fid_stats.main([*arguments, *folder, *weights]) == 0
    mode = ("--eval_mode", "evaluate_fid", "--num_samples", "24")
    report = run(digits, tmp_path, *mode, *folder, *weights)
    assert report["gaussian"].keys() == {"fid", "kid", "kid_std", "is", "is_std"}
    assert report["gaussian"]["fid"] > 0
    assert report["protocol"]["comparable"] is True
    assert "\nfid is " in capsys.readouterr().out


def test_two_processes_give_the_value_of_one(digits, statistics, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # torchrun's choice; another rounds differently
    arguments = fid_of(statistics, 70, "--num_reconstructions", "45", "--readjust_bn")
    arguments += ("--readjust_iterations", "2")
    one = run(digits, tmp_path / "one", *arguments)
    command = [sys.executable, "-m", "nvae.evaluate", "--checkpoint", str(digits)]
    command += ["--save", str(tmp_path / "two"), "--device", "cpu", "--world_size", "2"]
    subprocess.run([*command, *arguments], check=True, capture_output=True)
    two = json.loads((tmp_path / "two" / "report.json").read_text())
    assert two["protocol"]["processes"] == 2
    assert two["gaussian"] == pytest.approx(one["gaussian"], rel=1e-9)
    assert two["reconstruction"] == pytest.approx(one["reconstruction"], rel=1e-9)


def test_the_temperature_is_honoured_and_a_flag_ignores_it_as_upstream(
    digits, statistics, tmp_path
):
    def value(name, *more):
        return run(digits, tmp_path / name, *fid_of(statistics, 40, *more))["gaussian"]

    plain = value("plain")
    assert value("one", "--temp", "1") == plain
    assert value("cold", "--temp", "0.5") != plain
    assert value("upstream", "--temp", "0.5", "--upstream_temp") == plain


def test_missing_statistics_name_the_command_that_writes_them(digits, tmp_path):
    with pytest.raises(ValueError, match=r"nvae\.fid_stats --dataset digits .*--features random"):
        run(digits, tmp_path, *fid_of(tmp_path))


def test_missing_weights_are_one_message(digits, tmp_path):
    with pytest.raises(ValueError, match="need the weights of FID's Inception network"):
        run(digits, tmp_path, "--eval_mode", "evaluate_fid")


def test_a_prior_is_measured_under_its_own_key(digits, statistics, tmp_path):
    from ebm_prior import EBMPrior, PriorConfig
    from ebm_prior import checkpoint as prior_file
    from ebm_prior.backbones.nvae import NVAEBackbone

    backbone = NVAEBackbone(checkpoint.load(digits))
    small = {"network": "mlp", "width": 8, "depth": 1, "spectral_norm": False}
    config = PriorConfig(backbone.layout.shapes, **small, max_T=2, num_steps=2)
    prior_file.save(tmp_path / "prior.safetensors", EBMPrior(backbone, config))
    gaussian = run(digits, tmp_path / "a", *fid_of(statistics, 40))
    prior = ("--ebm_prior", str(tmp_path / "prior.safetensors"))
    ebm = run(digits, tmp_path / "b", *fid_of(statistics, 40, *prior))
    assert ebm["ebm"]["fid_random"] != gaussian["gaussian"]["fid_random"]
    assert len(ebm["protocol"]["prior_sha256"]) == 64


# --- reference statistics


def test_a_folder_of_pictures_is_compared_with_statistics(statistics, tmp_path, capsys):
    images = data_sets.load("digits", None, True)
    (tmp_path / "png").mkdir()
    for i in range(40):
        levels = (images[i][0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(levels).save(tmp_path / "png" / f"{i:03}.png")
    arguments = ["--dataset", "folder", "--image_size", "8", "--data", str(tmp_path / "png")]
    arguments += ["--fid_dir", str(tmp_path), "--features", "random", "--device", "cpu"]
    against = ["--against", str(statistics / "digits_random.npz"), "--max_samples", "30"]
    assert fid_stats.main([*arguments, *against]) == 0
    report = json.loads((tmp_path / "folder_random.json").read_text())
    assert report["protocol"]["num_images"] == 30
    assert report["protocol"]["against_protocol"]["num_images"] == 1500
    assert report["fid_random"] > 0
    assert "fid_random is" in capsys.readouterr().out


def test_flips_belong_to_the_seed(tmp_path):
    def mean(*more):
        arguments = ["--dataset", "folder", "--image_size", "8", "--data", str(tmp_path)]
        arguments += ["--fid_dir", str(tmp_path), "--features", "random", "--device", "cpu"]
        assert fid_stats.main([*arguments, "--batch_size", "7", *more]) == 0
        with np.load(tmp_path / "folder_random.npz") as file:
            return file["mu"]

    for i, levels in enumerate(np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3))):
        Image.fromarray(levels.astype(np.uint8)).save(tmp_path / f"{i:02}.png")
    flipped = mean("--flip")
    assert not np.array_equal(mean(), flipped)
    assert np.array_equal(flipped, mean("--flip"))
    assert not np.array_equal(flipped, mean("--flip", "--seed", "2"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max_samples", "1"], "--max_samples 1: expected at least 2"),
        (["--dataset", "folder"], "--image_size is needed for --dataset folder"),
    ],
)
def test_flags_of_the_statistics_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        fid_stats.main(arguments)


# --- own images


def test_one_picture_or_one_sample_is_too_little(digits, tmp_path):
    picture = tmp_path / "one.png"
    picture.touch()
    with pytest.raises(ValueError, match="is a file; give the folder"):
        run(digits, tmp_path, "--eval_mode", "reconstruct", "--data", str(picture))
    with pytest.raises(ValueError, match="--num_samples 1: expected at least 2"):
        run(digits, tmp_path, "--eval_mode", "evaluate_fid", "--num_samples", "1")


def test_statistics_name_a_data_folder_that_is_not_there(tmp_path):
    arguments = ["--dataset", "cifar10", "--data", str(tmp_path / "typo"), "--device", "cpu"]
    with pytest.raises(ValueError, match="typo is not a folder; expected the one that holds cif"):
        fid_stats.main([*arguments, "--fid_dir", str(tmp_path), "--features", "random"])


def test_a_folder_without_pictures_is_not_taken_for_the_digits(digits, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(ValueError, match=rf"--data .*{folder}: no pictures there"):
            run(digits, tmp_path, "--eval_mode", "reconstruct", "--data", str(tmp_path / folder))


def test_own_pictures_come_out_in_pairs(digits, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, shape in enumerate([(20, 30, 3), (8, 8, 3), (64, 9, 3)]):
        levels = np.random.default_rng(i).integers(0, 256, shape).astype(np.uint8)
        Image.fromarray(levels).save(pictures / f"{i}.png")
    out = tmp_path / "out"
    run(digits, out, "--eval_mode", "reconstruct", "--block_size", "2", "--data", str(pictures))
    assert len(list((out / "png").glob("*_original.png"))) == 3
    assert len(list((out / "png").glob("*_reconstruction.png"))) == 3
    with np.load(out / "gpu_0_reconstructions_1.npz") as file:
        assert file["index"].tolist() == [2]
        originals = file["originals"]
        assert file["reconstructions"].shape == originals.shape == (1, 1, 8, 8)
    np.testing.assert_allclose(originals * 16, (originals * 16).round(), atol=1e-5)
    with Image.open(out / "reconstructions.png") as grid:
        assert grid.width > grid.height > 8


def test_encoded_latents_are_those_of_the_posterior_and_give_the_image_back(digits, tmp_path):
    run(digits, tmp_path, "--eval_mode", "encode", "--num_samples", "5", "--block_size", "5")
    with np.load(tmp_path / "gpu_0_latents_0.npz") as file:
        found = {name: torch.from_numpy(file[name]) for name in file.files}
    model = checkpoint.load(digits)
    shapes = model.latent_shapes
    z = [found[f"z_{i}"] for i in range(len(shapes))]
    assert [tuple(z_i.shape[1:]) for z_i in z] == shapes
    assert found["u"].shape == (5, sum(z_i[0].numel() for z_i in z))
    split = found["u"].split([z_i[0].numel() for z_i in z], 1)
    u = [part.view(5, *shape) for part, shape in zip(split, shapes, strict=True)]
    images = source.load(flags.NO_DATA, model.config, train=False)
    x = torch.stack([images[i] for i in range(5)])
    with torch.no_grad():
        again = model(x, generator=seeded("cpu", 1, 0))
        torch.testing.assert_close(list(z), again.z)
        torch.testing.assert_close(model.sample(5, 1.0, u=u), again.logits, rtol=1e-3, atol=1e-3)


def test_pictures_take_the_values_that_the_model_knows(tmp_path):
    levels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "0.png")
    binary = source.load(str(tmp_path), ModelConfig("mnist"), train=False)
    assert binary.name.startswith("pictures in")
    assert set(binary[0].unique().tolist()) == {0, 1}
    assert torch.equal(binary[0], binary[0])
    coarse = source.load(str(tmp_path), ModelConfig("cifar10", num_x_bits=5), train=False)
    assert len(coarse[0].unique()) == 32


# --- temperature of the pixels


def test_every_decoder_honours_the_pixel_temperature(generator):
    logits = torch.randn(2, 6, 4, 4, generator=generator)
    decoder, noise = NormalDecoder(logits), torch.randn(2, 3, 4, 4, generator=generator) / 20
    cold = decoder.sample(0.5, noise=noise)
    middle = (decoder.sample(0.0, noise=noise) + decoder.sample(noise=noise)) / 2
    inside = (middle > 0.1) & (middle < 0.9) & (cold > 0) & (cold < 1)
    assert inside.any()
    torch.testing.assert_close(cold[inside], middle[inside])


def test_the_mode_decides_about_pixels_and_temperature_unless_told():
    settings = flags.settings(["--eval_mode", "evaluate_fid"])
    assert (settings.pixels, settings.temp, settings.readjust_batch) == ("mean", 1.0, 2)
    assert flags.settings(["--eval_mode", "evaluate_fid", "--temp=0.7"]).temp == 0.7
    settings = flags.settings([])
    assert (settings.pixels, settings.temp, settings.readjust_batch) == ("sample", 0.7, 16)


# --- the cache


def test_statistics_are_estimated_once_and_found_again(digits, tmp_path, monkeypatch):
    question = {"checkpoint_sha256": "0" * 64, "seed": 1, "iterations": 2, "batch_size": 4}
    first, second = checkpoint.load(digits), checkpoint.load(digits)
    assert bn_cache.readjust(first, tmp_path, temperature=0.7, **question) == "estimated"
    real = batchnorm.readjust
    calls = []

    def counted(*args, **kwargs):
        calls.append(kwargs["temperature"])
        return real(*args, **kwargs)

    monkeypatch.setattr(batchnorm, "readjust", counted)
    before = {name: buffer for name, buffer in second.named_buffers()}
    assert bn_cache.readjust(second, tmp_path, temperature=0.7, **question) == "cached"
    assert calls == []
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
    assert all(buffer is before[name] for name, buffer in second.named_buffers())
    (file,) = tmp_path.iterdir()
    for changed in ({"temperature": 0.70001}, {"seed": 2}, {"checkpoint_sha256": "1" * 64}):
        again = {"temperature": 0.7, **question, **changed}
        assert bn_cache.readjust(second, tmp_path, **again) == "estimated"
    assert calls == [0.70001, 0.7, 0.7]
    os.truncate(file, 40)
    assert bn_cache.readjust(second, tmp_path, temperature=0.7, **question) == "estimated"


def test_sampling_with_cached_statistics_gives_the_same_images(digits, tmp_path):
    def samples(name):
        readjust = ("--readjust_bn", "--readjust_iterations", "2", "--bn_cache", str(tmp_path))
        run(digits, tmp_path / name, "--num_samples", "3", "--format", "npz", *readjust)
        return np.load(tmp_path / name / "gpu_0_samples_0.npz")["samples"]

    first = samples("first")
    assert len(list(tmp_path.glob("bn_*.safetensors"))) == 1
    assert np.array_equal(first, samples("second"))
