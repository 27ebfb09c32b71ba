"""The trainer: it learns, it goes on bit for bit, it notices when it is lost."""

from __future__ import annotations

import json
import math
import os
import signal
import sys

import pytest
import torch

from ebm_prior import checkpoint, parallel
from ebm_prior.config import PriorConfig
from ebm_prior.prior import EBMPrior
from ebm_prior.seeds import seeded
from ebm_prior.trainer import Trainer
from ebm_prior.training import run_state
from ebm_prior.training.batches import Batches
from ebm_prior.training.ema import Average
from ebm_prior.training.guard import Guard, Limits, Measured
from ebm_prior.training.settings import TrainSettings
from tests.ebm_prior.toys import LinearGaussian

SMALL = {
    "network": "mlp",
    "width": 8,
    "depth": 1,
    "spectral_norm": False,
    "max_T": 2,
    "num_steps": 3,
    "b2": 0.1,
    "energy_scale": "none",
    "step_rule": "plain",
}
FAST = {"lr": 1e-2, "beta1": 0.9, "weight_decay": 0.0, "grid_every": 0, "log_every": 1}


def data(count=40, shift=0.0):
    """u of the toy backbone, in the images' place: its `infer` gives back what it gets."""
    return shift + torch.randn(count, 7, generator=torch.Generator().manual_seed(9))


def trainer(out, *, backbone=None, source=None, show=None, prior=None, **settings):
    backbone = backbone or LinearGaussian(dtype=torch.float32)
    torch.manual_seed(3)
    config = PriorConfig(shapes=backbone.layout.shapes, **SMALL | (prior or {}))
    settings = TrainSettings(**{"iterations": 6, **FAST, **settings})
    source = source or Batches(data(), 8, seed=settings.seed)
    return Trainer(
        EBMPrior(backbone, config), source, settings, out, show=show, bar=False, fingerprint="toy"
    )


def resumed(out, **settings):
    again = trainer(out, **settings)
    again.resume(run_state.read(out))
    return again


