"""`ebm_prior sample` beyond plain images: temperatures, labels, going on after a kill."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_prior import checkpoint, kinds
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.sample import drawing
from ebm_prior.commands.sample.drawing import chosen_labels
from ebm_prior.commands.sample.table import Blocks
from ebm_prior.config import PriorConfig
from ebm_prior.coupling import Attribute
from ebm_prior.ncp import context_shapes
from ebm_prior.prior import EBMPrior
from nvae.runtime import Runtime
from tests.ebm_prior import small_vaes
from tests.processes import together

SEVEN = ["--num_samples", "7", "--batch_size", "2", "--grid", "0"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A VAE's checkpoint, a prior, and one with labels at its top layer."""
    folder, vae = tmp_path_factory.mktemp("files"), small_vaes.vae()
    backbone = NVAEBackbone(vae)
    checkpoint.save(folder / "plain", small_vaes.prior(backbone))
    labelled = small_vaes.prior(backbone, attributes=(Attribute("class", 3, (0,)),))
    with torch.no_grad():
        for parameter in labelled.energies.parameters():
            parameter.mul_(3)
    checkpoint.save(folder / "labelled", labelled)
    return small_vaes.written(folder / "checkpoint.pt", vae), folder


@pytest.fixture
def sample(files):
    vae, folder = files

    def run(out, *flags, prior="plain"):
        paths = ["--checkpoint", vae, "--prior", folder / prior, "--out", out]
        return main(["sample", *map(str, paths), "--device", "cpu", *flags])

    return run


def images(out):
    return np.load(out / "samples.npz")["samples"]


def test_temperatures_are_one_picture_and_change_no_image(sample, tmp_path):
    flags = ["--num_samples", "3", "--format", "npz", "--grid", "0"]
    assert sample(tmp_path / "plain", *flags) == 0
    assert sample(tmp_path / "grid", *flags, "--temperatures", "0.4", "1", "--progressive") == 0
    np.testing.assert_array_equal(images(tmp_path / "plain"), images(tmp_path / "grid"))
    names = {path.name for path in (tmp_path / "grid").iterdir()}
    assert names == {"samples.npz", "temperatures.png", "progressive.png", "report.json"}


def test_a_picture_of_temperatures_has_one_latent_per_column(sample, tmp_path, monkeypatch):
    seen = []
    decode = NVAEBackbone.decode

    def noted(self, u, temperature=1.0, generator=None):
        seen.append((u.clone(), temperature, generator.initial_seed()))
        return decode(self, u, temperature, generator)

    monkeypatch.setattr(NVAEBackbone, "decode", noted)
    assert sample(tmp_path, "--num_samples", "3", "--temperatures", "0.4", "0.7", "1") == 0
    (u, *_), *rows = seen
    assert [temperature for _, temperature, _ in rows] == [0.4, 0.7, 1.0]
    assert all(torch.equal(row, u) for row, _, _ in rows)
    assert len({key for _, _, key in rows}) == 1
    with Image.open(tmp_path / "temperatures.png") as picture:
        assert picture.width > picture.height // 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperatures", "0.5", "0"], "--temperatures 0.0: expected a positive number"),
        (["--set", "3"], "--set 3: expected NAME=CLASS"),
        (["--label_steps", "1"], "--label_steps without --set"),
        (["--guidance", "nan"], "--guidance nan: expected a finite number"),
        (["--set", "class=3"], "this prior was trained without labels"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(sample, tmp_path, capsys, flags, message):
    assert sample(tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["joint", "fitted", "ncp"])
def test_every_kind_is_drawn_and_shown_on_its_way(files, sample, tmp_path, kind):
    _, folder = files
    backbone = NVAEBackbone(small_vaes.vae())
    settings = {"network": "mlp", "width": 8, "num_steps": 2, "b2": 0.05, "max_T": 1}
    settings |= {"energy_scale": "none", "step_rule": "plain", "kind": kind}
    if kind == "ncp":
        settings["contexts"] = context_shapes(backbone)
    config = PriorConfig(backbone.layout.shapes, **settings)
    prior = kinds.build(backbone, config)
    if kind == "fitted":
        prior.gaussian.factor.copy_(torch.eye(len(prior.gaussian.factor)))
    checkpoint.save(folder / kind, prior)
    assert sample(tmp_path, "--num_samples", "2", "--progressive", prior=kind) == 0
    assert len(images(tmp_path)) == 2
    assert (tmp_path / "progressive.png").exists()


# --- labels

SHAPES = ((2, 4, 4), (2, 4, 4))
BOTH = (Attribute("class", 10, (0,)), Attribute("loop", 2, (1,)))


def test_labels_become_a_number_per_attribute():
    one = PriorConfig(SHAPES, attributes=BOTH[:1])
    both = PriorConfig(SHAPES, attributes=BOTH)
    assert chosen_labels([], both) is None
    assert chosen_labels(["class=7"], one) == [7]
    assert chosen_labels(["loop=1"], both) == chosen_labels(["loop=loop"], both) == [-1, 1]
    assert chosen_labels(["loop=1", "class=0"], both) == [0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["colour=1"], "expected NAME=CLASS with NAME class or loop"),
        (["1"], "expected NAME=CLASS"),
        (["loop=2"], "loop=2: expected one of open, loop"),
        (["loop=yes"], "loop=yes: expected one of open, loop"),
        (["loop=1", "loop=0"], "an attribute is named twice"),
    ],
)
def test_labels_that_the_prior_does_not_know_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        chosen_labels(given, PriorConfig(SHAPES, attributes=BOTH))


