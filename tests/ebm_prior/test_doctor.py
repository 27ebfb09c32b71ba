"""The doctor's findings, and its exit status."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from ebm_prior import checkpoint, kinds
from ebm_prior.backbones.files import open_backbone
from ebm_prior.backbones.hvae import file as hvae_file
from ebm_prior.backbones.hvae.config import HVAEConfig
from ebm_prior.backbones.hvae.model import HVAE
from ebm_prior.backbones.nvae import NVAEBackbone, bn_statistics
from ebm_prior.commands import doctor
from ebm_prior.commands.doctor import chains
from ebm_prior.config import PriorConfig
from ebm_prior.fingerprint import fingerprint
from ebm_prior.training import apex
from tests.conftest import needs_digits
from tests.ebm_prior.small_vaes import prior, vae, written

SMALL_HVAE = HVAEConfig(
    "digits",
    (1, 8, 8),
    latents=((2, 2, 2), (2, 4, 4)),
    widths=(4, 4),
    image_width=4,
    cells=1,
    groups=2,
    levels=17,
)


@pytest.fixture
def diagnose(capsys):
    """Run the command; returns its status and the verdict and text of each subject."""

    def run(*arguments):
        parser = argparse.ArgumentParser()
        doctor.add_arguments(parser)
        status = doctor.run(parser.parse_args([str(a) for a in (*arguments, "--device", "cpu")]))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
        table = {line[9:26].strip(): (line[:9].strip(), line[26:]) for line in lines[:-1]}
        return status, table

    return run


@pytest.fixture
def model():
    model = vae()
    for name, buffer in model.named_buffers():
        if name.endswith("num_batches_tracked"):
            buffer.fill_(100)
    return model


def test_the_machine_is_always_looked_at(diagnose):
    status, table = diagnose()
    assert status == 0
    assert table["torch"] == ("ok", torch.__version__)


@pytest.mark.parametrize(
    ("reason", "text"), [("absent", "not needed; absent"), (None, "--optimizer apex_adam")]
)
def test_apex_is_told_to_be_fit_or_not_needed(diagnose, monkeypatch, reason, text):
    monkeypatch.setattr(apex, "why_not", lambda: reason)
    verdict, told = diagnose()[1]["apex"]
    assert verdict == "ok"
    assert text in told


def test_a_sound_pair_is_all_ok(tmp_path, diagnose, model):
    path = written(tmp_path / "checkpoint.pt", model)
    statistics = bn_statistics(model)
    made = prior(NVAEBackbone(model))
    checkpoint.save(tmp_path / "p.safetensors", made, bn_statistics=statistics, step=9)
    status, table = diagnose("--checkpoint", path, "--prior", tmp_path / "p.safetensors")
    assert status == 0
    assert {verdict for verdict, _ in table.values()} == {"ok"}
    assert table["fingerprint"][1] == fingerprint(model.state_dict())
    assert table["latents"][1] == "2 layers, 40 coordinates"
    assert "trained on this checkpoint" in table["backbone"][1]
    assert "training step 9" in table["prior"][1]
    assert "finite" in table["gaussian sample"][1]
    assert "finite" in table["ebm sample"][1]
    assert "per sample" in table["memory"][1]


def test_a_prior_of_another_backbone_is_a_problem_that_names_both(tmp_path, diagnose, model):
    path = written(tmp_path / "checkpoint.pt", model)
    other = NVAEBackbone(vae(seed=1))
    checkpoint.save(tmp_path / "p.safetensors", prior(other))
    status, table = diagnose("--checkpoint", path, "--prior", tmp_path / "p.safetensors")
    verdict, text = table["prior"]
    assert (status, verdict) == (1, "PROBLEM")
    assert other.fingerprint() in text
    assert NVAEBackbone(model).fingerprint() in text


def test_a_prior_alone_is_read_and_names_its_backbone(tmp_path, diagnose, model):
    backbone = NVAEBackbone(model)
    checkpoint.save(tmp_path / "p.safetensors", prior(backbone))
    status, table = diagnose("--prior", tmp_path / "p.safetensors")
    assert status == 0
    assert backbone.fingerprint() in table["backbone"][1]
    assert table["chains"] == ("ok", "give --checkpoint to run them")
    assert "chains" not in diagnose("--prior", tmp_path / "p.safetensors", "--chains", 0)[1]


def test_an_untrained_batch_norm_is_a_warning(tmp_path, diagnose):
    status, table = diagnose("--checkpoint", written(tmp_path / "checkpoint.pt", vae()))
    assert status == 0
    assert table["batch norm"][0] == "warning"
    assert "--readjust_bn" in table["batch norm"][1]


@pytest.mark.parametrize(("value", "word"), [(torch.inf, "finite"), (-1.0, "negative")])
def test_bad_statistics_are_a_problem(tmp_path, diagnose, model, value, word):
    dict(model.named_buffers())["pre_process.0._ops.0.bn_act.running_var"].fill_(value)
    status, table = diagnose("--checkpoint", written(tmp_path / "checkpoint.pt", model))
    assert status == 1
    assert table["checkpoint"][0] == "PROBLEM"
    assert word in table["checkpoint"][1]


def test_files_that_are_none_are_problems_and_do_not_stop_the_others(tmp_path, diagnose):
    junk = tmp_path / "junk"
    junk.write_bytes(b"junk")
    status, table = diagnose("--checkpoint", junk, "--prior", junk, "--data", tmp_path / "none")
    assert status == 1
    for subject in ("checkpoint", "prior", "data"):
        assert table[subject][0] == "PROBLEM", subject


def test_data_that_fits_the_checkpoint_is_ok_and_data_that_does_not_is_a_problem(
    tmp_path, diagnose, model
):
    needs_digits()
    path = written(tmp_path / "checkpoint.pt", model)
    status, table = diagnose("--checkpoint", path, "--data", tmp_path)
    assert status == 0
    assert "images of 1 x 8 x 8" in table["data, train"][1]
    status, table = diagnose("--checkpoint", path, "--data", tmp_path, "--dataset", "cifar10")
    assert status == 1
    assert table["data, train"][0] == "PROBLEM"


def test_a_dry_run_of_the_doctor_prints_what_it_would_look_at(capsys):
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)
    assert doctor.run(parser.parse_args(["--prior", "p.safetensors", "--dry_run"])) == 0
    assert json.loads(capsys.readouterr().out)["prior"] == "p.safetensors"
    with pytest.raises(ValueError, match="--chains 1: expected"):
        doctor.run(parser.parse_args(["--chains", "1", "--dry_run"]))


def test_the_chains_of_a_prior_are_a_table_a_report_and_a_figure(tmp_path, diagnose, model):
    path = written(tmp_path / "checkpoint.pt", model)
    checkpoint.save(tmp_path / "p.safetensors", prior(NVAEBackbone(model)))
    arguments = ("--checkpoint", path, "--prior", tmp_path / "p.safetensors")
    out = tmp_path / "out"
    status, table = diagnose(*arguments, "--chains", "8", "--num_steps", "4", "--out", out)
    assert status == 0
    assert "8 at each t, K = 4" in table["chains"][1]
    assert {"t = 2", "t = 1", "t = 0", "layer 0", "layer 1"} <= table.keys()
    assert "injected noise" in table["t = 0"][1]
    report = json.loads((out / "report.json").read_text())
    assert [row["t"] for row in report["chains"]["by_t"]] == [2, 1, 0]
    assert report["chains"]["by_t"][0]["verdict"] in table["t = 2"][1]
    assert report["checks"][0] == {
        "verdict": "ok",
        "subject": "python",
        "text": table["python"][1],
    }
    assert report["protocol"]["settings"]["chains"] == 8
    assert {file.name for file in out.iterdir()} == {"report.json", "chains.png"}
    assert "chains" not in diagnose(*arguments, "--chains", "0")[1]


def test_chains_that_would_take_long_are_left_to_those_who_ask(
    tmp_path, diagnose, model, monkeypatch
):
    monkeypatch.setattr(chains, "PATIENCE", 0.0)
    path = written(tmp_path / "checkpoint.pt", model)
    checkpoint.save(tmp_path / "p.safetensors", prior(NVAEBackbone(model)))
    arguments = ("--checkpoint", path, "--prior", tmp_path / "p.safetensors")
    assert "ask with --chains" in diagnose(*arguments)[1]["chains"][1]
    assert "t = 0" in diagnose(*arguments, "--chains", "2")[1]


def test_a_diverged_prior_is_a_problem_of_its_chains(tmp_path, diagnose, model):
    path = written(tmp_path / "checkpoint.pt", model)
    wild = prior(NVAEBackbone(model), num_steps=30)
    with torch.no_grad():
        for parameter in wild.energies.parameters():
            parameter.mul_(1e12)
    checkpoint.save(tmp_path / "p.safetensors", wild)
    status, table = diagnose(
        "--checkpoint", path, "--prior", tmp_path / "p.safetensors", "--chains", "4"
    )
    assert status == 1
    assert table["chains"][0] == "PROBLEM"
    assert "left the finite numbers" in table["chains"][1]


def test_another_kind_of_prior_on_an_hvae_is_looked_at_and_has_no_chains(tmp_path, diagnose):
    hvae_file.save(tmp_path / "hvae.safetensors", HVAE(SMALL_HVAE))
    backbone = open_backbone(tmp_path / "hvae.safetensors")
    fitted = kinds.build(backbone, PriorConfig(shapes=backbone.layout.shapes, kind="fitted"))
    checkpoint.save(tmp_path / "p.safetensors", fitted)
    status, table = diagnose(
        "--checkpoint", tmp_path / "hvae.safetensors", "--prior", tmp_path / "p.safetensors"
    )
    assert status == 0
    assert "HVAE of digits" in table["checkpoint"][1]
    assert "fitted is drawn without" in table["chains"][1]


def test_the_hole_is_a_table_with_advice_a_report_and_a_figure(tmp_path, diagnose, model):
    needs_digits()
    path = written(tmp_path / "checkpoint.pt", model)
    flags = ("--hole", "--hole_steps", "3", "--max_images", "120", "--out", tmp_path / "out")
    status, table = diagnose("--checkpoint", path, *flags)
    assert status == 0
    assert {"control", "all layers", "layer 0", "layer 1", "posterior u std"} <= table.keys()
    report = json.loads((tmp_path / "out" / "report.json").read_text())["hole"]
    assert (report["images"], report["held_out"]) == (96, 24)
    assert [gap["network"] for gap in report["gaps"][:3]] == ["map", "mlp", "map"]
    assert report["advice"] == table["hole"][1]
    assert (tmp_path / "out" / "hole.png").is_file()


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--hole"], "--hole needs --checkpoint"),
        (["--chains", "1"], "--chains 1"),
        (["--hole_steps", "0"], "--hole_steps 0"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_read(diagnose, flags, text):
    with pytest.raises(ValueError, match=text):
        diagnose(*flags)
