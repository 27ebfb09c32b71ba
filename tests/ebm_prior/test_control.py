"""Steering a prior with labels, composing attributes, and the command `control`."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from ebm_prior import control
from ebm_prior.commands import main
from ebm_prior.config import PriorConfig
from ebm_prior.coupling import Attribute
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import Schedule
from tests.conftest import needs_digits
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import EightModes, Energies, LinearGaussian

SMALL = {
    **{"network": "mlp", "width": 8, "spectral_norm": False, "num_steps": 4},
    **{"energy_scale": "none", "step_rule": "plain", "b2": 0.1},
}
TOP, MIDDLE, LOW = (Attribute(name, 3, (i,)) for i, name in enumerate(("top", "middle", "low")))


def steered(*attributes, seed=0, **changes):
    """Random energies with large logits on the linear-Gaussian toy of layers 2, 2, 3."""
    toy = LinearGaussian(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = PriorConfig(toy.layout.shapes, attributes=attributes, **(SMALL | changes))
        prior = EBMPrior(toy, config).double()
    for parameter in prior.energies.parameters():
        parameter.data *= 2
    return prior


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


# --- label_steps


def test_labels_begin_to_act_where_the_noise_leaves_the_class_open():
    found = [control.label_steps_for(Schedule(n)) for n in range(1, 8)]
    assert found == [1, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("max_T", [4, 5, 6])
def test_the_recommended_label_steps_suffice_for_the_oracle(max_T, generator):
    toy, steps = EightModes(), control.label_steps_for(Schedule(max_T))
    settings = SMALL | {"max_T": max_T, "num_steps": 30}
    corner = (Attribute("corner", 4, (1,)),)
    prior = EBMPrior(toy, PriorConfig(toy.layout.shapes, attributes=corner, **settings))
    prior.energies = Energies(toy.oracle(prior.schedule, 4))
    labels = torch.arange(4).repeat_interleave(250).unsqueeze(1)

    def share(label_steps):
        u = control.sample_classes(prior, labels, generator=generator, label_steps=label_steps)
        nearest = torch.cdist(u, toy.means).argmin(1) % 4
        return control.agreement(control.confusion(labels[:, 0], nearest, 4))

    assert share(steps) > 0.99
    assert share(None) < share(steps) - 0.001, "the configured 1 is too few"


# --- labels


def test_an_unspecified_attribute_and_a_neighbour_change_nothing(seed):
    prior = steered(TOP, LOW, seed=seed)
    free = prior.sample_u(3, generator=generator_of(seed))
    labels = torch.tensor([[-1, -1], [2, -1], [-1, -1]])
    asked = control.sample_classes(prior, labels, generator=generator_of(seed))
    assert torch.equal(asked[[0, 2]], free[[0, 2]])
    assert not torch.equal(asked[1], free[1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([[0, 3]], "class 3 of attribute 'low': expected 0 to 2"),
        ([[-2, 0]], "class -2 of attribute 'top': expected 0 to 2"),
        ([[0]], "expected \\(1, 2\\)"),
    ],
)
def test_classes_that_do_not_exist_are_refused_before_the_chain(labels, message):
    prior, before = steered(TOP, LOW), generator_of(0).get_state()
    generator = generator_of(0)
    with pytest.raises(ValueError, match=message):
        prior.sample_u(1, labels=torch.tensor(labels), generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize("label_steps", [0, 4])
def test_label_steps_beyond_the_diffusion_are_refused(label_steps):
    prior, labels = steered(TOP), torch.tensor([[0]])
    with pytest.raises(ValueError, match="expected 1 to 3"):
        control.sample_classes(prior, labels, generator=generator_of(0), label_steps=label_steps)
    with pytest.raises(ValueError, match="expected 1 to 3"):
        control.compose(prior, 1, [("top", 0)], generator=generator_of(0), label_steps=label_steps)


def test_labels_that_never_act_are_refused():
    prior, labels = steered(TOP, label_steps=0), torch.tensor([[0]])
    with pytest.raises(ValueError, match="label_steps is 0"):
        prior.sample_u(1, generator=generator_of(0), labels=labels)
    prior.sample_u(1, generator=generator_of(0))
    control.sample_classes(prior, labels, generator=generator_of(0), label_steps=1)


# --- composition


@pytest.mark.parametrize("label_steps", [1, 2, 3])
def test_a_composition_holds_the_layers_above_bit_for_bit(label_steps, seed):
    asked = [("top", 2), ("middle", 0), ("low", 1)]
    prior = steered(TOP, MIDDLE, LOW, seed=seed, label_steps=label_steps)
    stages = control.compose(prior, 5, asked, generator=generator_of(seed))
    usual = steered(TOP, MIDDLE, LOW, seed=seed)
    again = control.compose(usual, 5, asked, generator=generator_of(seed), label_steps=label_steps)
    assert all(torch.equal(a.u, b.u) for a, b in zip(stages, again, strict=True))
    assert [stage.labels[0].tolist() for stage in stages] == [[2, -1, -1], [2, 0, -1], [2, 0, 1]]
    assert [int(stage.held.sum()) for stage in stages] == [0, 2, 4]
    for before, after in itertools.pairwise(stages):
        assert torch.equal(before.u[:, after.held], after.u[:, after.held])
        assert not (before.u[:, ~after.held] == after.u[:, ~after.held]).any()


def test_the_stages_of_a_composition_are_those_of_the_paper_step_by_step(seed):
    """With the noise written out: u_1 once; then free, then the top held at its values."""
    prior = steered(TOP, LOW, seed=seed)
    first, second = control.compose(
        prior, 4, [("top", 1), ("low", 2)], generator=generator_of(seed), guidance=1.5
    )
    again = generator_of(seed)
    u_1 = prior.sample_u(4, generator=again, stop=1)
    noise = [torch.randn(4, 7, generator=again, dtype=torch.float64) for _ in range(4)]
    free = prior.reverse(0, u_1, labels=torch.tensor([[1, -1]] * 4), guidance=1.5, noise=noise)
    assert torch.equal(first.u, free)
    top = prior.layout.mask([0])
    held = prior.reverse(
        0,
        u_1,
        init=torch.cat([free[:, :2], u_1[:, 2:]], dim=1),
        mask=top,
        labels=torch.tensor([[1, 2]] * 4),
        guidance=1.5,
        noise=noise,
    )
    assert torch.equal(second.u, held)


def test_the_first_stage_is_sampling_with_that_label(seed):
    prior = steered(TOP, LOW, seed=seed)
    (stage,) = control.compose(prior, 4, [("top", 1)], generator=generator_of(seed))
    labels = torch.tensor([[1, -1]] * 4)
    assert torch.equal(
        stage.u, control.sample_classes(prior, labels, generator=generator_of(seed))
    )


def test_stages_share_their_random_numbers(seed):
    """What differs comes from the labels: without energies the stages are one chain."""
    prior = steered(TOP, LOW, seed=seed)

    def low(value):
        stages = [("top", 0), ("low", value)]
        return control.compose(prior, 4, stages, generator=generator_of(seed))

    one, other = low(1), low(2)
    assert torch.equal(one[0].u, other[0].u)
    prior.energies = Energies(lambda z, t: torch.zeros(len(z[0]), 7).double())
    first, second = low(1)
    torch.testing.assert_close(first.u, second.u, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([("low", 0), ("top", 1)], "'low' before it fixes layers 0 to 2"),
        ([("top", 0), ("top", 1)], "each once"),
        ([("size", 0)], "'size': this prior knows top, low"),
        ([("top", 7)], "class 7"),
        ([("top", -1)], "class -1"),
        ([], "nothing to compose"),
    ],
)
def test_compositions_that_cannot_be_are_refused(stages, message):
    prior = steered(TOP, LOW)
    with pytest.raises(ValueError, match=message):
        control.compose(prior, 2, stages, generator=generator_of(0))


def test_a_prior_without_attributes_says_how_to_train_one():
    with pytest.raises(ValueError, match="ebm_prior train --attribute"):
        control.compose(steered(), 2, [("class", 0)], generator=generator_of(0))


# --- measures


def test_confusion_counts_rows_as_asked_and_survival_counts_those_that_were_there():
    asked, found = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([0, 1, 1, 1, 2])
    counts = control.confusion(asked, found, 3)
    assert counts.tolist() == [[1, 1, 0], [0, 2, 1], [0, 0, 0]]
    assert control.agreement(counts) == pytest.approx(3 / 5)
    assert control.survival(found, torch.tensor([1, 1, 1, 0, 1]), 1) == pytest.approx(
        2 / 3, abs=1e-4
    )
    assert control.survival(found, found, 9) is None


# --- the command


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory):
    return small_vaes.written(tmp_path_factory.mktemp("vae") / "checkpoint.pt", small_vaes.vae())


def train(vae_file, out, *flags):
    cheap = ["--preset", "digits", "--width", "8", "--num_steps", "2", "--batch_size", "16"]
    cheap += ["--iterations", "2", "--grid_every", "0", "--device", "cpu"]
    assert main(["train", "--checkpoint", str(vae_file), "--out", str(out), *cheap, *flags]) == 0
    return out / "prior.safetensors"


@pytest.fixture(scope="module")
def prior_file(vae_file, tmp_path_factory):
    """Parity at the top, loops below: the fewest steps there are."""
    needs_digits()
    out = tmp_path_factory.mktemp("run") / "attributes"
    return train(vae_file, out, "--attribute", "parity:0", "--attribute", "loop:1")


def run(vae_file, prior_file, out, *flags):
    files = ["--checkpoint", str(vae_file), "--prior", str(prior_file), "--out", str(out)]
    cheap = ["--num_samples", "12", "--max_images", "200", "--device", "cpu"]
    return main(["control", *files, *cheap, *flags])


def report(out):
    return json.loads((out / "report.json").read_text())


def test_every_class_of_every_attribute_is_sampled_and_judged(
    vae_file, prior_file, tmp_path, capsys
):
    assert run(vae_file, prior_file, tmp_path) == 0
    names = {path.name for path in tmp_path.iterdir()} - {".lock"}
    pictures = {f"{kind}{name}.png" for name in ("parity", "loop") for kind in ("", "confusion_")}
    assert names == {"report.json", *pictures}
    found = report(tmp_path)
    assert found["classes"].keys() == found["classifiers"].keys() == {"parity", "loop"}
    for name, words in (("parity", ["even", "odd"]), ("loop", ["open", "loop"])):
        numbers = found["classes"][name]
        assert numbers["classes"] == words
        assert [sum(row) for row in numbers["confusion"]] == [12, 12]
        hits = sum(numbers["confusion"][i][i] for i in range(2))
        assert numbers["agreement"] == pytest.approx(hits / 24, abs=1e-4)
        assert sum(numbers["shares_without_label"]) == pytest.approx(1, abs=1e-3)
        assert found["classifiers"][name]["pixel_classifier"] > 0.8
        assert 0 <= found["classifiers"][name]["latent_classifier_1%_noise"] <= 1
    assert found["protocol"]["label_steps"] == found["protocol"]["label_steps_at_least"] == 1
    told = capsys.readouterr().out
    assert "parity: a classifier of pixels is right on" in told
    assert "of samples obey; chance 50.0%" in told


def test_attributes_are_composed_from_the_top_down(vae_file, prior_file, tmp_path, capsys):
    flags = ["--compose", "parity=odd", "loop=1", "--guidance", "2", "--label_steps", "2"]
    assert run(vae_file, prior_file, tmp_path, *flags) == 0
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"compose.png", "report.json"}
    found = report(tmp_path)
    first, second = found["compose"]["stages"]
    assert (first["attribute"], first["class"]) == ("parity", "odd")
    assert "survived" not in first
    assert second["class"] == "loop"
    assert second["held_layers"] == [0]
    assert second["held_bit_identical"] is True
    assert second["survived"].keys() == {"parity"}
    assert second["agreement"].keys() == {"parity", "loop"}
    assert (found["protocol"]["label_steps"], found["protocol"]["guidance"]) == (2, 2.0)
    assert "asked for loop: parity" in capsys.readouterr().out


def test_attributes_are_asked_for_together_and_blocks_do_not_matter_to_each_other(
    vae_file, prior_file, tmp_path
):
    flags = ["--set", "parity=even", "loop=open", "--batch_size", "8"]
    assert run(vae_file, prior_file, tmp_path, *flags) == 0
    found = report(tmp_path)["set"]
    assert (tmp_path / "set.png").is_file()
    for kind in ("samples", "without_label", "gaussian_prior"):
        assert found[kind]["all"] <= min(found[kind]["agreement"].values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--set", "parity"], "--set parity: expected NAME=CLASS"),
        (["--set", "parity=1", "parity=0"], "named twice"),
        (["--set", "size=1"], "'size': this prior knows parity, loop"),
        (["--set", "parity=7"], "parity=7: expected one of even, odd"),
        (["--compose", "loop=1", "parity=1"], "compose attributes from top to bottom"),
        (["--label_steps", "4"], "label_steps is 4, expected 1 to 3"),
        (["--num_samples", "0"], "--num_samples 0: expected at least 1"),
        (["--guidance", "nan"], "expected a finite number"),
        (["--labels", "missing"], "--labels missing: no such folder"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    vae_file, prior_file, tmp_path, capsys, flags, message
):
    assert run(vae_file, prior_file, tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ")
    assert message in told


def test_a_prior_without_labels_is_one_line_that_says_how_to_train_one(vae_file, tmp_path, capsys):
    needs_digits()
    plain = train(vae_file, tmp_path / "plain")
    assert run(vae_file, plain, tmp_path / "out") == 2
    assert "`ebm_prior train --attribute NAME:LAYERS`" in capsys.readouterr().err.splitlines()[-1]


def test_a_dry_run_prints_the_settings(vae_file, prior_file, tmp_path, capsys):
    capsys.readouterr()
    assert run(vae_file, prior_file, tmp_path / "out", "--dry_run", "--set", "loop=1") == 0
    assert json.loads(capsys.readouterr().out)["set"] == ["loop=1"]
    assert not (tmp_path / "out").exists()