def test_classes_and_guidance_reach_the_chain(sample, tmp_path):
    def drawn(name, *flags):
        flags = ["--num_samples", "4", "--format", "npz", *flags]
        assert sample(tmp_path / name, *flags, prior="labelled") == 0
        return images(tmp_path / name)

    free, zero, one = drawn("free"), drawn("0", "--set", "class=0"), drawn("1", "--set", "class=1")
    assert not np.array_equal(zero, one)
    assert not np.array_equal(zero, free)
    np.testing.assert_array_equal(drawn("g0", "--set", "class=0", "--guidance", "0"), free)


# --- going on


def killed_after(monkeypatch, blocks):
    """The chains of further blocks end the process; returns the number of chains so far."""
    calls, sample_u = [], EBMPrior.sample_u

    def counted(self, *args, **further):
        calls.append(args)
        if len(calls) > blocks:
            raise KeyboardInterrupt
        return sample_u(self, *args, **further)

    monkeypatch.setattr(EBMPrior, "sample_u", counted)
    return calls


@pytest.mark.parametrize("form", ["npz", "both", "png"])
def test_a_killed_run_goes_on_with_the_missing_blocks(sample, tmp_path, monkeypatch, form):
    flags = [*SEVEN, "--format", form]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sample(whole, *flags) == 0
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        assert sample(parts, *flags) == 130
    with monkeypatch.context() as patch:
        calls = killed_after(patch, 99)
        assert sample(parts, *flags, "--resume", "auto") == 0
    assert len(calls) == 2, "of four blocks two were there"
    if form != "png":
        np.testing.assert_array_equal(images(parts), images(whole))
    for path in (whole / "png").glob("*.png"):
        assert (parts / "png" / path.name).read_bytes() == path.read_bytes()
    assert {p.name for p in parts.iterdir()} == {p.name for p in whole.iterdir()}


def _go_on(rank, words, told):
    drawn, draw = [], drawing.Drawing.draw

    def noted(self, first, count):
        drawn.append(first)
        return draw(self, first, count)

    drawing.Drawing.draw = noted
    assert main([*words, "--resume", "auto"]) == 0
    (told / f"{rank}.json").write_text(json.dumps(drawn))


