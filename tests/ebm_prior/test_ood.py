"""OOD detection: the scores, how well they tell sets apart, the shifts, and the command."""

from __future__ import annotations

import io
import json
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from ebm_prior import checkpoint, ood, shifts
from ebm_prior.backbones.hvae.backbone import HVAEBackbone
from ebm_prior.backbones.hvae.config import HVAEConfig
from ebm_prior.backbones.hvae.model import HVAE
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.commands import main
from ebm_prior.commands.ood import report, sets
from ebm_prior.config import PriorConfig
from ebm_prior.detection import Placements, detection, mean_auroc
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import Energies, LinearGaussian

SIZES = (2, 2, 3)


class NoisyToy(LinearGaussian):
    """x is u, and its posterior has a tenth of noise."""

    def infer(self, x, generator=None):
        return x + 0.1 * torch.randn(x.shape, generator=generator, dtype=x.dtype)


class Recorded(EBMPrior):
    """A prior that notes where each kernel starts and what it returns."""

    def reverse(self, t, u_next, *, init=None, **others):
        u = super().reverse(t, u_next, init=init, **others)
        self.kernels.append((t, u_next, u_next if init is None else init, u))
        return u


def f(z, t):
    """A known energy: the layer's number times |z_i|, plus t."""
    return torch.stack([-(i + 1) * part.abs().sum(1) for i, part in enumerate(z)], 1) + t[:, None]


def toy_prior(**settings):
    toy = NoisyToy(SIZES)
    settings = {"energy_scale": "none", "step_rule": "plain", "b2": 0.1, "num_steps": 4} | settings
    prior = Recorded(toy, PriorConfig(toy.layout.shapes, network="mlp", width=4, **settings))
    prior.energies = Energies(f)
    prior.kernels = []
    return prior


@pytest.fixture
def u(generator):
    return torch.randn(5, sum(SIZES), generator=generator, dtype=torch.float64)


NOISE = ood.ImageNoise(0, range(5))


class GivenNoise(NoisyToy):
    """The same, which takes its noise."""

    def infer_with(self, x, eps):
        return x + 0.1 * self.layout.join(eps)

    def infer(self, x, generator=None):
        raise AssertionError("asked without the noise")


def test_a_backbone_that_takes_the_noise_is_given_each_images_own(u):
    backbone = GivenNoise(SIZES)
    expected = u + 0.1 * next(NOISE.rows("posterior", 7, u))
    assert torch.equal(ood.posterior(backbone, u, NOISE), expected)
    alone = ood.posterior(backbone, u[3:], ood.ImageNoise(0, [3, 4]))
    torch.testing.assert_close(alone, expected[3:])


@pytest.mark.parametrize("kind", ["nvae", "hvae"])
def test_both_backbones_take_the_noise_they_would_have_drawn(kind, generator):
    config = HVAEConfig("digits", (1, 8, 8), ((2, 2, 2), (3, 4, 4)), (6, 5), 0, 1, 0)
    backbone = NVAEBackbone(small_vaes.vae()) if kind == "nvae" else HVAEBackbone(HVAE(config))
    x = torch.rand(3, 1, 8, 8, generator=generator)
    shapes, again = backbone.layout.shapes, torch.Generator().manual_seed(7)
    eps = [torch.randn(3, *shape, generator=again) for shape in shapes]
    expected = backbone.infer(x, torch.Generator().manual_seed(7))
    assert torch.equal(backbone.infer_with(x, eps), expected)


# --- scores


def test_the_score_above_k_sums_the_first_layers_without_the_k_lowest(u):
    prior = toy_prior()
    one, two, three = (-part for part in f(prior.backbone.to_z(u), torch.zeros(5)).unbind(1))
    expected = torch.stack([one + two + three, one + two, one], 1)
    torch.testing.assert_close(ood.scores(prior, u), expected)


def test_scores_have_no_graph_and_leave_the_networks_as_they_were(u):
    prior = toy_prior()
    prior.energies.train()
    found = ood.diffusion_scores(prior, u.requires_grad_(), [1], NOISE)
    assert not found.requires_grad
    assert not ood.scores(prior, u).requires_grad
    assert prior.energies.training
    assert prior.energies.weight.requires_grad


