"""The main job from end to end: an NVAE checkpoint in, a prior out, images drawn with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ebm_prior.commands import main
from nvae import evaluate
from tests.conftest import GOLDEN, nvae_cases

CIFAR10 = os.environ.get("CIFAR10")
CIFAR10_NVAE = GOLDEN / "nvae" / "cifar10_no_se_mbconv_sep" / "checkpoint.pt"
FACES_NVAE = [case / "checkpoint.pt" for case in nvae_cases() if "celeba256" in case.name]
SMALL = ["--width", "8", "--num_steps", "2", "--bn_iterations", "2", "--device", "cpu"]


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        levels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
        Image.fromarray(levels).resize((40, 36)).save(folder / f"{i}.png")
    return folder


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "gpu_0_samples_0.npz") as file:
        return file["samples"]


@pytest.mark.skipif(not CIFAR10, reason="CIFAR10 names no folder of CIFAR-10 images")
def test_a_prior_trains_on_real_cifar10_and_draws_images(tmp_path):
    given = ["--checkpoint", str(CIFAR10_NVAE), "--preset", "cifar10", "--data", str(CIFAR10)]
    run = tmp_path / "run"
    assert main(["train", *given, "--out", str(run), "--iterations", "20", *SMALL]) == 0
    words = ["--checkpoint", str(CIFAR10_NVAE), "--save", str(tmp_path / "out"), "--temp", "1"]
    prior = ["--ebm_prior", str(run / "prior.safetensors")]
    assert evaluate.main([*words, *prior, "--num_samples", "4", "--device", "cpu"]) == 0
    images = images_of(tmp_path / "out")
    assert images.shape == (4, 3, 32, 32)
    assert np.isfinite(images).all()


@pytest.mark.skipif(not FACES_NVAE, reason="GOLDENS names no folder with the case celeba256_*")
def test_golden_256_pixels_with_and_without_a_prior_and_with_anothers(tmp_path):
    given = ["--checkpoint", str(FACES_NVAE[0]), "--preset", "celeba256", "--dataset", "folder"]
    data = ["--data", str(pictures(tmp_path / "faces", 4))]
    run = tmp_path / "run"
    assert main(["train", *given, *data, "--out", str(run), "--iterations", "2", *SMALL]) == 0
    prior = ["--ebm_prior", str(run / "prior.safetensors")]
    for name, more in (("gaussian", []), ("ebm", prior)):
        words = ["--checkpoint", str(FACES_NVAE[0]), "--save", str(tmp_path / name)]
        assert evaluate.main([*words, "--num_samples", "4", "--device", "cpu", *more]) == 0
        images = images_of(tmp_path / name)
        assert images.shape == (4, 3, 256, 256)
        assert np.isfinite(images).all()
    words = ["--checkpoint", str(CIFAR10_NVAE), "--save", str(tmp_path / "none")]
    with pytest.raises(
        ValueError, match=r"on the backbone [0-9a-f]{64}, got the .* [0-9a-f]{64};"
    ):
        evaluate.main([*words, "--num_samples", "4", "--device", "cpu", *prior])


def test_a_signal_to_the_whole_group_saves_the_run_although_workers_read_its_images(tmp_path):
    given = ["--checkpoint", str(CIFAR10_NVAE), "--preset", "cifar10", "--dataset", "folder"]
    data = ["--data", str(pictures(tmp_path / "data", 8)), "--workers", "1", "--batch_size", "2"]
    run = tmp_path / "run"
    words = ["train", *given, *data, "--out", str(run), "--iterations", "100000", *SMALL]
    process = subprocess.Popen(
        [sys.executable, "-m", "ebm_prior", *words, "--log_every", "1"],
        cwd=GOLDEN.parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    metrics, patience = run / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < patience:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "Traceback" not in told
    assert (run / "last.pt").exists()
