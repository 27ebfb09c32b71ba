"""The choice of the sampler at the commands, and the comparison of both."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch

from ebm_prior import checkpoint, ou_mala
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.coupling import Attribute
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A VAE's checkpoint, and priors: one that both samplers draw from, and others."""
    folder, vae = tmp_path_factory.mktemp("files"), small_vaes.vae()
    backbone = NVAEBackbone(vae)
    for name, settings in (
        ("plain", {}),
        ("step", {"energy_scale": "step"}),
        ("labelled", {"attributes": (Attribute("class", 3, (0,)),)}),
    ):
        prior = small_vaes.prior(backbone, **settings)
        with torch.no_grad():
            for parameter in prior.energies.parameters():
                parameter.mul_(3)
        checkpoint.save(folder / name, prior)
    return small_vaes.written(folder / "checkpoint.pt", vae), folder


@pytest.fixture
def command(files):
    vae, folder = files

    def run(name, out, *flags, prior="plain"):
        paths = ["--checkpoint", vae, "--prior", folder / prior, "--out", out, "--device", "cpu"]
        return main([name, *map(str, paths), *map(str, flags)])

    return run


@pytest.fixture
def _short_pilot(monkeypatch):
    """A tenth of the pilot run: what it finds is of no matter here."""
    monkeypatch.setattr(ou_mala, "adapt", functools.partial(ou_mala.adapt, rounds=6))


pytestmark = pytest.mark.usefixtures("_short_pilot")
OURS = ("--sampler", "ou-mala")
FEW = ("--num_samples", "5", "--batch_size", "2", "--grid", "0", "--format", "npz")


def images(out):
    return np.load(out / "samples.npz")["samples"]


def protocol(out):
    return json.loads((out / "report.json").read_text())["protocol"]


# --- sample


def test_langevin_is_the_default_and_ou_mala_draws_others(command, tmp_path):
    for name, flags in (("default", ()), ("langevin", ("--sampler", "langevin")), ("ours", OURS)):
        assert command("sample", tmp_path / name, *FEW, *flags) == 0
    default, langevin, ours = (images(tmp_path / n) for n in ("default", "langevin", "ours"))
    np.testing.assert_array_equal(default, langevin)
    assert not np.array_equal(default, ours)
    assert protocol(tmp_path / "default")["sampler"] == "langevin"
    assert "chain" not in protocol(tmp_path / "default")


def test_the_report_tells_steps_and_acceptance_of_every_t(command, tmp_path):
    assert command("sample", tmp_path, *FEW, *OURS, "--num_steps", "3") == 0
    told = protocol(tmp_path)
    assert (told["sampler"], told["num_steps"]) == ("ou-mala", 3)
    chain = told["chain"]
    assert {len(chain[name]) for name in ("steps", "acceptance", "gaussian")} == {3}
    assert all(0 < h <= 8 for h in chain["steps"])
    assert all(0 < a <= 1 for a in chain["acceptance"])


@pytest.mark.parametrize("flags", [(), OURS])
def test_the_number_of_steps_reaches_the_chain(command, tmp_path, monkeypatch, flags):
    seen, reverse = [], EBMPrior.reverse

    def noted(self, *args, **further):
        seen.append(further["num_steps"])
        return reverse(self, *args, **further)

    monkeypatch.setattr(EBMPrior, "reverse", noted)
    assert command("sample", tmp_path, *FEW, *flags, "--num_steps", "4") == 0
    assert set(seen) == {4}


def test_images_do_not_depend_on_how_many_blocks_follow(command, tmp_path):
    assert command("sample", tmp_path / "five", *FEW, *OURS) == 0
    assert command("sample", tmp_path / "two", *FEW, *OURS, "--num_samples", "2") == 0
    np.testing.assert_array_equal(images(tmp_path / "five")[:2], images(tmp_path / "two"))