def test_processes_share_what_a_killed_run_left_evenly(files, sample, tmp_path, monkeypatch):
    flags = ["--num_samples", "12", "--batch_size", "2", "--grid", "0", "--format", "npz"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert sample(whole, *flags) == 0
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        assert sample(parts, *flags) == 130
    done = np.lib.format.open_memmap(parts / ".sampling.npy", "r+")
    done[:] = [1, 0, 1, 0, 0, 0]  # as if the first of two processes had been the faster one
    done.flush()
    vae, folder = files
    paths = ["--checkpoint", vae, "--prior", folder / "plain", "--out", parts]
    together(_go_on, ["sample", *map(str, paths), "--device", "cpu", *flags], tmp_path)
    drawn = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert drawn == [[2, 8], [6, 10]]
    np.testing.assert_allclose(images(parts), images(whole), atol=1e-5)


def test_the_bar_counts_the_images_of_all_processes_from_where_it_goes_on(
    sample, tmp_path, monkeypatch
):
    bars = []

    class Bar(drawing.tqdm):
        def __init__(self, **given):
            super().__init__(**given)
            bars.append(self)

    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        assert sample(tmp_path, *SEVEN) == 130
    done = np.lib.format.open_memmap(tmp_path / ".sampling.npy", "r+")
    done[:] = [1, 0, 0, 1]  # the last block holds one image
    done.flush()
    monkeypatch.setattr(drawing, "tqdm", Bar)
    assert sample(tmp_path, *SEVEN, "--resume", "auto") == 0
    (bar,) = bars
    assert (bar.initial, bar.n, bar.total) == (3, 7, 7)
    assert "images/s" in str(bar)


def test_blocks_that_a_picture_shows_are_drawn_again(sample, tmp_path, monkeypatch):
    flags = [*SEVEN[:4], "--grid", "4", "--temperatures", "1"]
    assert sample(tmp_path / "whole", *flags) == 0
    with monkeypatch.context() as patch:
        killed_after(patch, 3)
        assert sample(tmp_path / "parts", *flags) == 130
    assert sample(tmp_path / "parts", *flags, "--resume", "auto") == 0
    for name in ("grid.png", "temperatures.png"):
        one, two = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert one == two


def test_going_on_needs_the_same_settings(sample, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        killed_after(patch, 2)
        assert sample(tmp_path, *SEVEN) == 130
    assert sample(tmp_path, *SEVEN, "--resume", "auto", "--seed", "1") == 2
    assert "holds part of a run with seed 0 (now 1)" in capsys.readouterr().err
    assert sample(tmp_path, *SEVEN, "--seed", "1") == 0
    assert json.loads((tmp_path / "report.json").read_text())["protocol"]["seed"] == 1


def test_a_finished_run_is_not_drawn_again(sample, tmp_path, monkeypatch, capsys):
    flags = ["--num_samples", "4", "--batch_size", "2", "--format", "npz", "--grid", "0"]
    assert sample(tmp_path / "out", *flags) == 0
    monkeypatch.setattr(drawing.Drawing, "draw", lambda *args: pytest.fail("drawn again"))
    assert sample(tmp_path / "out", *flags, "--resume", "auto") == 0
    assert "complete already" in capsys.readouterr().out
    monkeypatch.undo()
    assert sample(tmp_path / "out", *flags, "--seed", "1", "--resume", "auto") == 0
    assert "complete already" not in capsys.readouterr().out


def test_a_stopped_run_says_how_to_go_on(sample, tmp_path, monkeypatch, capsys):
    draw, drawn = drawing.Drawing.draw, []

    def once(self, first, count):
        if drawn:
            raise KeyboardInterrupt
        drawn.append(first)
        return draw(self, first, count)

    monkeypatch.setattr(drawing.Drawing, "draw", once)
    assert sample(tmp_path, "--num_samples", "6", "--batch_size", "2", "--grid", "0") == 130
    assert "2 of 6 images are kept; go on with the same command" in capsys.readouterr().err


def test_without_a_killed_run_there_is_nothing_to_go_on_with(sample, tmp_path):
    assert sample(tmp_path, *SEVEN, "--resume", "auto") == 0
    assert len(images(tmp_path)) == 7
    blocks = Blocks(tmp_path, 4, {}, Runtime(torch.device("cpu")), resume=True)
    assert not blocks.going_on
    assert not blocks.done.any()
