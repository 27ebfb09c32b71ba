"""The command `ablate`: cells, how linear time is, and a whole run on a tiny VAE."""

import functools
import json
import os
import sys

import pytest
import torch
from PIL import Image

from ebm_prior import checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.ablate import timing
from ebm_prior.commands.ablate.cells import PAPER, Cell, chosen, linearity
from ebm_prior.commands.shared import measure, trainings
from ebm_prior.commands.shared.trainings import Training
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes

# --- cells


def test_cells_are_named_or_a_grid_or_the_papers():
    assert chosen(["3x50", "1x8", "3x50"], None, None) == [Cell(1, 8), Cell(3, 50)]
    assert chosen(None, [3, 6], [10, 20]) == [Cell(3, 10), Cell(3, 20), Cell(6, 10), Cell(6, 20)]
    assert set(chosen(None, None, None)) == set(PAPER) == {(3, 30), (3, 50), (3, 100), (6, 50)}
    assert str(Cell(3, 50)) == "3x50"


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ((["3x"], None, None), "cell '3x': expected TxK"),
        ((["0x5"], None, None), "cell 0x5: expected at least 1x1"),
        ((["3x5"], [3], [5]), "give one of them"),
        ((None, [3], None), "give both"),
    ],
)
def test_cells_of_another_form_are_refused(cells, message):
    with pytest.raises(ValueError, match=message):
        chosen(*cells)


class Scripted(Training):
    """A training whose process runs this code instead."""

    def command(self):
        return [sys.executable, "-c", self.flags["code"]]


@pytest.mark.parametrize("may_diverge", [True, False])
def test_a_training_that_diverged_counts_by_its_last_good_state_if_it_may(tmp_path, may_diverge):
    words = "error: training diverged at step 7"
    code = f"import sys; open('prior.safetensors', 'w'); sys.exit({words!r})"
    code = f"import os; os.chdir({str(tmp_path)!r}); {code}"
    training = Scripted(tmp_path, {"code": code}, may_diverge=may_diverge)
    training.start()
    training.process.wait()
    if may_diverge:
        assert training.done()
        assert training.diverged == "training diverged at step 7"
    else:
        with pytest.raises(ValueError, match="ended with status 1: error: training diverged"):
            training.done()


def test_a_training_that_failed_otherwise_is_an_error(tmp_path):
    training = Scripted(tmp_path, {"code": "raise SystemExit('no data')"}, may_diverge=True)
    training.start()
    training.process.wait()
    with pytest.raises(ValueError, match="no data"):
        training.done()


def test_a_sigterm_stops_the_trainings_too(tmp_path):
    code = f"import os, signal, time; os.kill({os.getpid()}, signal.SIGTERM); time.sleep(60)"
    training = Scripted(tmp_path, {"code": code})
    with pytest.raises(KeyboardInterrupt):
        list(trainings.train([training], 1))
    assert training.process.poll() is not None


# --- time


def test_seconds_proportional_to_the_steps_are_linear():
    found = linearity([10, 20, 60], [0.5, 1.0, 3.0])
    assert found["through_the_origin"]["seconds_per_step"] == pytest.approx(0.05)
    assert found["through_the_origin"]["max_deviation"] == pytest.approx(0, abs=1e-12)
    assert found["with_intercept"]["intercept_seconds"] == pytest.approx(0, abs=1e-12)
    assert found["within_20_percent"]


def test_a_fixed_cost_is_told_from_the_cost_of_a_step():
    # n/s = 1/2 and 2/3: c = (1/2 + 2/3) / (1/4 + 4/9) = 1.68; off by -16% and +12%.
    found = linearity([1, 2], [2.0, 3.0])
    assert found["through_the_origin"]["seconds_per_step"] == pytest.approx(1.68)
    assert found["through_the_origin"]["deviations"] == pytest.approx([-0.16, 0.12])
    assert found["through_the_origin"]["max_deviation"] == pytest.approx(0.16)
    assert found["with_intercept"]["seconds_per_step"] == pytest.approx(1)
    assert found["with_intercept"]["intercept_seconds"] == pytest.approx(1)
    assert found["with_intercept"]["max_deviation"] == pytest.approx(0, abs=1e-9)
    assert not linearity([1, 10], [2.0, 11.0])["within_20_percent"]
    assert "with_intercept" not in linearity([4, 4], [1.0, 1.1])


def test_the_papers_own_seconds_need_an_intercept():
    found = linearity([c.steps for c in PAPER], [seconds for _, seconds in PAPER.values()])
    assert found["through_the_origin"]["max_deviation"] == pytest.approx(0.236, abs=0.002)
    assert found["with_intercept"]["max_deviation"] < 0.1


def test_cells_are_timed_in_turn_after_a_warm_up(monkeypatch):
    asked, clock = [], iter([9.0, 9.0, 1.0, 10.0, 3.0, 30.0, 2.0, 20.0])

    def seconds(prior, num, batch_size, generator, **drawing):
        asked.append((prior, num, drawing))
        return next(clock)

    monkeypatch.setattr(timing, "seconds", seconds)
    cells = {"a": ("p", {}), "b": ("q", {"num_steps": 3})}
    found = timing.interleaved(cells, 50, 20, 3, torch.Generator())
    assert found == {"a": [1.0, 3.0, 2.0], "b": [10.0, 30.0, 20.0]}
    assert timing.medians(found) == {"a": 2.0, "b": 20.0}
    round_ = [("p", 50, {}), ("q", 50, {"num_steps": 3})]
    assert asked == [("p", 20, {}), ("q", 20, {"num_steps": 3}), *round_, *round_, *round_]