def test_the_control_is_the_energy_of_the_gaussian_prior(u):
    layout = toy_prior().layout
    half = u.square() / 2
    expected = torch.stack([half.sum(1), half[:, :4].sum(1), half[:, :2].sum(1)], 1)
    torch.testing.assert_close(ood.gaussian_scores(layout, u), expected)


def test_a_perturbed_latent_is_that_state_of_the_forward_process(u):
    prior = toy_prior()
    drawn = next(NOISE.rows("perturbation", 7, u))
    for state in (0, 1):
        a, s = prior.schedule.alpha_bar[state], prior.schedule.sigma_bar[state]
        torch.testing.assert_close(ood.perturb(prior, u, state, NOISE), a * u + s * drawn)


@pytest.mark.parametrize("state", [0, 1])
def test_the_top_comes_from_the_image_and_the_rest_from_the_prior_chain(u, state):
    prior = toy_prior()
    chain = ood.chain(prior, state, NOISE, u)
    mine = ood.perturb(prior, u, state, NOISE)
    prior.kernels.clear()
    found = ood.diffusion_scores(prior, u, [0, 1, 2], NOISE, state=state)
    kernels = prior.kernels[-3:]
    assert [t for t, *_ in prior.kernels] == [*range(2, state - 1, -1), 0, 0, 0]
    for k, top in ((0, 7), (1, 4), (2, 2)):
        _, u_next, start, u_0 = kernels[k]
        torch.testing.assert_close(start, torch.cat([mine[:, :top], chain[:, top:]], 1))
        torch.testing.assert_close(found[:, k], ood.scores(prior, u_0)[:, k])
        rows = NOISE.rows("kernel", 7, u)
        if state == 0:
            a, s = prior.schedule.alpha[1], prior.schedule.sigma[1]
            torch.testing.assert_close(u_next, a * start + s * next(rows))
        else:
            assert u_next is start
        torch.testing.assert_close(u_0, EBMPrior.reverse(prior, 0, u_next, init=start, noise=rows))


def test_k_zero_needs_no_prior_chain(u):
    prior = toy_prior()
    ood.diffusion_scores(prior, u, [0], NOISE)
    assert [t for t, *_ in prior.kernels] == [0]
    assert prior.energies.calls == prior.config.num_steps + 1


def test_a_score_does_not_depend_on_which_others_are_asked_for(u):
    prior = toy_prior()
    every = ood.diffusion_scores(prior, u, [0, 1, 2], NOISE)
    assert torch.equal(ood.diffusion_scores(prior, u, [2], NOISE)[:, 0], every[:, 2])


def test_a_single_step_of_diffusion_starts_from_noise(u):
    prior = toy_prior(max_T=1)
    noise = next(NOISE.rows("chain", 7, u))
    assert torch.equal(ood.chain(prior, 1, NOISE, u), noise)
    assert ood.diffusion_scores(prior, u, [0, 2], NOISE).isfinite().all()


def all_scores(prior, x, numbers, seed=0):
    noise = ood.ImageNoise(seed, numbers)
    drawn = ood.posterior(prior.backbone, x, noise)
    near = ood.perturb(prior, drawn, 0, noise)
    ks = list(range(prior.layout.num_layers))
    diffused = ood.diffusion_scores(prior, drawn, ks, noise)
    return torch.cat([drawn, ood.scores(prior, near), diffused], 1)


def in_pieces(prior, x, pieces):
    parts = zip(x.split(pieces), torch.arange(len(x)).split(pieces), strict=True)
    return torch.cat([all_scores(prior, part, numbers.tolist()) for part, numbers in parts])


def test_scores_do_not_depend_on_batches_and_belong_to_the_number_of_the_image(u):
    prior = toy_prior()
    together = all_scores(prior, u, range(5))
    torch.testing.assert_close(in_pieces(prior, u, [1, 3, 1]), together, rtol=1e-12, atol=1e-12)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(all_scores(prior, u[order], order), together[order])
    assert not torch.equal(all_scores(prior, u, range(1, 6)), together)
    assert not torch.equal(all_scores(prior, u, range(5), seed=1), together)
    same = all_scores(prior, u[:1].expand(5, -1), range(5))
    assert len(same[:, 0].unique()) == 5


