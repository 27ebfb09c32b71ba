"""The command `evaluate` on a tiny VAE: rows, report, what is kept, what is refused."""

import functools
import json

import pytest
import torch
from PIL import Image

from ebm_prior import checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.shared import measure, subset
from ebm_prior.commands.shared.rows import Row, summary
from ebm_prior.commands.shared.samples import Sampled
from ebm_prior.joint import JointPrior
from ebm_prior.kinds import build
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes

FEW = ["--max_images", "120", "--num_samples", "50", "--batch_size", "20", "--device", "cpu"]
SETTINGS = {
    "network": "mlp",
    "width": 8,
    "spectral_norm": False,
    "num_steps": 2,
    "b2": 0.05,
    "energy_scale": "none",
    "step_rule": "plain",
}


@pytest.fixture(scope="module", autouse=True)
def _a_hasty_classifier():
    hasty = functools.partial(measure.train_classifier, epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "train_classifier", hasty)
        yield


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A VAE, a diffusion and a joint prior for it, and a prior of another VAE."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("files")
    small_vaes.written(folder / "vae.pt", small_vaes.vae())
    backbone, other = NVAEBackbone(small_vaes.vae()), NVAEBackbone(small_vaes.vae(seed=1))
    prior = small_vaes.prior(backbone)
    checkpoint.save(folder / "diffusion.safetensors", prior)
    joint = {**SETTINGS, "kind": "joint", "max_T": 1, "shapes": backbone.layout.shapes}
    checkpoint.save(folder / "joint.safetensors", build(backbone, type(prior.config)(**joint)))
    ncp = {**joint, "kind": "ncp", "proposals": 8}
    checkpoint.save(folder / "ncp.safetensors", build(backbone, type(prior.config)(**ncp)))
    checkpoint.save(folder / "other.safetensors", small_vaes.prior(other))
    return folder


def evaluate(files, out, *flags, priors=("diffusion", "joint")):
    prior = ["--prior", *(str(files / f"{name}.safetensors") for name in priors)]
    return main(
        [
            "evaluate",
            "--checkpoint",
            str(files / "vae.pt"),
            *prior,
            "--out",
            str(out),
            *FEW,
            *flags,
        ]
    )


def report(out):
    return json.loads((out / "report.json").read_text())


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert evaluate(files, out, "--seeds", "0", "1") == 0
    return out


def test_one_report_holds_every_row_with_its_protocol(finished, files):
    found = report(finished)
    names = ["gaussian", "no_model_chain", "fitted", "ebm", "joint", "reconstruction"]
    assert list(found) == [*names, "protocol"]
    for name in names:
        row = found[name]
        assert {"frechet", "frechet_pixels", "confident", "u_std", "u_std_layers"} <= row.keys()
        assert row["images_per_second"] > 0
        assert [run["seed"] for run in row["per_seed"]] == [0, 1]
        values = [run["frechet"] for run in row["per_seed"]]
        assert values[0] != values[1]
        assert row["frechet"] == pytest.approx(sum(values) / 2)
        assert row["range"]["frechet"] == [min(values), max(values)]
    assert found["gaussian"]["u_std"] == pytest.approx(1, abs=0.1)
    made_of = found["ebm"]["made_of"]
    assert made_of["prior"] == str(files / "diffusion.safetensors")
    assert made_of["config"]["num_steps"] == 2
    protocol = found["protocol"]
    assert (protocol["samples_of_each_row"], protocol["seeds"]) == (50, [0, 1])
    assert len(protocol["sha256"]) == 3
    assert "classifier" in protocol["features"]
    for name in ("comparison.png", "rows.png"):
        with Image.open(finished / name) as picture:
            assert picture.width > 500


def test_rows_draw_what_their_names_say(files, tmp_path, monkeypatch):
    drawn = []
    sample_u = EBMPrior.sample_u

    def noted(self, num, **others):
        drawn.append((type(self), num, others.get("zero_energy", False)))
        return sample_u(self, num, **others)

    monkeypatch.setattr(EBMPrior, "sample_u", noted)
    flags = ["--num_samples", "30", "--no-reconstruction"]
    assert evaluate(files, tmp_path, *flags) == 0
    assert drawn == [
        *((EBMPrior, 20, True), (EBMPrior, 10, True)),
        *((EBMPrior, 20, False), (EBMPrior, 10, False)),
        *((JointPrior, 20, False), (JointPrior, 10, False)),
    ]
    assert "reconstruction" not in report(tmp_path)


