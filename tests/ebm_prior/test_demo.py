import functools
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

import ebm_prior
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.demo import BACKBONE, BACKBONE_KL1, compare
from ebm_prior.commands.demo.measure import KINDS, draw
from ebm_prior.commands.demo.training import Job
from ebm_prior.commands.shared import trainings
from ebm_prior.commands.shared.classifier import train_classifier
from ebm_prior.commands.shared.measure import ClassifierRuler, PixelComponents
from nvae import checkpoint, data

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def digits():
    half = data.load("digits", None, train=True)
    return torch.stack([half[i] for i in range(len(half))]), half.labels


@pytest.fixture(scope="module")
def ruler(digits):
    x, labels = digits
    classifier = train_classifier(x, labels, seed=0, epochs=3)
    return ClassifierRuler(classifier, PixelComponents.of(x), x)


def test_the_demo_in_miniature_writes_report_picture_and_prior(tmp_path, capsys, monkeypatch):
    hasty = functools.partial(train_classifier, epochs=3)
    monkeypatch.setattr(compare, "train_classifier", hasty)
    monkeypatch.setattr(trainings, "POLL", 0.05)
    flags = ["--seeds", "0", "--iterations", "2", "--num_samples", "100", "--jobs", "2"]
    assert main(["demo", "--out", str(tmp_path), *flags]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["seconds"] > 0
    assert report["kl_weight"] == 0.5
    assert report["at_kl_weight_1"]["kl_weight"] == 1.0
    for run in [*report["runs"], *report["at_kl_weight_1"]["runs"]]:
        assert run["seed"] == 0
        for quantity in ("frechet", "frechet_pixels"):
            assert set(run[quantity]) == set(KINDS)
            # Even with 100 samples a reconstruction is nearer than a draw of any prior.
            assert run[quantity]["reconstruction"] == min(run[quantity].values())
        assert all(0 <= share <= 1 for share in run["confident"].values())
    with Image.open(tmp_path / "gaussian_vs_ebm.png") as picture:
        assert picture.width > 500
    vae = checkpoint.load(BACKBONE)
    assert ebm_prior.load(tmp_path / "prior.safetensors", vae).sample(2, seed=0).shape[0] == 2
    assert "KL weight 0.5" in capsys.readouterr().out


def test_the_kinds_are_drawn_by_what_their_names_say(digits, ruler, generator):
    x, _ = digits
    vae = checkpoint.load(BACKBONE)
    backbone = NVAEBackbone(vae)
    config = ebm_prior.PriorConfig(
        shapes=backbone.layout.shapes,
        network="mlp",
        width=8,
        spectral_norm=False,
        num_steps=3,
        b2=0.3,
        energy_scale="none",
        step_rule="plain",
    )
    prior = ebm_prior.EBMPrior(backbone, config)
    before = draw(prior, x, 100, seed=3)
    torch.nn.init.constant_(next(prior.energies.parameters()), 5.0)  # another energy
    after = draw(prior, x, 100, seed=3)
    changed = {kind for kind in KINDS if not torch.equal(before[kind], after[kind])}
    assert changed == {"ebm"}
    error = (before["reconstruction"] - x[:100]).abs().mean()
    assert error < (before["gaussian"] - x[:100]).abs().mean() / 2


def test_the_ruler_gives_the_reference_no_distance_and_noise_a_large_one(digits, ruler, generator):
    x, _ = digits
    own = ruler.measure(x)
    noise = ruler.measure(torch.rand(300, 1, 8, 8, generator=generator))
    for quantity in ("frechet", "frechet_pixels"):
        assert own[quantity] == pytest.approx(0, abs=1e-4)
        assert noise[quantity] > 0.1
    assert own["confident"] > noise["confident"]


def test_the_text_counts_the_seeds_in_which_the_prior_beats_the_fitted_gaussian():
    def row(ebm):
        values = dict.fromkeys(KINDS, 10.0) | {"ebm": ebm, "fitted_gaussian": 5.0}
        return {"seed": 0, "frechet": values, "confident": dict.fromkeys(KINDS, 0.5)}

    text = " ".join(compare.sentences([row(4.0), row(6.0), row(12.0)], kl_weight=0.5))
    assert "0.40 to 1.20 of the Gaussian" in text
    assert "below the chain in 2 of 3 and below the fitted Gaussian in 1 of 3" in text


def test_a_training_run_that_fails_is_told_with_its_last_words(tmp_path):
    job = Job(tmp_path / "missing.pt", 0, tmp_path / "run", iterations=2)
    job.start()
    job.process.wait()
    with pytest.raises(ValueError, match=r"missing\.pt: no such file"):
        job.done()


def test_the_assets_are_small_and_say_how_they_were_trained():
    for backbone, weight in ((BACKBONE, 0.5), (BACKBONE_KL1, 1.0)):
        assert backbone.stat().st_size < 1.5e6
        assert checkpoint.read(backbone).args["kl_weight"] == weight


@pytest.mark.parametrize("flag", ["--iterations=0", "--num_samples=99", "--seeds=-1"])
def test_settings_out_of_range_are_refused(flag, tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "new"), flag]) == 2
    assert flag.split("=")[0] in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_nvae_of_other_images_is_refused():
    with pytest.raises(ValueError, match="NVAE of cifar10, expected one of the digits"):
        compare.kl_weight(GOLDEN / "nvae" / "cifar10_vanilla_one_group" / "checkpoint.pt")