def test_scores_of_an_nvae_do_not_depend_on_batches(generator):
    prior = small_vaes.prior(NVAEBackbone(small_vaes.vae()))
    x = torch.rand(5, 1, 8, 8, generator=generator)
    pieces = in_pieces(prior, x, [2, 3])
    torch.testing.assert_close(pieces, all_scores(prior, x, range(5)), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_scored_is_refused(u):
    prior = toy_prior()
    with pytest.raises(ValueError, match="k is 3, expected 0"):
        ood.diffusion_scores(prior, u, [3], NOISE)
    with pytest.raises(ValueError, match="state is 2"):
        ood.diffusion_scores(prior, u, [0], NOISE, state=2)
    prior.energies = Energies(lambda z, t: f(z, t) * float("nan"))
    with pytest.raises(ValueError, match="left the finite numbers"):
        ood.diffusion_scores(prior, u, [0], NOISE)


# --- how well they tell apart


def test_metrics_of_known_scores_ties_count_half():
    own, foreign = np.array([0.0, 1.0, 2.0]), np.array([1.0, 2.0, 3.0, 3.0])
    found = detection(own, foreign)
    assert found.auroc == pytest.approx((1.5 + 2.5 + 3 + 3) / 12)
    # 4 foreign in order 3 3 | 2 2' | 1 1': precision 1 at recall 1/2, 3/4 at 3/4, 4/6 at 1.
    assert found.auprc == pytest.approx(1 / 2 + 3 / 16 + 4 / 24)
    assert found.fpr80 == pytest.approx(2 / 3)  # 80% needs the threshold 1


def test_perfect_inverted_and_constant_scores():
    low, high = np.linspace(-900, -800, 20), np.linspace(800, 900, 30)
    assert detection(low, high) == (1, 1, 0)
    assert detection(high, low).auroc == 0
    assert detection(high, low).fpr80 == 1
    assert detection(np.zeros(5), np.zeros(15)) == pytest.approx((0.5, 0.75, 1))


def test_large_scores_keep_their_order():
    own = 1e6 + np.arange(5)
    assert detection(own, own + 1e-3).auroc == pytest.approx(0.6)


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="finite numbers"):
        detection(np.array([0, np.nan]), np.zeros(2))


def test_the_error_is_the_spread_over_other_images(seed):
    draw = np.random.default_rng(seed)

    def once():
        own, one, two = (draw.normal(size=(80, 2)) + shift for shift in (0, 0.5, 1.0))
        before, after = (
            [Placements.of(own[:, c], foreign[:, c]) for foreign in (one, two)] for c in (0, 1)
        )
        expected = detection(own[:, 0], one[:, 0]).auroc
        assert before[0].own.mean() == pytest.approx(expected)
        assert before[0].foreign.mean() == pytest.approx(expected)
        gain = [b - a for a, b in zip(before, after, strict=True)]
        return [*mean_auroc(before), *mean_auroc(gain)]

    value, error, gain, gain_error = np.array([once() for _ in range(200)]).T
    assert error.mean() == pytest.approx(value.std(), rel=0.25)
    assert gain_error.mean() == pytest.approx(gain.std(), rel=0.25)


# --- shifts


def test_shifts_keep_shape_and_range_and_change_the_image(generator):
    assert tuple(shifts.SHIFTS) == sets.SHIFTS
    for shape in ((1, 8, 8), (3, 32, 32)):
        image = torch.rand(shape, generator=generator)
        for name, shift in shifts.SHIFTS.items():
            shifted, again = (shift(image, torch.Generator().manual_seed(3)) for _ in range(2))
            assert shifted.shape == shape, name
            assert 0 <= shifted.min() < shifted.max() <= 1, name
            assert not torch.equal(shifted, image), name
            assert torch.equal(shifted, again), name


def test_shuffled_patches_hold_the_same_pixels(generator):
    image = torch.arange(3 * 64.0).view(3, 8, 8)
    shuffled = shifts.shuffled(image, generator)
    assert torch.equal(shuffled.flatten().sort().values, image.flatten())
    patches = {tuple(p) for p in image[0].unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4).tolist()}
    moved = shuffled[0].unfold(0, 2, 2).unfold(1, 2, 2).reshape(16, 4).tolist()
    assert {tuple(p) for p in moved} == patches


# --- the words