def test_what_is_timed_draws_and_decodes_every_image(monkeypatch):
    prior = small_vaes.prior(NVAEBackbone(small_vaes.vae()))
    drawn, decode = [], NVAEBackbone.decode
    monkeypatch.setattr(
        NVAEBackbone,
        "decode",
        lambda self, u, *a, **k: drawn.append(len(u)) or decode(self, u, *a, **k),
    )
    assert timing.seconds(prior, 7, 3, torch.Generator(), num_steps=1) > 0
    assert drawn == [3, 3, 1]


# --- the command

FEW = [
    *("--num_samples", "40", "--time_images", "6", "--repeats", "1", "--max_images", "120"),
    *("--device", "cpu"),
]
CHEAP = ["--iterations", "2", "--train_flags", "--width", "8", "--batch_size", "16"]


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    torch.set_num_threads(1)
    return small_vaes.written(tmp_path_factory.mktemp("vae") / "vae.pt", small_vaes.vae())


@pytest.fixture(autouse=True)
def _a_hasty_classifier(monkeypatch):
    hasty = functools.partial(measure.train_classifier, epochs=2)
    monkeypatch.setattr(measure, "train_classifier", hasty)


@pytest.fixture
def here(monkeypatch):
    """Train in this process: a new one needs seconds to begin. Gives what was trained."""
    trained = []

    def start(self):
        trained.append(self.out.name)
        with torch.enable_grad():
            assert main(self.command()[3:]) == 0

    monkeypatch.setattr(Training, "start", start)
    monkeypatch.setattr(Training, "done", lambda self: True)
    monkeypatch.setattr("ebm_prior.commands.shared.trainings.POLL", 0.0)
    return trained


def ablate(vae_file, out, *flags):
    return main(["ablate", "--checkpoint", str(vae_file), "--out", str(out), *FEW, *flags])


def test_every_cell_is_trained_and_sampled_with_its_own_steps(
    vae_file, tmp_path, here, monkeypatch, capsys
):
    out, cells = tmp_path / "out", ["--preset", "digits", "--cells", "3x2", "1x2"]
    assert ablate(vae_file, out, *cells, "--seeds", "0", "1", *CHEAP) == 0
    assert here == ["1x2-seed-0", "1x2-seed-1", "3x2-seed-0", "3x2-seed-1"]
    for cell in (Cell(1, 2), Cell(3, 2)):
        config = checkpoint.read(out / "runs" / f"{cell}-seed-1" / "prior.safetensors").config
        assert (config.max_T, config.num_steps, config.width) == (*cell, 8)
    report = json.loads((out / "report.json").read_text())
    assert list(report) == ["gaussian", "cells", "linearity", "protocol"]
    assert list(report["cells"]) == ["1x2", "3x2"]
    for row in report["cells"].values():
        assert row["seconds"] > 0
        assert row["range"]["frechet"][0] <= row["frechet"] <= row["range"]["frechet"][1]
        assert row["no_model_chain"]["frechet"] > 0
        assert row["steps"] == row["max_T"] * row["num_steps"]
    assert report["linearity"]["through_the_origin"]["seconds_per_step"] > 0
    told = capsys.readouterr().out
    assert "linear in T K within 20%" in told
    for name in ("quality.png", "seconds.png"):
        with Image.open(out / name) as picture:
            assert picture.width > 500

    # Again: refused, or nothing is trained or drawn anew but the time.
    assert ablate(vae_file, out, *cells, "--seeds", "0", "1", *CHEAP) == 2
    assert "go on with it by --resume auto" in capsys.readouterr().err

    def stopped(*args, **kwargs):
        raise AssertionError("drawn again")

    monkeypatch.setattr("ebm_prior.commands.shared.rows.sampled", stopped)
    again = ["--resume", "auto", "--seeds", "0"]
    assert ablate(vae_file, out, *cells, *again, *CHEAP) == 0
    found = json.loads((out / "report.json").read_text())["cells"]["3x2"]
    assert found["frechet"] == report["cells"]["3x2"]["per_seed"][0]["frechet"]


def test_one_prior_is_sampled_with_other_numbers_of_steps(vae_file, tmp_path, monkeypatch):
    file = tmp_path / "prior.safetensors"
    checkpoint.save(file, small_vaes.prior(NVAEBackbone(small_vaes.vae())))
    asked, sample_u = set(), EBMPrior.sample_u

    def noted(self, num, **others):
        asked.add(others["num_steps"])
        return sample_u(self, num, **others)

    monkeypatch.setattr(EBMPrior, "sample_u", noted)
    flags = ["--sampling_only", "--prior", str(file), "--num_steps", "3", "1"]
    assert ablate(vae_file, tmp_path / "out", *flags) == 0
    assert asked == {1, 3}
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report["cells"]) == ["3x1", "3x3"]
    assert "a diagnostic" in report["protocol"]["training"]
    assert report["cells"]["3x1"]["frechet"] != report["cells"]["3x3"]["frechet"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --preset"),
        (["--preset", "digits", "--cells", "3"], "expected TxK"),
        (["--preset", "digits", "--repeats", "0"], "--repeats 0: expected at least 1"),
        (["--preset", "digits", "--seeds", "1", "1"], "expected different numbers"),
        (["--preset", "digits", "--prior", __file__], "belongs to --sampling_only"),
        (["--sampling_only", "--num_steps", "3"], "goes with --prior FILE and --num_steps"),
        (["--preset", "digits", "--features", "2048"], "features 2048 need the weights"),
    ],
)
def test_what_cannot_work_is_one_line(vae_file, tmp_path, capsys, here, flags, message):
    assert ablate(vae_file, tmp_path / "new", *flags) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "new").exists()
    assert here == []


def test_several_processes_are_refused(vae_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ablate(vae_file, tmp_path / "new", "--preset", "digits") == 2
    assert "run it without torchrun" in capsys.readouterr().err