def test_a_run_goes_on_only_with_its_own_sampler(command, tmp_path, monkeypatch, capsys):
    sample_u, calls = EBMPrior.sample_u, []

    def killed(self, *args, **further):
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return sample_u(self, *args, **further)

    with monkeypatch.context() as patch:
        patch.setattr(EBMPrior, "sample_u", killed)
        assert command("sample", tmp_path / "parts", *FEW, *OURS) == 130
    assert command("sample", tmp_path / "parts", *FEW, "--resume", "auto") == 2
    assert "part of a run with sampler ou-mala (now langevin)" in capsys.readouterr().err
    assert command("sample", tmp_path / "parts", *FEW, *OURS, "--resume", "auto") == 0
    assert command("sample", tmp_path / "whole", *FEW, *OURS) == 0
    np.testing.assert_array_equal(images(tmp_path / "parts"), images(tmp_path / "whole"))


def test_labels_and_the_second_sampler_go_together(command, tmp_path):
    drawn = []
    for name in ("0", "1"):
        flags = (*FEW, *OURS, "--set", f"class={name}")
        assert command("sample", tmp_path / name, *flags, prior="labelled") == 0
        drawn.append(images(tmp_path / name))
    assert not np.array_equal(*drawn)


@pytest.mark.parametrize(
    ("prior", "flags", "message"),
    [
        ("step", OURS, "ou-mala is for priors trained with energy_scale none"),
        ("plain", ("--num_steps", "0"), "--num_steps 0: expected at least 1"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(command, tmp_path, capsys, prior, flags, message):
    assert command("sample", tmp_path / "out", *FEW, *flags, prior=prior) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# --- evaluate


def test_evaluate_measures_the_prior_and_its_control_with_the_sampler(command, tmp_path):
    flags = ("--num_samples", "20", "--no-reconstruction", "--batch_size", "20")
    for name, further in (("langevin", ()), ("ours", (*OURS, "--num_steps", "3"))):
        assert command("evaluate", tmp_path / name, *flags, "--max_images", "40", *further) == 0
    one, two = (
        json.loads((tmp_path / n / "report.json").read_text()) for n in ("langevin", "ours")
    )
    assert one["gaussian"]["frechet"] == two["gaussian"]["frechet"]
    for row in ("ebm", "no_model_chain"):
        assert one[row]["frechet"] != two[row]["frechet"]
        assert "chain" not in one[row]["made_of"]
        assert two[row]["made_of"]["chain"]["name"] == "ou-mala"
        assert two[row]["made_of"]["num_steps"] == 3


# --- the comparison

SHORT = ("--draws", "50", "--num_steps", "1", "2", "--seeds", "0", "1", "--b2", "0.1")


def test_the_testbed_alone_needs_no_files(tmp_path, capsys):
    assert main(["samplers", "--out", str(tmp_path), *SHORT]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    curves = report["testbed"]["curves"]
    assert [p["evaluations"] for p in curves["langevin, b2 = 0.1"]] == [3, 6]
    assert [p["evaluations"] for p in curves["ou-mala"]] == [2, 3]
    assert len(report["testbed"]["adapted"]["steps"]) == 3
    assert (tmp_path / "samplers.png").stat().st_size > 0
    assert "ou-mala" in capsys.readouterr().out


def test_a_trained_prior_is_measured_beside_it(command, tmp_path):
    flags = (*SHORT, "--num_samples", "20", "--max_images", "40")
    assert command("samplers", tmp_path, *flags) == 0
    curves = json.loads((tmp_path / "report.json").read_text())["images"]["curves"]
    assert [p["evaluations"] for p in curves["langevin"]] == [3, 6]
    assert all(p["frechet"] > 0 for p in curves["ou-mala"])
    assert len(list((tmp_path / "rows").glob("*.json"))) == 8


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_steps", "1", "1"), "expected different numbers from 1 on"),
        (("--seeds", "-1"), "expected different numbers from 0 on"),
        (("--b2", "5"), "below 4 to be stable"),
        (("--draws", "1"), "--draws 1: expected at least 2"),
        (("--prior", "x"), "--checkpoint and --prior belong together"),
    ],
)
def test_a_comparison_that_cannot_be_made_is_one_line(tmp_path, capsys, flags, message):
    assert main(["samplers", "--out", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
