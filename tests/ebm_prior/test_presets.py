"""Presets: whole, well-formed, and the published numbers where there are any."""

from __future__ import annotations

import pytest

from ebm_prior.commands.train.flags import PRIOR_FLAGS, TRAINING_FLAGS
from ebm_prior.config import PriorConfig
from ebm_prior.presets import PRESETS, PRIOR_SETTINGS, resolved
from ebm_prior.prior import EBMPrior
from ebm_prior.training.settings import TrainSettings
from nvae.arch import DATA_SETS
from tests.ebm_prior.toys import LinearGaussian


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_complete_and_each_value_has_a_flag(name):
    row = PRESETS[name]
    assert row["data"] in DATA_SETS
    assert row["source"]
    assert row["paper"]
    flags = {*PRIOR_FLAGS, *TRAINING_FLAGS, "iterations", "epochs"}
    assert set(row["settings"]) == flags
    assert set(PRIOR_SETTINGS) == set(PRIOR_FLAGS)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_accepted_by_the_prior_and_the_trainer(name):
    settings = resolved(name, {})
    PriorConfig(shapes=((20, 8, 8),), **{key: settings[key] for key in PRIOR_SETTINGS})
    known = TrainSettings.__dataclass_fields__
    length = settings["iterations"] or settings["epochs"]
    TrainSettings(**{k: v for k, v in settings.items() if k in known} | {"iterations": length})


def test_the_defaults_of_trainer_and_prior_are_the_cifar10_row():
    settings = resolved("cifar10", {})
    for kind in (TrainSettings(iterations=1), PriorConfig(shapes=((20, 16, 16),))):
        shared = settings.keys() & kind.__dataclass_fields__.keys() - {"iterations"}
        assert {k: getattr(kind, k) for k in shared} == {k: settings[k] for k in shared}


def test_the_published_rows_hold_the_published_values():
    cifar10, celeba = (resolved(name, {}) for name in ("cifar10", "celeba256"))
    assert [cifar10[k] for k in ("num_steps", "b2", "width", "batch_size", "lr_decay")] == [
        *(50, 3e-5, 128, 25, 0.9)
    ]
    assert [celeba[k] for k in ("num_steps", "b2", "width", "batch_size", "lr_decay")] == [
        *(30, 2e-5, 64, 2, 0.98)
    ]
    for row in (cifar10, celeba):
        assert (row["lr"], row["beta1"], row["beta2"]) == (4e-5, 0.99, 0.999)
        assert (row["weight_decay"], row["max_T"], row["epochs"]) == (3e-5, 3, 200)
        assert (row["energy_scale"], row["step_rule"]) == ("step", "cumulative")
    assert cifar10["bn_readjust"]
    assert not celeba["bn_readjust"]


def test_what_is_given_replaces_the_preset_and_none_is_not_given():
    assert resolved("digits", {"lr": 1e-4, "width": None})["lr"] == 1e-4
    assert resolved("digits", {"lr": 1e-4, "width": None})["width"] == 256


def test_the_length_of_a_run_is_one_choice():
    assert resolved("cifar10", {"iterations": 7})["epochs"] is None
    assert resolved("digits", {"epochs": 3})["iterations"] is None
    with pytest.raises(ValueError, match="in one of them"):
        resolved("digits", {"epochs": 3, "iterations": 7})


def test_unknown_presets_and_settings_are_named():
    with pytest.raises(ValueError, match="expected one of cifar10"):
        resolved("cifar", {})
    with pytest.raises(ValueError, match="unknown settings speed"):
        resolved("digits", {"speed": 1})


def test_the_digits_preset_builds_a_prior_on_small_latents():
    settings = resolved("digits", {})
    backbone = LinearGaussian()
    chosen = {key: settings[key] for key in PRIOR_SETTINGS}
    EBMPrior(backbone, PriorConfig(shapes=backbone.layout.shapes, **chosen))
