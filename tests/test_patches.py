"""The patch for an upstream checkout, applied to a stand-in with as many lines as its file has."""

from __future__ import annotations

import os
import pickle
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from ebm_prior import attach, checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone
from tests.ebm_prior.small_vaes import prior, vae, written

PATCHES = Path(__file__).parent.parent / "patches"
PATCH = PATCHES / "nvae-evaluate.diff"
LINES = 187
AFTER = [21, 43, 69, 166]
# What stands around the insertions in the stand-in, by the number of its first line. It does with
# the model what upstream does: load, build, re-adjust, sample under autocast.
CODE = {
    18: """
import argparse
import torch
import utils
from tests.ebm_prior.small_vaes import Upstream""",
    41: """
def main(eval_args):
    from nvae.model import AutoEncoder, ModelConfig
    seed = 1
    checkpoint = torch.load(eval_args.checkpoint, map_location="cpu")
    args = checkpoint["args"]""",
    66: """
    model = Upstream(AutoEncoder(ModelConfig.from_args(vars(args))))
    model.load_state_dict(checkpoint["state_dict"])
    model = model.eval()
    millions = utils.count_parameters_in_M(model)
    if eval_args.readjust_bn:
        model.train()
        for _ in range(3):
            model.sample(16, eval_args.temp)
        model.eval()
    torch.manual_seed(seed)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.sample(10, eval_args.temp)
        images = model.decoder_output(logits).sample()
    return model, millions, logits, images""",
    160: """
if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint")
    parser.add_argument("--readjust_bn", action="store_true")
    parser.add_argument("--temp", type=float,
                        help="of the prior",
                        default=0.7)
    eval_args = parser.parse_args()
    model, millions, logits, images = main(eval_args)""",
}


def stand_in():
    lines = [f"# line {number}" for number in range(1, LINES + 1)]
    for first, code in CODE.items():
        block = code.strip("\n").split("\n")
        lines[first - 1 : first - 1 + len(block)] = block
    assert len(lines) == LINES
    return lines


def git(folder, *words):
    """git without the settings of a repository or a hook that this may run in."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    done = subprocess.run(["git", *words], cwd=folder, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "evaluate.py").write_text("\n".join(stand_in()) + "\n")
    return folder


@pytest.fixture
def patched(checkout):
    git(checkout, "apply", "--unidiff-zero", str(PATCH))
    return checkout


@pytest.fixture
def evaluate(monkeypatch, tmp_path):
    """Run a checkout's `evaluate.py` on a checkpoint; gives its names after that."""
    utils = ModuleType("utils")

    def count_parameters_in_M(model):
        raise TypeError("the sum of a generator")

    utils.count_parameters_in_M = count_parameters_in_M
    monkeypatch.setitem(sys.modules, "utils", utils)
    allowed = torch.serialization.get_safe_globals()
    path = written(tmp_path / "checkpoint.pt", vae())

    def run(checkout, *flags):
        command = ["evaluate.py", "--checkpoint", str(path), *map(str, flags)]
        monkeypatch.setattr(sys, "argv", command)
        return runpy.run_path(str(checkout / "evaluate.py"), run_name="__main__")

    yield run
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture
def prior_file(tmp_path):
    path = tmp_path / "prior.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(vae())))
    return path


def logits_of(path, samples=10, temperature=0.7, **options):
    """What a model of ours with the same weights samples from the prior."""
    model = vae()
    attach(model, path, **options)
    torch.manual_seed(1)
    return model.sample(samples, temperature)


# --- the file


def test_the_patch_is_insertions_without_context():
    lines = PATCH.read_text().splitlines()
    names = ["diff --git a/evaluate.py b/evaluate.py", "--- a/evaluate.py", "+++ b/evaluate.py"]
    assert lines[:3] == names
    heads = [line for line in lines[3:] if not line.startswith("+")]
    hunks = [re.fullmatch(r"@@ -(\d+),0 \+(\d+),(\d+) @@", head) for head in heads]
    assert [int(hunk[1]) for hunk in hunks] == AFTER
    assert all(line.strip("+ ") for line in lines[3:])  # an empty line would be one of theirs


def test_git_applies_it_and_the_file_has_all_its_lines_in_their_places(checkout):
    before = stand_in()
    git(checkout, "apply", "--unidiff-zero", str(PATCH))
    after = (checkout / "evaluate.py").read_text().splitlines()
    expected = list(before)
    for number, lines in reversed(list(zip(AFTER, inserted(), strict=True))):
        expected[number:number] = lines
    assert after == expected
    compile("\n".join(after), "evaluate.py", "exec")
    git(checkout, "apply", "--reverse", "--unidiff-zero", str(PATCH))
    assert (checkout / "evaluate.py").read_text().splitlines() == before


def inserted():
    """The lines of each hunk."""
    hunks = re.split(r"^@@.*\n", PATCH.read_text(), flags=re.MULTILINE)[1:]
    return [[line[1:] for line in hunk.splitlines()] for hunk in hunks]


def test_the_readme_of_the_patches_gives_what_it_takes():
    text = (PATCHES / "README.md").read_text()
    assert f"git apply --unidiff-zero path/to/patches/{PATCH.name}" in text
    assert "9fc1a288fb831c87d93a4e2663bc30ccf9225b29" in text
    assert "cce8fe871be77777113613a9119d5d5b2ea3bed0" in text
    assert f"{sum(map(len, inserted()))} insertions" in text
    rows = re.findall(r"^\| (\d+) \|", text, re.MULTILINE)
    assert [int(row) for row in rows] == AFTER


# --- what it does


def test_without_the_patch_current_software_refuses_the_checkpoint(checkout, evaluate):
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        evaluate(checkout)


def test_without_the_flag_the_patched_program_samples_as_ever(patched, evaluate):
    names = evaluate(patched)
    assert "sample" not in vars(names["model"])
    assert names["millions"] == sum(p.numel() for p in vae().parameters()) / 1e6
    torch.manual_seed(1)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(names["logits"], vae().sample(10, 0.7))


def test_with_the_flag_it_samples_from_the_prior(patched, evaluate, prior_file, capsys):
    names = evaluate(patched, "--ebm_prior", prior_file)
    assert "EBM prior attached: " in capsys.readouterr().out
    assert torch.equal(names["logits"], logits_of(prior_file))
    assert names["images"].shape == (10, 1, 8, 8)


def test_with_the_flag_chains_run_in_blocks_if_asked(patched, evaluate, prior_file):
    names = evaluate(patched, "--ebm_prior", prior_file, "--ebm_block_size", 4)
    assert torch.equal(names["logits"], logits_of(prior_file, block_size=4))
    assert not torch.equal(names["logits"], logits_of(prior_file))


def test_with_the_flag_readjustment_comes_before_the_prior_samples(patched, evaluate, prior_file):
    names = evaluate(patched, "--ebm_prior", prior_file, "--readjust_bn")
    attached = names["model"].sample.prior
    torch.manual_seed(1)
    u = attached.sample_u(10, generator=None)
    assert torch.equal(names["logits"], attached.backbone.logits(u, 0.7))
    assert not torch.equal(names["logits"], logits_of(prior_file))


def test_with_the_flag_a_prior_of_another_checkpoint_is_refused(patched, evaluate, tmp_path):
    path = tmp_path / "other.safetensors"
    checkpoint.save(path, prior(NVAEBackbone(vae(seed=1))))
    with pytest.raises(ValueError, match="was trained on the backbone"):
        evaluate(patched, "--ebm_prior", path)
