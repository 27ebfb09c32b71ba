"""Recorded Langevin chains, and the criterion that tells a chain that goes astray."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from ebm_prior import checkpoint, kinds, transitions
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.config import PriorConfig
from ebm_prior.prior import EBMPrior
from ebm_prior.transitions import Row
from tests.ebm_prior import small_vaes, toys


@pytest.fixture
def prior():
    backbone = toys.LinearGaussian((2, 3))
    settings = {"network": "mlp", "width": 8, "num_steps": 7, "b2": 0.1, "energy_scale": "none"}
    settings |= {"spectral_norm": False, "step_rule": "plain"}
    return EBMPrior(backbone, PriorConfig(shapes=backbone.layout.shapes, **settings)).double()


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def traced(prior, seed, **settings):
    frames = []
    settings = {"every": 3, "look": frames.append, **settings}
    return transitions.trace(prior, 4, generator=seeded(seed), **settings), frames


def test_looking_at_a_chain_does_not_change_a_bit_of_it(prior, seed):
    u, _ = traced(prior, seed, levels=range(3))
    assert torch.equal(u, prior.sample_u(4, generator=seeded(seed)))
    u, _ = traced(prior, seed, num_steps=11)
    assert torch.equal(u, prior.sample_u(4, generator=seeded(seed), num_steps=11))


def test_frames_are_the_start_every_few_steps_and_the_end(prior, seed):
    u, frames = traced(prior, seed)
    assert [(f.t, f.step) for f in frames] == [(t, step) for t in (2, 0) for step in (0, 3, 6, 7)]
    assert torch.equal(frames[-1].u, u)
    states = {}
    prior.sample_u(4, generator=seeded(seed), callback=states.__setitem__)
    for place, k in ((0, 3), (3, 2), (4, 1), (7, 0)):  # u_{t+1} starts the chain that ends as u_t
        assert torch.equal(frames[place].u, states[k])


def test_a_long_run_has_eleven_frames_per_index():
    steps = transitions.recorded_steps(transitions.LONG_STEPS, transitions.LONG_EVERY)
    assert len(steps) == 11
    assert steps[:2] == [0, 30]
    with pytest.raises(ValueError, match="expected at least 1"):
        transitions.recorded_steps(10, 0)


def test_the_numbers_of_a_frame_are_those_of_its_own_state(prior, seed):
    _, frames = traced(prior, seed)
    start, frame = frames[4], frames[5]  # at t = 0, after 0 and 3 steps
    torch.testing.assert_close(frame.f, -prior.layer_energy(frame.u, 0).mean(0))
    by_layer = [part.square().mean() for part in frame.u.split([2, 3], dim=1)]
    torch.testing.assert_close(frame.u_square, torch.stack(by_layer))
    u = frame.u.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(prior.log_density(0, start.u)(u).sum(), u)
    torch.testing.assert_close(frame.gradient_norm, gradient.norm(dim=1).mean())
    assert all(p.requires_grad for p in prior.energies.parameters())


def test_saturated_pixels_are_counted_at_both_ends():
    images = torch.tensor([0.0, 0.019, 0.021, 0.5, 0.979, 0.981, 1.0, 0.4]).view(1, 1, 2, 4)
    assert transitions.saturation(images) == 0.5


# --- the criterion


def rows(**changes):
    """A healthy log of 11 steps at t = 2 and t = 0; `changes` are of the last row."""
    healthy = [
        Row(t, step, (1.0, 2.0), (1.0, 0.9), 3.0, 0.2 if step else 0.6)
        for t in (2, 0)
        for step in range(0, 301, 30)
    ]
    return [*healthy[:-1], dataclasses.replace(healthy[-1], **changes)]


DISTANCES = {"gaussian": 30.0, "short": 10.0, "long": 14.0}


def failed(found):
    names = [name for name, item in found.items() if item["passed"] is False]
    assert transitions.passed(found) is not bool(names)
    return names


def test_a_healthy_chain_passes_every_item():
    found = transitions.verdict(rows(), DISTANCES)
    assert list(found) == ["u_square", "saturation", "frechet"]
    assert failed(found) == []
    assert (found["u_square"]["lowest"], found["u_square"]["highest"]) == (0.9, 1.0)
    assert found["saturation"]["change"] == {"2": 0.0, "0": 0.0}
    assert found["frechet"]["ratio"] == pytest.approx(1.4)


@pytest.mark.parametrize(
    ("changes", "item"),
    [
        ({"u_square": (1.0, 1.26)}, "u_square"),
        ({"u_square": (0.79, 1.0)}, "u_square"),
        ({"u_square": (float("nan"), 1.0)}, "u_square"),
        ({"saturation": 0.251}, "saturation"),
        ({"saturation": 0.149}, "saturation"),
        ({"saturation": float("nan")}, "saturation"),
    ],
)
def test_a_chain_that_goes_astray_fails_by_name(changes, item):
    assert failed(transitions.verdict(rows(**changes), DISTANCES)) == [item]


def test_the_start_of_a_level_does_not_count_as_oversaturated():
    assert failed(transitions.verdict(rows(saturation=0.249))) == []


def test_one_recorded_step_leaves_the_saturation_open():
    few = [row for row in rows() if row.t or row.step in (0, 30)]
    item = transitions.verdict(few)["saturation"]
    assert item["passed"] is None
    assert item["change"] == {"2": 0.0}
    assert (
        transitions.verdict([row for row in few if not row.step])["saturation"]["passed"] is None
    )


def test_long_chains_may_cost_half_as_much_again():
    assert failed(transitions.verdict(rows(), {**DISTANCES, "long": 15.0})) == []
    assert failed(transitions.verdict(rows(), {**DISTANCES, "long": 15.1})) == ["frechet"]


def test_on_digits_they_must_stay_below_the_gaussian_prior():
    digits = {"below_gaussian": True}
    assert failed(transitions.verdict(rows(), {**DISTANCES, "long": 29.0}, **digits)) == []
    assert failed(transitions.verdict(rows(), {**DISTANCES, "long": 30.0}, **digits)) == [
        "frechet"
    ]


def test_without_a_distance_the_verdict_stays_open():
    found = transitions.verdict(rows())
    assert found["frechet"]["passed"] is None
    assert transitions.passed(found) is None
    assert transitions.passed(transitions.verdict(rows(u_square=(2.0, 1.0)))) is False


def test_blocks_are_pooled_by_their_number_of_chains():
    one = Row(0, 30, (1.0,), (2.0,), 3.0, 0.0)
    other = Row(0, 30, (4.0,), (2.0,), 9.0, 1.0)
    assert transitions.pooled([(2, one), (1, other)]) == Row(
        0, 30, (2.0,), (2.0,), 5.0, pytest.approx(1 / 3)
    )


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, vae = tmp_path_factory.mktemp("files"), small_vaes.vae()
    backbone = NVAEBackbone(vae)
    checkpoint.save(folder / "prior", small_vaes.prior(backbone, num_steps=4))
    fitted = PriorConfig(backbone.layout.shapes, kind="fitted", max_T=1)
    checkpoint.save(folder / "fitted", kinds.build(backbone, fitted))
    return small_vaes.written(folder / "checkpoint.pt", vae), folder


@pytest.fixture
def run(files):
    vae, folder = files

    def run(out, *flags, prior="prior"):
        paths = ["--checkpoint", vae, "--prior", folder / prior, "--out", out]
        few = ["--num_samples", "5", "--batch_size", "3", "--shown", "2", "--device", "cpu"]
        long = ["--long_steps", "7", "--long_every", "3"]
        return main(["transitions", *map(str, paths), *few, *long, *flags])

    return run


@pytest.fixture
def quick_ruler(monkeypatch):
    """Pixels for features: no classifier to train."""

    class Pixels:
        title, protocol = "pixels", {}

        def distance(self, images):
            return float(images.std())

    monkeypatch.setattr(Ruler, "of", staticmethod(lambda job, **settings: Pixels()))


def test_the_command_traces_both_lengths_and_judges_the_long_one(
    run, tmp_path, capsys, quick_ruler
):
    assert run(tmp_path) == 0
    assert "no oversaturation after 7 steps per t" in capsys.readouterr().out
    names = {path.name for path in tmp_path.iterdir()}
    assert names >= {"short.png", "long.png", "short_curves.png", "long_curves.png"}
    report = json.loads((tmp_path / "report.json").read_text())
    steps = [(row["t"], row["step"]) for row in report["long"]["rows"]]
    assert steps == [(t, step) for t in (2, 1, 0) for step in (0, 3, 6, 7)]
    assert [row["step"] for row in report["short"]["rows"][:5]] == [0, 1, 2, 3, 4]
    assert all(len(row["f"]) == len(row["u_square"]) == 2 for row in report["long"]["rows"])
    assert report["short"]["rows"][0] == report["long"]["rows"][0], "both from the same noise"
    verdict = report["no_oversaturation"]
    assert verdict.keys() == {"passed", "u_square", "saturation", "frechet"}
    assert verdict["frechet"].keys() >= {"gaussian", "short", "long", "ratio"}
    assert verdict["passed"] is all(
        verdict[name]["passed"] for name in ("u_square", "saturation", "frechet")
    )


def test_short_chains_need_no_ruler_and_get_no_verdict(run, tmp_path, monkeypatch):
    monkeypatch.setattr(Ruler, "of", staticmethod(lambda *args, **settings: 1 / 0))
    assert run(tmp_path, "--mode", "short", "--short_every", "2") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert [row["step"] for row in report["short"]["rows"]] == [0, 2, 4] * 3
    assert report.keys() == {"short", "protocol"}


def test_a_prior_without_a_chain_is_refused(run, tmp_path, capsys):
    assert run(tmp_path / "out", prior="fitted") == 2
    assert "a prior of kind fitted has no Langevin chain" in capsys.readouterr().err
    assert run(tmp_path / "out", "--long_every", "0") == 2
    assert "--long_every 0: expected at least 1" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