def test_a_stopped_evaluation_keeps_its_finished_rows(files, finished, tmp_path, monkeypatch):
    def stopped(*args, **kwargs):
        raise ValueError("stopped here")

    flags = ["--no-reconstruction"]
    with monkeypatch.context() as patch:
        patch.setattr(JointPrior, "sample_u", stopped)
        assert evaluate(files, tmp_path, *flags) == 2
    assert not (tmp_path / "report.json").exists()
    sample_u = JointPrior.sample_u
    with monkeypatch.context() as patch:  # the joint prior's row alone is drawn
        patch.setattr(EBMPrior, "sample_u", stopped)
        patch.setattr(JointPrior, "sample_u", sample_u)
        assert evaluate(files, tmp_path, *flags, "--resume", "auto") == 0
        assert evaluate(files, tmp_path, *flags) == 2  # not asked to go on
    for name in ("gaussian", "no_model_chain", "fitted", "ebm", "joint"):
        expected = report(finished)[name]["per_seed"][0]["frechet"]
        assert report(tmp_path)[name]["frechet"] == pytest.approx(expected, rel=1e-9), name


def test_rows_of_other_settings_are_not_taken(files, tmp_path, monkeypatch):
    flags = ["--no-reconstruction", "--no-controls", "--resume", "auto"]
    assert evaluate(files, tmp_path, *flags, priors=["diffusion"]) == 0
    first = report(tmp_path)["ebm"]["frechet"]
    assert evaluate(files, tmp_path, *flags, "--num_samples", "40", priors=["diffusion"]) == 0
    assert report(tmp_path)["ebm"]["frechet"] != first


def test_two_priors_of_a_kind_are_two_rows_with_the_same_noise(files, tmp_path, capsys):
    flags = ["--no-reconstruction", "--no-controls"]
    assert evaluate(files, tmp_path, *flags, priors=["diffusion", "diffusion"]) == 0
    found = report(tmp_path)
    assert list(found) == ["gaussian", "ebm", "ebm_2", "protocol"]
    assert found["ebm"]["frechet"] == found["ebm_2"]["frechet"]
    told = capsys.readouterr().out
    assert "EBM prior 2" in told
    assert "classifier features, lower is better" in told


def test_importance_resampling_tells_its_effective_sample_size(files, tmp_path, capsys):
    flags = ["--no-reconstruction", "--no-controls"]
    assert evaluate(files, tmp_path, *flags, priors=["ncp"]) == 0
    sizes = report(tmp_path)["ncp"]["effective_sample_size"]
    assert len(sizes) == 2
    assert all(1 < size <= 8 for size in sizes)
    assert "NCP prior: effective sample size of 8 proposals" in capsys.readouterr().out


def test_a_prior_of_another_vae_is_refused_before_any_work(files, tmp_path, capsys):
    out = tmp_path / "new"
    assert evaluate(files, out, priors=["diffusion", "other"]) == 2
    assert "was trained on the backbone" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seeds", "1", "1"], "expected different numbers"),
        (["--temperature", "0"], "expected a positive number"),
        (["--num_samples", "1"], "--num_samples 1: expected at least 2"),
        (["--features", "2048"], "features 2048 need the weights"),
        (["--inception", "missing.pth"], "--inception missing.pth: no such file"),
        (["--fid_dir", "missing"], "--fid_dir missing: no such folder"),
        (["--prior", "missing"], "--prior missing: no such file"),
    ],
)
def test_what_cannot_work_is_one_line(files, tmp_path, capsys, flags, message):
    out = tmp_path / "new"
    assert evaluate(files, out, *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


def test_a_dry_run_touches_nothing(files, tmp_path, capsys):
    assert evaluate(files, tmp_path / "new", "--dry_run") == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 50
    assert not (tmp_path / "new").exists()


def test_a_row_is_the_mean_over_seeds_with_its_range():
    row = Row("ncp", "NCP prior", None, None, "ncp", facts={"a": 1})
    runs = [
        Sampled({"fid": fid, "effective_sample_size": [fid, 4.0]}, torch.empty(0))
        for fid in (2.0, 6.0)
    ]
    found = summary(row, [3, 5], runs)
    assert (found["fid"], found["range"]) == (4.0, {"fid": [2.0, 6.0]})
    assert found["effective_sample_size"] == [4.0, 4.0]
    assert found["made_of"] == {"a": 1}
    assert [run["seed"] for run in found["per_seed"]] == [3, 5]
    alone = summary(row, [3], runs[:1])
    assert "range" not in alone
    assert alone["fid"] == 2.0


def test_the_draws_of_an_image_stand_together_and_memory_bounds_them(monkeypatch):
    assert subset.draws_of(3, 2, 5).tolist() == [0, 0, 1, 1, 2, 2]
    monkeypatch.setattr(subset, "MEMORY", 4 * 5 * 4)
    assert subset.draws_of(3, 2, 5).tolist() == [0, 0, 1, 1]
