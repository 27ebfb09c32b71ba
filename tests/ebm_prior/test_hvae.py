"""The small hierarchical VAE: its map and its maths, its file, its training, a prior on it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ebm_prior import checkpoint
from ebm_prior.backbones.files import open_backbone
from ebm_prior.backbones.hvae import file as hvae_file
from ebm_prior.backbones.hvae import training as hvae_training
from ebm_prior.backbones.hvae.backbone import HVAEBackbone
from ebm_prior.backbones.hvae.config import SIZES, HVAEConfig
from ebm_prior.backbones.hvae.model import (
    HVAE,
    Normal,
    kl_divergence,
)
from ebm_prior.backbones.hvae.objective import measure, terms
from ebm_prior.backbones.hvae.pixels import COMPONENTS, discretised_logistic, soft_clamp
from ebm_prior.backbones.hvae.settings import HVAESettings
from ebm_prior.backbones.hvae.training import MODEL, HVAETrainer
from ebm_prior.commands import main
from ebm_prior.config import PriorConfig
from ebm_prior.prior import EBMPrior
from ebm_prior.seeds import seeded
from ebm_prior.trainer import Trainer
from ebm_prior.training import run_state
from ebm_prior.training.batches import Batches
from ebm_prior.training.settings import TrainSettings
from tests.ebm_prior.small_vaes import prior, vae, written


def network(likelihood="logistic", seed=0, dtype=torch.float64, **changes):
    """A network for digits whose weights are random everywhere, also where training starts at 0.

    Two layers share a resolution, cells are normalised, the image has features of its own.
    """
    settings = {
        "latents": ((3, 2, 2), (2, 2, 2), (2, 4, 4)),
        "widths": (8, 8, 4),
        "image_width": 4,
        "cells": 1,
        "groups": 2,
        **changes,
    }
    config = HVAEConfig("digits", (1, 8, 8), likelihood=likelihood, levels=17, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HVAE(config).to(dtype)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


FOLDED = {"image_width": 0, "groups": 0, "widths": (6, 5, 4)}
KINDS = {
    "normalised": {},
    "folded": FOLDED,
    **{name: {"likelihood": name} for name in ("gaussian", "mixture")},
}


@pytest.fixture(params=KINDS)
def backbone(request):
    return HVAEBackbone(network(**KINDS[request.param]))


def draws(backbone, count=5, seed=1):
    return torch.randn(count, backbone.layout.dim, generator=seeded("cpu", seed)).double()


def images(count=6, seed=2):
    """Digits-like levels of 0 to 16."""
    levels = torch.randint(17, (count, 1, 8, 8), generator=seeded("cpu", seed))
    return levels.double() / 16


# --- the map


def test_u_to_z_to_u_and_z_to_u_to_z_are_identities(backbone):
    u = draws(backbone)
    z = backbone.to_z(u)
    assert [tuple(part.shape[1:]) for part in z] == list(backbone.layout.shapes)
    torch.testing.assert_close(backbone.to_u(z), u)
    for there, back in zip(z, backbone.to_z(backbone.to_u(z)), strict=True):
        torch.testing.assert_close(there, back)


def test_moments_are_those_of_the_map_and_the_temperature_multiplies_the_deviation(backbone):
    u = draws(backbone)
    for temperature in (1.0, 0.6):
        z = backbone.to_z(u, temperature)
        layers = backbone.moments(z)
        for z_i, u_i, layer in zip(z, backbone.layout.split(u), layers, strict=True):
            torch.testing.assert_close(z_i, layer.mean + temperature * layer.std * u_i)
    assert layers[0].h is None
    assert [layer.h.shape[2] for layer in layers[1:]] == [2, 4]
    assert torch.equal(layers[0].mean, torch.zeros_like(z[0]))
    assert torch.equal(layers[0].std, torch.ones_like(z[0]))
    assert layers[2].std.std() > 0.01, "the fixture's prior does not depend on anything"


def test_the_jacobian_of_the_map_is_the_product_of_the_deviations(backbone):
    u = draws(backbone, 1)

    def flat(u):
        return backbone.layout.join(backbone.to_z(u[None]))[0]

    matrix = torch.autograd.functional.jacobian(flat, u[0])
    deviations = [layer.std.log().sum() for layer in backbone.moments(backbone.to_z(u))]
    torch.testing.assert_close(torch.linalg.slogdet(matrix)[1], sum(deviations))
    first = backbone.layout.sizes[0]
    assert torch.equal(matrix[:first, first:], torch.zeros_like(matrix[:first, first:]))


def test_infer_is_one_posterior_draw_standardised_by_the_prior(backbone):
    x, walks = images(), []
    walk = backbone.model.walk
    backbone.model.walk = lambda *args, **flags: walks.append(flags) or walk(*args, **flags)
    u = backbone.infer(x, seeded("cpu", 3))
    assert walks == [{"image": False}]

    features, generator, z = backbone.model.encode(x), seeded("cpu", 3), []

    def choose(i, prior, h):
        q = backbone.model.posterior_of(i, prior, h, features[i])
        noise = torch.randn(q.mean.shape, generator=generator, dtype=torch.float64)
        z.append(q.mean + q.std * noise)
        return z[-1]

    walk(len(x), choose)
    torch.testing.assert_close(u, backbone.to_u(z))
    assert not torch.equal(u, backbone.infer(x, seeded("cpu", 4)))


def test_decoding_is_deterministic_in_range_and_does_not_depend_on_the_batch(backbone):
    u = draws(backbone, 8)
    x = backbone.decode(u)
    assert x.shape == (8, 1, 8, 8)
    assert 0 <= float(x.min()) <= float(x.max()) <= 1
    assert torch.equal(x, backbone.decode(u))
    torch.testing.assert_close(x, torch.cat([backbone.decode(part) for part in u.split(4)]))
    assert not torch.allclose(x, backbone.decode(u, 0.5))


def test_the_backbone_is_a_frozen_view_of_the_same_memory():
    model = network()
    backbone = HVAEBackbone(model)
    u = draws(backbone).requires_grad_()
    sum(z.sum() for z in backbone.to_z(u)).backward()
    assert (u.grad != 0).all()
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(p.requires_grad for p in backbone.model.parameters())
    before, name = backbone.decode(draws(backbone)), backbone.fingerprint()
    with torch.no_grad():
        model.start.add_(1)
    assert not torch.equal(before, backbone.decode(draws(backbone)))
    assert name != backbone.fingerprint()


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"):
        HVAEBackbone(network()).infer(torch.zeros(2, 3, 8, 8))


def test_the_network_runs_in_bf16_and_its_latents_in_float32():
    model = network(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images().float(), seeded("cpu", 0))
    assert found.output.dtype == torch.float32
    assert {kl.dtype for kl in found.kl} == {torch.float32}
    exact = model(images().float(), seeded("cpu", 0))
    for rough, fine in zip(found.kl, exact.kl, strict=True):
        torch.testing.assert_close(rough.sum(), fine.sum(), rtol=0.05, atol=0)


# --- the maths


def test_the_kl_is_the_closed_form():
    q, p = (Normal(*torch.randn(2, 50, generator=seeded("cpu", k)).double()) for k in (0, 1))
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(q.mean, (5 * torch.tanh(q.raw / 5)).exp()),
        torch.distributions.Normal(p.mean, (5 * torch.tanh(p.raw / 5)).exp()),
    )
    torch.testing.assert_close(kl_divergence(q, p), theirs)
    assert torch.equal(kl_divergence(p, p), torch.zeros_like(p.mean))


def test_a_posterior_that_adds_nothing_is_the_prior():
    model = network()
    with torch.no_grad():
        for head in model.posterior:
            head[-1].weight.zero_()
            head[-1].bias.zero_()
    assert not any(kl.any() for kl in model(images(), seeded("cpu", 0)).kl)


def test_the_residual_posterior_is_the_contracts():
    prior = Normal(*torch.randn(2, 1, 2, 4, 4, generator=seeded("cpu", 0)).double())
    model = network()
    h, feature = torch.randn(2, 1, 4, 4, 4, generator=seeded("cpu", 1)).double()
    q = model.posterior_of(2, prior, h, feature)
    shift, raw = model.posterior[2](torch.cat([feature, h], 1)).chunk(2, dim=1)
    torch.testing.assert_close(q.mean, prior.mean + prior.std * shift)
    torch.testing.assert_close(q.log_std, soft_clamp(prior.raw + raw))


@pytest.mark.parametrize("levels", [2, 17, 256, 4096, 65536])
@pytest.mark.parametrize("log_scale", [-4.9, -2.0, 1.0])
def test_the_probabilities_of_all_levels_sum_to_one(levels, log_scale):
    y = torch.linspace(-1, 1, levels, dtype=torch.float64)
    for location in (-1.3, 0.1, 0.97):
        at = torch.full_like(y, location)
        log_p = discretised_logistic(y, at, torch.full_like(y, log_scale), 1 / (levels - 1))
        torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=torch.float64))


def test_a_levels_probability_is_the_difference_of_two_sigmoids():
    y, location, scale = torch.tensor([0.125]).double(), 0.3, 0.2
    at, log_scale = torch.full_like(y, location), torch.full_like(y, math.log(scale))
    a, b = ((y + s / 16 - location) / scale for s in (1, -1))
    expected = (torch.sigmoid(a) - torch.sigmoid(b)).log()
    torch.testing.assert_close(discretised_logistic(y, at, log_scale, 1 / 16), expected)


def test_a_mixture_of_one_component_is_the_logistic_and_of_more_sums_to_one():
    x, generator = torch.tensor([3, 16, 0]).double().view(1, 3, 1, 1) / 16, seeded("cpu", 0)

    def model(likelihood, channels):
        config = HVAEConfig("mine", (channels, 8, 8), ((1, 4, 4),), (4,), 0, 0, 0, likelihood, 17)
        return HVAE(config)

    one, several = (model(name, 3) for name in ("logistic", "mixture"))
    output = torch.randn(1, 6, 1, 1, generator=generator).double()
    logits = torch.tensor([0.0, -1e4, -1e4, -1e4, -1e4]).double().view(1, COMPONENTS, 1, 1)
    same = torch.cat([logits, output.repeat_interleave(COMPONENTS, 1)], 1)
    torch.testing.assert_close(several.log_prob(same, x), one.log_prob(output, x))
    torch.testing.assert_close(several.mean(same), one.mean(output))

    grey = model("mixture", 1)
    output = torch.randn(1, 3 * COMPONENTS, 1, 1, generator=generator).double()
    levels = torch.arange(17).double().view(17, 1, 1, 1) / 16
    total = grey.log_prob(output.expand(17, -1, -1, -1), levels).exp().sum()
    torch.testing.assert_close(total, torch.ones((), dtype=torch.float64))
    weights, location, _ = output.flatten().split(COMPONENTS)
    expected = (weights.softmax(0) @ location / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(grey.mean(output).squeeze(), expected)


def test_gaussian_pixels_have_the_density_of_their_bin():
    model = network("gaussian")
    output, x = torch.zeros(1, 1, 8, 8).double(), torch.full((1, 1, 8, 8), 0.75).double()
    std = soft_clamp(model.pixel_log_std).exp()
    expected = torch.distributions.Normal(0.0, std).log_prob(torch.tensor(0.5)) + math.log(2 / 16)
    torch.testing.assert_close(model.log_prob(output, x), 64 * expected[None].double())


def test_the_loss_counts_the_kl_of_a_channel_from_the_free_bits_up():
    model, x = network(), images()
    kl = torch.cat([layer.mean(0) for layer in model(x, seeded("cpu", 0)).kl])
    free = float(kl.detach().median())
    plain = terms(model, x, seeded("cpu", 0), 0.5, 0.0)
    freed = terms(model, x, seeded("cpu", 0), 0.5, free)
    torch.testing.assert_close(plain.loss * 64, plain.nll + 0.5 * plain.kl.sum())
    torch.testing.assert_close(
        (freed.loss - plain.loss) * 64, 0.5 * (kl.clamp_min(free) - kl).sum()
    )
    assert torch.equal(freed.kl, plain.kl)


def test_measuring_is_the_mean_over_images_in_bits_per_dimension():
    model, x = network(), images(5)
    found = measure(model, x.split(2), 0, contextlib.nullcontext())
    parts = [
        terms(model, b, seeded("cpu", 0, 2**31 + 1, k), 1, 0) for k, b in enumerate(x.split(2))
    ]
    total = sum(n * (p.nll + p.kl.sum()) for n, p in zip((2, 2, 1), parts, strict=True)) / 5
    assert found["bits_per_dim"] == pytest.approx(float(total.detach()) / (64 * math.log(2)))
    assert found["images"] == 5
    assert found["kl"] == pytest.approx(sum(found["kl_per_layer"]))


@pytest.mark.parametrize(
    ("size", "shapes", "millions"),
    [
        ("full", ((32, 8, 8), (32, 8, 8), (32, 16, 16)), 9.2),
        ("small", ((16, 4, 4), (16, 8, 8), (8, 16, 16)), 2.1),
    ],
)
def test_the_sizes_are_the_contracts(size, shapes, millions):
    config = SIZES[size].config("cifar10", (3, 32, 32), 256, "logistic")
    assert config.latents == shapes
    with torch.device("meta"):
        count = sum(p.numel() for p in HVAE(config).parameters())
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": ((3, 2, 2), (2, 4, 4), (2, 2, 2))}, "sides that stay, double"),
        ({"latents": ((3, 2, 4), (2, 4, 4), (2, 4, 4))}, "square shapes"),
        ({"latents": 5}, "latents is 5"),
        ({"widths": (8, 8)}, "widths is"),
        ({"widths": (8, 8, "4")}, "widths is"),
        ({"widths": (8, 8, 10**9)}, "widths is"),
        ({"groups": 3}, "groups is 3, expected a divisor"),
        ({"cells": True}, "cells is True"),
    ],
)
def test_impossible_networks_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        network(**change)


def test_images_that_cannot_be_halved_often_enough_are_told():
    with pytest.raises(ValueError, match="side 12, expected a multiple of 8"):
        SIZES["small"].config("mine", (3, 12, 12), 256, "logistic")


# --- the file


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "hvae.safetensors"
    hvae_file.save(path, network(dtype=torch.float32), step=7, training={"lr": 1e-3})
    return path


def test_a_saved_network_comes_back_bit_for_bit(saved):
    file, backbone = hvae_file.read(saved), open_backbone(saved)
    model = network(dtype=torch.float32)
    assert (file.step, file.training, file.config) == (7, {"lr": 1e-3}, model.config)
    assert backbone.fingerprint() == HVAEBackbone(model).fingerprint()
    u = draws(backbone).float()
    assert torch.equal(backbone.decode(u), HVAEBackbone(model).decode(u))
    assert backbone.device.type == "cpu"


def rewritten(path, change):
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)


def _config(**changes):
    def change(_, metadata):
        metadata["config"] = json.dumps(json.loads(metadata["config"]) | changes)

    return change


HOSTILE = {
    "another kind": (lambda t, m: m.update(kind="prior"), "kind prior"),
    "another format": (lambda t, m: m.update(format="9"), "format 9"),
    "no config": (lambda t, m: m.pop("config"), "lacks 'config'"),
    "no JSON": (lambda t, m: m.update(config="{"), "unreadable metadata"),
    "a list": (lambda t, m: m.update(config="[]"), "expected an object"),
    "too deep": (lambda t, m: m.update(config="[" * 100_000), "unreadable metadata"),
    "unknown setting": (_config(secret=1), "this version knows"),
    "enormous": (_config(widths=[4096] * 3), "expected torch.float32 of shape"),
    "many cells": (_config(cells=32), "the file is not whole"),
    "a missing tensor": (lambda t, m: t.pop("start"), "start; the file's config"),
    "a strange tensor": (lambda t, m: t.update(x=torch.ones(1)), "missing or unknown"),
    "a shape": (lambda t, m: t.update(start=torch.ones(3)), "start is torch.float32 of shape"),
    "a type": (lambda t, m: t.update(start=t["start"].double()), "start is torch.float64"),
    "a NaN": (lambda t, m: t["start"].fill_(math.nan), "start holds NaN"),
    "a step": (lambda t, m: m.update(step="x"), "unreadable metadata"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_files_are_refused_in_one_line(saved, name):
    change, message = HOSTILE[name]
    rewritten(saved, change)
    with pytest.raises(ValueError, match=message) as caught:
        open_backbone(saved)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_a_torn_file_and_no_file_are_told(saved, tmp_path):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"not a whole .safetensors file"):
        open_backbone(saved)
    with pytest.raises(ValueError, match="no such file"):
        open_backbone(tmp_path / "absent.safetensors")


def test_a_path_opens_whatever_backbone_it_holds_and_a_prior_is_told_apart(saved, tmp_path):
    nvae = open_backbone(written(tmp_path / "checkpoint.pt", vae()))
    assert nvae.config.image_shape == open_backbone(saved).config.image_shape == (1, 8, 8)
    assert nvae.config.dataset == open_backbone(saved).config.dataset == "digits"
    checkpoint.save(tmp_path / "prior.safetensors", prior(nvae))
    with pytest.raises(ValueError, match="is a prior, not a VAE; give it as --prior"):
        open_backbone(tmp_path / "prior.safetensors")


# --- training


def trainer(out, *, source=None, model=None, **settings):
    settings = {"iterations": 6, "lr": 1e-2, "ema": 0.9, "grid_every": 0, **settings}
    model = model or network(dtype=torch.float32, **FOLDED)
    source = source or Batches(images(20).float(), 4)
    return HVAETrainer(model, source, HVAESettings(**{"log_every": 1, **settings}), out, bar=False)


def learned(out):
    """Weights, averages and optimiser of a run, flat."""
    found = []

    def collect(value):
        if isinstance(value, dict):
            for entry in value.values():
                collect(entry)
        elif isinstance(value, torch.Tensor):
            found.append(value.flatten().double())

    collect(run_state.read(out)["learned"])
    return torch.cat(found)


def metrics(out, name):
    return [json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()]


class Acting(Batches):
    """Batches that do something before batch `at` of the run."""

    def __init__(self, at, act):
        super().__init__(images(20).float(), 4)
        self.at, self.act, self.given = at, act, 0

    def epoch(self, number, start=0):
        for batch in super().epoch(number, start):
            if self.given == self.at:
                batch = self.act(batch)
            self.given += 1
            yield batch


@pytest.mark.parametrize("settings", [{"flips": True}, {"amp": "bf16", "ema": 0.0}])
def test_three_steps_and_three_more_are_six_to_the_bit(tmp_path, settings):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert trainer(whole, **settings).run().done
    stop = Acting(2, lambda batch: os.kill(os.getpid(), signal.SIGTERM) or batch)
    first = trainer(parts, source=stop, **settings).run()
    assert (first.step, first.signal, first.done) == (3, 15, False)
    again = trainer(parts, **settings, model=network(seed=9, dtype=torch.float32, **FOLDED))
    again.resume(run_state.read(parts))
    assert again.run().done
    assert torch.equal(learned(whole), learned(parts))
    assert metrics(whole, "loss") == metrics(parts, "loss")
    names = [open_backbone(run / MODEL).fingerprint() for run in (whole, parts)]
    assert names[0] == names[1]


def test_time_that_is_up_stops_and_saves(tmp_path):
    summary = trainer(tmp_path, max_minutes=1e-9).run()
    assert (summary.step, summary.signal) == (1, 0)
    assert hvae_file.read(tmp_path / MODEL).step == 1


def test_other_settings_are_another_run(tmp_path):
    trainer(tmp_path).run()
    with pytest.raises(ValueError, match=r"trained with kl_weight 1.0 \(now 0.5\)"):
        trainer(tmp_path, kl_weight=0.5).resume(run_state.read(tmp_path))
    trainer(tmp_path, max_minutes=3, save_every=1).resume(run_state.read(tmp_path))


def test_the_saved_weights_are_the_averaged_ones(tmp_path):
    training = trainer(tmp_path)
    training.run()
    saved = hvae_file.read(tmp_path / MODEL).tensors
    assert all(torch.equal(saved[k], v) for k, v in training.ema.shadow.items())
    assert not torch.equal(saved["start"], training.model.start)


def test_the_average_of_a_short_run_forgets_where_it_began(tmp_path):
    training = trainer(tmp_path, ema=0.999)
    training.ema.shadow["start"].fill_(1000.0)  # of which 2e-4 should be left
    training.run()
    assert float(training.ema.shadow["start"].abs().max()) < 2


def test_a_step_that_is_not_finite_or_far_too_steep_is_skipped(tmp_path, capsys):
    training = trainer(tmp_path, source=Acting(3, lambda batch: batch * math.nan), iterations=4)
    assert training.run().skipped == 1
    assert "step 4: loss or gradient is not finite; no update" in capsys.readouterr().err
    assert all(p.isfinite().all() for p in training.model.parameters())
    steep = trainer(tmp_path / "steep", grad_clip=1e-8, grad_skip=1e-8)
    before = steep.model.start.clone()
    assert steep.run().skipped == 6
    assert torch.equal(before, steep.model.start)


@pytest.mark.parametrize("seen", [True, False])
def test_a_save_after_the_weights_broke_has_the_last_good_ones(tmp_path, capsys, seen):
    """Weights planted as NaN before step 5, which is skipped, or by the last update itself."""
    training, good = trainer(tmp_path, save_every=4), {}

    def spoil(batch):
        good.update({k: v.clone() for k, v in training.ema.shadow.items()})
        with torch.no_grad():
            training.model.start.fill_(math.nan)
        return batch

    if seen:
        training.data = Acting(4, spoil)
    else:
        training.optimizer.register_step_post_hook(
            lambda *_: spoil(None) if training.step == 5 else None
        )
    training.run()
    file = hvae_file.read(tmp_path / MODEL)
    assert (file.step, training.step, training.skipped) == (4, 6, 2 if seen else 0)
    if seen:
        assert all(torch.equal(file.tensors[k], v) for k, v in good.items())
    with training.evaluated() as model:
        assert torch.equal(model.start, file.tensors["start"])
    assert training.model.start.isnan().all()
    state = run_state.read(tmp_path)
    assert state["learned"]["model"]["start"].isnan().all()
    assert state["good"]["model"]["start"].isfinite().all()
    assert "step 6: hvae.safetensors gets the weights of step 4" in capsys.readouterr().err


def test_a_lost_run_goes_back_halves_the_rate_and_gives_up_in_the_end(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(hvae_training, "LOST", 3)

    def lost(training, times):
        """Break the weights after step 4, `times` over."""
        judge, left = training._wrong, [times]

        def planted(found):
            if training.step > 3 and left[0] and training.in_a_row == 0:
                left[0] -= 1
                with torch.no_grad():
                    training.model.start.fill_(math.nan)
                return "planted"
            return judge(found)

        training._wrong = planted
        return training

    once = lost(trainer(tmp_path / "once", iterations=12, save_every=2), 1)
    summary = once.run()
    assert (summary.done, summary.skipped, summary.halvings) == (True, 3, 1)
    assert "back to step 4 with learning rate factor 0.5" in capsys.readouterr().err
    factors = {step: 1 if step < 4 else 0.5 for step in range(12) if step not in (4, 5, 6)}
    assert metrics(tmp_path / "once", "lr") == pytest.approx(
        [factor * once.settings.lr_at(step) for step, factor in factors.items()]
    )
    assert once.model.start.isfinite().all()

    again = lost(trainer(tmp_path / "again", iterations=99, save_every=4), 99)
    with pytest.raises(ValueError, match=r"halved 5 times; the state of step \d+ is in"):
        again.run()
    assert hvae_file.read(tmp_path / "again" / MODEL).tensors["start"].isfinite().all()


def test_training_learns_and_the_bound_falls(tmp_path):
    config = SIZES["tiny"].config("digits", (1, 8, 8), 17, "logistic")
    torch.manual_seed(0)
    trainer(
        tmp_path,
        model=HVAE(config),
        source=Batches(images(1).float().expand(8, -1, -1, -1), 8),
        iterations=60,
    ).run()
    bits = metrics(tmp_path, "bits_per_dim")
    assert bits[-1] < 0.75 * bits[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"iterations": 0}, "iterations is 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr_end": 1.0}, "lr_end is 1.0, expected 0 to 0.001"),
        ({"grad_skip": 0.5}, "grad_skip is 0.5, expected 1"),
        ({"amp": "fp8"}, "amp is 'fp8'"),
    ],
)
def test_settings_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        HVAESettings(**{"iterations": 1, **change})


def test_the_schedules_are_a_half_cosine_and_a_ramp():
    settings = HVAESettings(iterations=100, lr=1e-3, lr_end=1e-5, warmup=0.1, kl_weight=0.5)
    assert settings.lr_at(0) == 1e-3
    assert settings.lr_at(50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert settings.lr_at(100) == pytest.approx(1e-5)
    assert settings.kl_weight_at(4) == pytest.approx(0.25)
    assert settings.kl_weight_at(9) == settings.kl_weight_at(99) == 0.5


# --- a prior on it, and the command


def test_a_prior_trains_and_samples_on_it_unchanged(saved, tmp_path):
    backbone = open_backbone(saved)
    config = PriorConfig(
        shapes=backbone.layout.shapes,
        width=8,
        network="mlp",
        num_steps=2,
        spectral_norm=False,
        energy_scale="none",
        step_rule="plain",
        b2=0.1,
    )
    settings = TrainSettings(iterations=3, grid_every=0)
    Trainer(
        EBMPrior(backbone, config), Batches(images(8).float(), 4), settings, tmp_path, bar=False
    ).run()
    loaded = checkpoint.load(tmp_path / "prior.safetensors", open_backbone(saved))
    assert loaded.sample(3, seed=0).shape == (3, 1, 8, 8)
    other = HVAEBackbone(network(seed=5, dtype=torch.float32))
    with pytest.raises(ValueError, match="was trained on the backbone"):
        checkpoint.load(tmp_path / "prior.safetensors", other)


def test_the_command_trains_reports_and_goes_on(tmp_path, capsys):
    out = tmp_path / "run"
    words = ["train_hvae", "--dataset", "digits", "--size", "tiny", "--out", str(out)]
    words += ["--device", "cpu", "--grid_size", "4", "--eval_images", "50"]
    assert main([*words, "--dry_run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["settings"]["flips"] is False
    assert shown["network"]["latents"] == [[4, 2, 2], [4, 2, 2], [4, 4, 4]]
    assert not out.exists()

    length = ["--iterations", "4", "--kl_weight", "0.5"]
    assert main([*words, *length, "--max_minutes", "1e-9"]) == 0
    assert "Stopped after 1 of 4 steps" in capsys.readouterr().out
    assert main([*words, *length]) == 2
    assert "go on with it by --resume auto" in capsys.readouterr().err
    assert main([*words, *length, "--resume", "auto"]) == 0
    told = capsys.readouterr()
    assert "going on from step 1" in told.err
    assert "--preset hvae_small" in told.out
    report = json.loads((out / "report.json").read_text())
    for half in ("train", "held_out"):
        assert report[half]["images"] == 50
        assert report[half]["bits_per_dim"] > 0
        assert len(report[half]["kl_per_layer"]) == 3
    assert report["protocol"]["settings"]["kl_weight"] == 0.5
    assert {p.name for p in (out / "grids").iterdir()} == {
        "reconstructions_0000004.png",
        "samples_0000004.png",
    }
    assert open_backbone(out / MODEL).config.dataset == "digits"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "cifar10"], "give --data, the folder that holds the images of cifar10"),
        (["--data", "nowhere"], "--data nowhere: no such folder"),
        (["--size", "full", "--lr", "7"], "lr is 7.0"),
        (["--size", "tiny", "--batch_size", "0"], "--batch_size 0: expected at least 1"),
        (["--size", "tiny", "--epochs", "0"], "--epochs 0: expected at least 1"),
    ],
)
def test_bad_input_is_told_in_one_line(tmp_path, capsys, flags, message):
    words = ["train_hvae", "--dataset", "digits", *flags, "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