def test_the_report_says_whether_the_scores_get_better_with_k(generator):
    noise = np.random.default_rng(0)
    clearer = noise.normal(size=(200, 3)) + np.array([0, 1, 2])
    own = noise.normal(size=(300, 3))
    rising = {"own": {"inference": own, "control": own[:, ::-1]}}
    rising["far"] = {"inference": clearer, "control": clearer[:, ::-1]}
    content = report.contents(rising, [0, 1, 2])
    assert content["rises_with_k"]["inference"]["verdict"] == "rises"
    assert content["rises_with_k"]["control"]["verdict"] == "falls"
    assert content["above_control"]["inference"]["verdict"] == "no clear difference"
    told = report.words(content)
    assert "inference: mean AUROC rises with k" in told
    assert "does not rise with k, it falls" in told


# --- the sets


def pack(path, images):
    """A pack of four images, a mosaic of two by two."""
    mosaic = np.concatenate(
        [np.concatenate(list(row), 1) for row in images.reshape(2, 2, 8, 8, 3)]
    )
    webp = io.BytesIO()
    Image.fromarray(mosaic).save(webp, "WEBP", lossless=True, exact=True)
    data = np.frombuffer(webp.getvalue(), np.uint8)
    np.savez(path, webp=data, offsets=[0, len(data)], shape=images.shape, grid=2, labels=[0] * 4)


def test_foreign_images_are_read_as_they_are_from_every_kind_of_file(tmp_path):
    levels = np.random.default_rng(0).integers(256, size=(4, 8, 8, 3), dtype=np.uint8)
    big = np.random.default_rng(1).integers(256, size=(4, 32, 32, 3), dtype=np.uint8)
    savemat(tmp_path / "svhn.mat", {"X": levels.transpose(1, 2, 3, 0)})
    np.savez(tmp_path / "last.npz", images=levels)
    np.savez(tmp_path / "first.npz", samples=levels.transpose(0, 3, 1, 2) / 255)
    pack(tmp_path / "cifar100-test-1of1.npz", levels)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / "pictures" / f"{i}.png")
    (tmp_path / "cifar-100-python").mkdir()
    flat = {b"data": big.transpose(0, 3, 1, 2).reshape(4, -1), b"fine_labels": [1, 2, 3, 4]}
    (tmp_path / "cifar-100-python" / "test").write_bytes(pickle.dumps(flat, protocol=2))

    def read(text, pixels):
        config = SimpleNamespace(image_shape=(3, *pixels.shape[1:3]))
        found = sets.opened(sets.Source.parse(text), torch.zeros(1), config, 0)
        images = torch.stack([found[i] for i in range(len(found))])
        expected = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
        torch.testing.assert_close(images, expected)

    for text in (
        *("svhn={}/svhn.mat", "a={}/last.npz", "b={}/first.npz", "mine={}/pictures"),
        "cifar100={}/cifar100-test-1of1.npz",
    ):
        read(text.format(tmp_path), levels)
    read(f"cifar100={tmp_path}", big)


# --- the command


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vae")
    vae = small_vaes.vae()
    small_vaes.written(folder / "checkpoint.pt", vae)
    checkpoint.save(folder / "prior.safetensors", small_vaes.prior(NVAEBackbone(vae)))
    np.savez(folder / "colour.npz", images=np.zeros((2, 8, 8, 3), np.uint8))
    np.savez(folder / "loud.npz", images=np.full((2, 1, 8, 8), 2.0))
    np.savez(folder / "names.npz", others=np.zeros(3))
    (folder / "broken.mat").write_bytes(b"no mat")
    np.savez(folder / "noise.npz", images=np.random.default_rng(0).random((9, 1, 8, 8)))
    return folder


def run(files, out, *flags):
    inputs = ["--checkpoint", f"{files}/checkpoint.pt", "--prior", f"{files}/prior.safetensors"]
    words = [flag.format(files=files) for flag in flags]
    return main(["ood", *inputs, "--out", str(out), "--device", "cpu", *words])


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory):
    """A finished run: seven images of three sets, in blocks of three."""
    out = tmp_path_factory.mktemp("ood")
    asked = ["--ood", "inverted", "white={files}/noise.npz", "--max_images", "7", "--draws", "2"]
    assert run(files, out, *asked, "--batch_size", "3") == 0
    return out