def learned(out):
    """Weights, optimiser and averages of a run, flat."""
    flat = []

    def walk(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                walk(value[key])
        elif isinstance(value, torch.Tensor):
            flat.append(value.double().flatten())

    walk(run_state.read(out)["learned"])
    return torch.cat(flat)


def same_run(one, two):
    assert torch.equal(learned(one), learned(two))
    files = [checkpoint.read(run / "prior.safetensors") for run in (one, two)]
    assert files[0].step == files[1].step
    assert all(torch.equal(files[0].learned[k], v) for k, v in files[1].learned.items())


def metrics(out, name):
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


class Stopping:
    """Batches that do something before batch `at`."""

    def __init__(self, at, act):
        self.batches, self.at, self.act, self.given = Batches(data(), 8), at, act, 0

    def __len__(self):
        return len(self.batches)

    def epoch(self, number, start=0):
        for batch in self.batches.epoch(number, start):
            if self.given == self.at:
                self.act()
            self.given += 1
            yield batch


# --- going on


KINDS = {
    "plain": {},
    "averaged, linear, clipped": {
        "ema": 0.9,
        "lr_schedule": "linear",
        "lr_decay": 0.1,
        "grad_clip": 0.5,
        "squared_penalty": 0.01,
    },
    "spectral norm, per epoch": {
        "prior": {"spectral_norm": True, "energy_scale": "step"},
        "lr_decay": 0.5,
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_and_three_more_are_six_to_the_bit(tmp_path, kind):
    settings = KINDS[kind]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer(whole, **settings).run().done
    first = trainer(parts, source=Stopping(2, lambda: os.kill(os.getpid(), 15)), **settings)
    assert first.run().step == 3
    assert resumed(parts, **settings).run().done
    same_run(whole, parts)
    assert metrics(whole, "loss") == metrics(parts, "loss")


def test_a_killed_run_goes_on_from_its_last_save_to_the_same_bits(tmp_path):
    def die():
        raise RuntimeError("killed")

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trainer(whole, save_every=2, ema=0.5).run()
    with pytest.raises(RuntimeError, match="killed"):
        trainer(parts, save_every=2, ema=0.5, source=Stopping(5, die)).run()
    assert run_state.read(parts)["step"] == 4
    again = resumed(parts, save_every=2, ema=0.5)
    assert again.run().done
    same_run(whole, parts)
    assert metrics(parts, "step") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_everything_saved(tmp_path, number):
    before = signal.getsignal(number)
    source = Stopping(1, lambda: os.kill(os.getpid(), number))
    summary = trainer(tmp_path, source=source).run()
    assert (summary.step, summary.signal, summary.done) == (2, number, False)
    assert run_state.read(tmp_path)["step"] == 2
    assert (tmp_path / "prior.safetensors").is_file()
    assert signal.getsignal(number) is before


def test_going_on_with_other_settings_is_refused_by_name(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match=r"ema 0\.0 \(now 0\.9\), lr 0\.01 \(now 0\.001\)"):
        resumed(tmp_path, lr=1e-3, ema=0.9)
    with pytest.raises(ValueError, match=r"width 8 \(now 16\)"):
        resumed(tmp_path, prior={"width": 16})
    with pytest.raises(ValueError, match="batches per epoch 5"):
        resumed(tmp_path, source=Batches(data(80), 8))


def test_a_run_may_be_made_longer_unless_its_learning_rate_depends_on_the_length(tmp_path):
    trainer(tmp_path / "a").run()
    assert resumed(tmp_path / "a", iterations=8, save_every=1).run().step == 8
    linear = {"lr_schedule": "linear", "lr_decay": 0.1}
    trainer(tmp_path / "b", **linear).run()
    with pytest.raises(ValueError, match=r"iterations 6 \(now 8\)"):
        resumed(tmp_path / "b", iterations=8, **linear)


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    trainer(tmp_path).run()
    before = (tmp_path / "last.pt").read_bytes()
    assert resumed(tmp_path).run().done
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", None])
def test_a_broken_run_state_gives_one_clear_line(tmp_path, content):
    trainer(tmp_path).run()
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:2000] if content is None else content)
    with pytest.raises(ValueError, match=r"last\.pt: not a whole run state"):
        run_state.read(tmp_path)


def test_a_run_state_of_another_kind_is_refused(tmp_path):
    assert run_state.read(tmp_path) is None
    torch.save({"format": 2}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="format 2, expected 1"):
        run_state.read(tmp_path)
    torch.save({"format": 1, "step": 2}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="lacks facts"):
        run_state.read(tmp_path)


# --- learning


def test_the_prior_learns_where_the_data_are(tmp_path):
    """u has mean 1 in each coordinate, the Gaussian prior 0; an unlearned chain stays near 0."""
    one_step = {"max_T": 1, "num_steps": 10, "b2": 0.3, "width": 32}
    source = Batches(data(512, shift=1.0), 64)
    training = trainer(tmp_path, source=source, prior=one_step, iterations=120)
    training.run()
    g = torch.Generator().manual_seed(1)
    mean = training.prior.sample_u(500, generator=g).mean()
    control = training.prior.sample_u(500, generator=g, zero_energy=True).mean()
    error = 1 / math.sqrt(500 * 7)
    assert abs(control) < 4 * error
    assert mean > 0.3


def test_the_learning_rate_falls_per_epoch_linearly_or_along_a_cosine():
    per_epoch = TrainSettings(iterations=100, lr=1.0, lr_decay=0.5)
    assert [per_epoch.lr_at(step, 10) for step in (0, 9, 10, 29)] == [1.0, 1.0, 0.5, 0.25]
    linear = TrainSettings(iterations=11, lr=1.0, lr_decay=0.1, lr_schedule="linear")
    assert linear.lr_at(0, 10) == 1.0
    assert linear.lr_at(5, 10) == pytest.approx(0.55)
    assert linear.lr_at(10, 10) == pytest.approx(0.1)
    cosine = TrainSettings(iterations=5, lr=1.0, lr_decay=0.5, lr_schedule="cosine")
    found = [cosine.lr_at(step, 10) for step in range(5)]
    quarter = 0.75 + 0.25 * math.cos(math.pi / 4)
    assert found == pytest.approx([1.0, quarter, 0.75, 1.5 - quarter, 0.5])


def test_the_gradient_is_clipped_to_the_given_norm(tmp_path):
    training = trainer(tmp_path, iterations=1, grad_clip=1e-3)
    training.run()
    norm = torch.stack([p.grad.norm() for p in training.prior.energies.parameters()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)


def test_averaged_weights_follow_the_formula_and_are_the_ones_saved(tmp_path):
    layer = torch.nn.Linear(2, 1)
    average, start = Average(layer, 0.9), layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    average.update()
    torch.testing.assert_close(average.shadow["weight"], 0.9 * start + 0.1 * (start + 1))
    live = layer.weight.detach().clone()
    with average.applied():
        assert not torch.equal(layer.weight, live)
    assert torch.equal(layer.weight, live)

    training = trainer(tmp_path, ema=0.9)
    training.run()
    saved = checkpoint.read(tmp_path / "prior.safetensors").learned
    assert all(torch.equal(saved[k], v) for k, v in training.ema.shadow.items())
    assert not torch.equal(saved["netE0.input.weight"], training.ema.module.netE0.input.weight)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": 0}, "iterations is 0, expected 1"),
        ({"lr": -1.0}, "lr is -1"),
        ({"ema": 1.0}, "the end excluded"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr_schedule": "steps"}, "expected one of epoch, linear, cosine"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**{"iterations": 1, **settings})


# --- the guard


def measured(**values):
    well = {"loss": 0.0, "difference": 0.0, "u_std": 1.0, "data_std": 1.0, "gradient": 1.0}
    return Measured(**{**well, "worst_layer": 1.0, **values})


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ({}, None),
        ({"difference": -4.0}, None),
        ({"difference": -6.0}, r"mean f\(u-\) - f\(u\+\) is -6"),
        ({"u_std": 1.9}, None),
        ({"u_std": 2.1}, "deviation of u- is 2.1"),
        ({"u_std": 2.1, "data_std": 1.5}, None),
        ({"loss": math.nan}, "not finite"),
        ({"gradient": math.inf}, "not finite"),
        ({"worst_layer": 2e15}, "limit 1e[+]15"),
    ],
)
def test_the_guard_tells_a_lost_step_from_a_good_one(step, reason):
    verdict = Guard(Limits()).judge(measured(**step))
    assert (verdict is None) == (reason is None)
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            raise ValueError(verdict)


def test_the_guard_judges_running_means_and_not_a_single_outlier():
    guard = Guard(Limits())
    for _ in range(10):
        assert guard.judge(measured()) is None
    assert guard.judge(measured(difference=-20.0)) is None
    assert guard.difference == pytest.approx(-2.0)
    assert guard.well
    assert guard.judge(measured(difference=-20.0)) is None
    assert not guard.well
    assert guard.judge(measured(difference=-20.0)) is not None


def test_the_limit_grows_with_the_coordinates_where_f_carries_the_motion():
    shapes = ((20, 16, 16),) * 30
    scaled = PriorConfig(shapes)
    plain = {"energy_scale": "none", "step_rule": "plain"}
    mixing = PriorConfig(shapes, **plain, b2=0.3, num_steps=10)
    still = PriorConfig(shapes, **plain, b2=1e-5, num_steps=10, max_T=1, kind="joint")
    assert Limits.of(mixing).difference == 5
    assert Limits.of(scaled).difference == 2 * 153600 / 50
    assert Limits.of(still).difference == pytest.approx(2 * 153600 / 1e-4, rel=1e-3)
    assert Limits.of(PriorConfig(shapes, kind="ncp")).difference == math.inf


def test_a_lost_run_goes_back_and_halves_the_learning_rate(tmp_path, capsys):
    training = trainer(tmp_path, guard_every=2)
    judge, training.guard.judge = training.guard.judge, None
    states = {}

    def planted(step):
        states[training.step] = training._learned()["energies"]
        return "planted" if training.step == 4 else judge(step)

    training.guard.judge = planted
    summary = training.run()
    assert summary.halvings == 1
    assert "step 5: planted; back to the weights of step 4" in capsys.readouterr().err
    assert all(torch.equal(states[5][k], v) for k, v in states[4].items())
    # Step 6 is in the second epoch.
    assert metrics(tmp_path, "lr") == pytest.approx([1e-2] * 5 + [5e-3 * 0.9])


def test_going_on_remembers_the_halved_rate_and_what_the_guard_saw(tmp_path):
    first = trainer(tmp_path, source=Stopping(4, lambda: os.kill(os.getpid(), 15)))
    judge = first.guard.judge
    first.guard.judge = lambda step: "planted" if first.step == 1 else judge(step)
    assert first.run().step == 5
    again = resumed(tmp_path)
    assert again.lr_factor == first.lr_factor == 0.5
    assert again.guard.state_dict() == first.guard.state_dict()
    assert (again.guard.halvings, again.guard.seen) == (1, 3)


def test_a_state_near_the_limits_is_none_to_go_back_to(tmp_path, monkeypatch):
    near, well = (
        trainer(tmp_path / "near", guard_every=2),
        trainer(tmp_path / "well", guard_every=2),
    )
    monkeypatch.setattr(Guard, "well", True)
    well.run()
    monkeypatch.setattr(Guard, "well", False)
    near.run()
    assert (well.good_step, near.good_step) == (6, 0)


def test_the_state_to_go_back_to_is_not_touched_by_training_on_from_it(tmp_path):
    training = trainer(tmp_path, guard_every=4, iterations=7)
    judge, kept = training.guard.judge, {}

    def planted(step):
        if training.step != 4:
            return judge(step)
        kept.update(run_state.on_cpu(training.good["optimizer"]["state"]))
        return "planted"

    training.guard.judge = planted
    training.run()
    assert kept
    for number, moments in training.good["optimizer"]["state"].items():
        assert all(torch.equal(kept[number][name], value) for name, value in moments.items())


def test_a_run_that_is_lost_again_and_again_stops_with_the_last_good_state_saved(tmp_path):
    training = trainer(tmp_path, iterations=400, lr=30.0, max_halvings=2)
    start = training._learned()["energies"]
    with pytest.raises(ValueError, match=r"halved 2 times; the last good state, of step 0, is in"):
        training.run()
    saved = checkpoint.read(tmp_path / "prior.safetensors").learned
    assert all(torch.equal(saved[key], value) for key, value in start.items())


def test_a_backbone_that_gives_nan_is_told_apart_from_energies_that_diverge(tmp_path):
    backbone = LinearGaussian(dtype=torch.float32)
    backbone.infer = lambda x, generator=None: x * math.nan
    with pytest.raises(ValueError, match="the backbone's posterior holds NaN"):
        trainer(tmp_path, backbone=backbone).run()


# --- what is told


def test_pictures_come_from_the_same_noise_at_every_nth_step_and_the_last(tmp_path):
    shown = {}

    def show(path, images, caption):
        shown[path.name] = images.clone()
        path.parent.mkdir(exist_ok=True)
        path.touch()

    trainer(tmp_path, show=show, grid_every=4, grid_size=10, lr=1e-9, ema=0.5).run()
    names = ["gaussian.png", *(f"step_{step:07}.png" for step in (4, 6))]
    assert list(shown) == names
    assert all(len(images) == 10 for images in shown.values())
    torch.testing.assert_close(shown[names[1]], shown[names[2]], atol=1e-4, rtol=0)


def test_a_short_run_draws_no_picture_that_takes_longer_than_it_did(tmp_path):
    sizes = []
    for size in (24, 25):  # 6 steps of 8 images are as much work as 24 samples with max_T 2
        shown = []
        out = tmp_path / str(size)
        trainer(out, show=lambda *a, s=shown: s.append(a), grid_every=500, grid_size=size).run()
        sizes += [size] if shown else []
    assert sizes == [24]


def test_pictures_do_not_change_the_training(tmp_path):
    trainer(tmp_path / "with", show=lambda *_: None, grid_every=1).run()
    trainer(tmp_path / "without").run()
    assert torch.equal(learned(tmp_path / "with"), learned(tmp_path / "without"))


def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert trainer(tmp_path).run().done
    assert "tensorboardX is missing" in capsys.readouterr().err
    assert len(metrics(tmp_path, "loss")) == 6


def test_the_config_of_the_run_is_written(tmp_path):
    trainer(tmp_path).run()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["prior"]["width"] == 8
    assert config["training"]["iterations"] == 6
    assert config["backbone"] == "toy"


# --- batches


def test_an_epoch_from_the_middle_is_the_rest_of_the_whole_epoch():
    batches = Batches(torch.arange(23), 4, seed=1)
    assert len(batches) == 5
    whole = [batch.tolist() for batch in batches.epoch(2)]
    assert [batch.tolist() for batch in batches.epoch(2, start=3)] == whole[3:]
    assert len({x for batch in whole for x in batch}) == 20
    assert whole != [batch.tolist() for batch in batches.epoch(3)]
    assert whole != [batch.tolist() for batch in Batches(torch.arange(23), 4, seed=2).epoch(2)]


def test_processes_share_an_epoch_without_overlap(monkeypatch):
    monkeypatch.setattr(parallel, "world_size", lambda: 3)
    seen = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        batches = Batches(torch.arange(40), 4)
        assert len(batches) == 3
        seen += [x for batch in batches.epoch(0) for x in batch.tolist()]
    assert len(set(seen)) == len(seen) == 36


def test_too_few_images_for_a_batch_are_told():
    with pytest.raises(ValueError, match="5 images, fewer than one batch of 8"):
        Batches(torch.arange(5), 8)


def test_seeds_of_different_keys_differ():
    draws = {float(torch.rand((), generator=seeded("cpu", *k))) for k in ((0, 1), (1, 0), (0, 2))}
    assert len(draws) == 3