def test_the_command_reports_every_k_scheme_and_set(finished):
    assert {path.name for path in finished.iterdir()} - {".lock"} == {
        *("report.json", "scores.npz", "examples.png", "auroc.png"),
        *("auroc_inference.png", "auroc_diffusion.png"),
        *("histograms_inference.png", "histograms_diffusion.png"),
    }
    content = json.loads((finished / "report.json").read_text())
    assert content["protocol"]["perturb_state"] == 1
    assert content["protocol"]["images"] == {"own": 7, "inverted": 7, "white": 7}
    with np.load(finished / "scores.npz") as scores:
        for kind in ("inference", "diffusion"):
            row = content["scheme"][kind]
            assert set(row["sets"]) == {"inverted", "white"}
            assert [len(row["auroc"]), scores[f"own.{kind}"].shape] == [2, (7, 2)]
            for name, one in row["sets"].items():
                for c in range(2):
                    columns = (scores[f"{which}.{kind}"][:, c] for which in ("own", name))
                    assert [one[key][c] for key in ("auroc", "auprc", "fpr80")] == [
                        *detection(*columns)
                    ]
            assert row["auroc"] == pytest.approx(
                np.mean([one["auroc"] for one in row["sets"].values()], axis=0)
            )
        assert not np.array_equal(scores["own.diffusion"], scores["own.inference"])


def test_neither_batches_nor_what_else_is_asked_change_a_score(files, finished, tmp_path, capsys):
    asked = ["--ood", "inverted", "--max_images", "7", "--draws", "2"]
    assert run(files, tmp_path, *asked, "--scheme", "diffusion", "--k", "1") == 0
    assert "diffusion: only one k, so nothing is said about k" in capsys.readouterr().out
    before, after = (dict(np.load(out / "scores.npz")) for out in (finished, tmp_path))
    assert after["k"] == [1]
    for name in ("own.diffusion", "own.control", "inverted.diffusion", "inverted.control"):
        np.testing.assert_allclose(after[name], before[name][:, 1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ood", "svhn"], "--ood svhn: expected NAME=PATH, or one of the shifts inverted"),
        (["--ood", "svhn=missing.mat"], "there is no missing.mat"),
        (["--ood", "noise", "noise"], "expected different names"),
        (["--ood", "own={files}/noise.npz"], "expected different names, and not own"),
        (
            ["--ood", "x={files}/colour.npz"],
            "images of shape (3, 8, 8), the model takes (1, 8, 8)",
        ),
        (["--ood", "x={files}/loud.npz"], "numbers in [0, 1], got float64 from 2 to 2"),
        (["--ood", "x={files}/names.npz"], "holds others; expected images or samples"),
        (["--ood", "x={files}/broken.mat"], "is not SVHN's file"),
        (["--k", "2"], "--k 2: this hierarchy has 2 layers"),
        (["--k", "all", "1"], "--k all 1: expected all, or whole numbers"),
        (["--draws", "0"], "--draws 0: expected at least 1"),
    ],
)
def test_what_cannot_work_is_one_line_before_any_work(files, tmp_path, capsys, flags, message):
    assert run(files, tmp_path / "out", *flags) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("error: ")
    assert message in told[-1]
    assert not (tmp_path / "out").exists()


def test_a_prior_of_one_step_keeps_something_of_the_image(files, tmp_path):
    vae = NVAEBackbone(small_vaes.vae())
    checkpoint.save(tmp_path / "one.safetensors", small_vaes.prior(vae, max_T=1))
    flags = ["--prior", f"{tmp_path}/one.safetensors", "--ood", "noise", "--max_images", "3"]
    assert run(files, tmp_path / "out", *flags, "--scheme", "diffusion", "--k", "1") == 0
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["protocol"]["perturb_state"] == 0


def test_what_a_joint_prior_learned_on_is_what_it_scores(files, tmp_path):
    vae = NVAEBackbone(small_vaes.vae())
    checkpoint.save(tmp_path / "joint.safetensors", small_vaes.prior(vae, kind="joint", max_T=1))
    flags = ["--prior", f"{tmp_path}/joint.safetensors", "--ood", "noise", "--max_images", "3"]
    flags += ["--scheme", "inference"]
    for more, perturbed in (([], False), (["--perturb"], True)):
        out = tmp_path / str(perturbed)
        assert run(files, out, *flags, *more) == 0
        protocol = json.loads((out / "report.json").read_text())["protocol"]
        assert protocol["perturb"] is perturbed


def test_a_dry_run_prints_the_settings(files, tmp_path, capsys):
    assert run(files, tmp_path / "out", "--dry_run", "--perturb_state", "0") == 0
    assert json.loads(capsys.readouterr().out)["perturb_state"] == 0
    assert not (tmp_path / "out").exists()
