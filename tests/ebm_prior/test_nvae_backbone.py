"""The NVAE adapter: goldens of u-space, and what a frozen view of a live model promises."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import nvae
from ebm_prior.backbones.nvae import NVAEBackbone
from nvae import batchnorm
from tests.conftest import nvae_cases
from tests.ebm_prior.small_vaes import vae


class Golden:
    """A case: its model behind the adapter, and its arrays."""

    def __init__(self, path):
        self.case = json.loads((path / "case.json").read_text())
        with np.load(path / "io.npz") as file:
            self.io = dict(file)
        self.backbone = NVAEBackbone(nvae.load(path / "checkpoint.pt"))
        self.batch = self.case["batch"]

    def recipe(self, name):
        """Noise of all layers: too large to be stored whole, so drawn again as it was."""
        normal = np.random.RandomState(self.case["random_inputs"][name]["seed"]).standard_normal
        shapes = self.case["latent_shapes_top_to_bottom"]
        return [torch.from_numpy(normal(shape).astype(np.float32)) for shape in shapes]

    @property
    def x(self):
        config = self.backbone.config
        x = torch.from_numpy(self.io["x_uint8"]).float()
        if config.data.output == "bernoulli":
            return x
        bits = config.num_x_bits
        x = x / 255
        return x if bits == 8 else torch.floor(x * 255 / 2 ** (8 - bits)) / (2**bits - 1)

    def check(self, name, got, tolerance):
        """Against the stored part of the array, by the contract's measure.

        The subset that the repository keeps lacks some arrays.
        """
        if name not in self.io:
            return
        if name in self.case["subsampled_arrays"]:
            part = self.case["subsampled_arrays"][name]
            got = got[..., part["start"] :: part["step"], part["start"] :: part["step"]]
        expected = torch.from_numpy(self.io[name])
        tolerance = max(tolerance, 10 * self.case["float32_versus_float64"].get(name, 0.0))
        assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.fixture(scope="module", params=nvae_cases(), ids=lambda path: path.name)
def case(request):
    return Golden(request.param)


def test_golden_posterior_noise_comes_out_of_one_pass(case):
    u = case.backbone.infer_with(case.x, case.recipe("eps"))
    for i, part in enumerate(case.backbone.layout.split(u)):
        case.check(f"posterior_u_{i}", part, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_golden_latents_and_logits_come_from_u(case, temperature):
    u = case.backbone.layout.join(case.recipe("u"))
    with torch.no_grad():
        for i, z in enumerate(case.backbone.to_z(u, temperature)):
            case.check(f"prior_t{temperature}_z_{i}", z, 1e-5)
        case.check(f"prior_t{temperature}_logits", case.backbone.logits(u, temperature), 1e-5)


def test_golden_gradients_reach_every_layer_of_u(case):
    u = case.backbone.layout.join(case.recipe("u")).requires_grad_()
    sum(z.sum() for z in case.backbone.to_z(u)).backward()
    for i, part in enumerate(case.backbone.layout.split(u.grad)):
        case.check(f"grad_sum_z_wrt_u_{i}", part, 1e-4)


def test_golden_u_survives_the_way_to_z_and_back(case):
    u = case.backbone.layout.join(case.recipe("u"))
    assert (case.backbone.to_u(case.backbone.to_z(u)) - u).abs().max() < 1e-5


@pytest.fixture
def model():
    return vae()


def draw(backbone, generator, num=3):
    return torch.randn(num, backbone.layout.dim, generator=generator)


def test_the_view_shares_memory_and_asks_for_no_gradient(model):
    model.train()
    backbone = NVAEBackbone(model)
    for mine, theirs in zip(backbone.model.parameters(), model.parameters(), strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert theirs.requires_grad
        assert not mine.requires_grad
    assert model.training
    assert not backbone.model.training


def test_a_view_costs_no_memory_for_weights_and_keeps_aliases_tied(model):
    view = NVAEBackbone(model).model
    assert len(list(view.parameters())) == len(list(model.parameters()))
    assert not any(tensor.is_meta for tensor in [*view.parameters(), *view.buffers()])


def test_drawing_twice_from_the_same_seed_gives_the_same_u_and_images(model):
    backbone = NVAEBackbone(model)
    x = torch.rand(4, 1, 8, 8)
    first, second = (backbone.infer(x, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (4, backbone.layout.dim)
    images = backbone.decode(first, 0.7, torch.Generator().manual_seed(2))
    assert images.shape == x.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert torch.equal(images, backbone.decode(first, 0.7, torch.Generator().manual_seed(2)))


def test_moments_are_those_that_to_z_used(model, generator):
    backbone = NVAEBackbone(model)
    u = draw(backbone, generator)
    z = backbone.to_z(u)
    layers = backbone.moments(z)
    assert layers[0].h is None
    for z_i, layer, u_i in zip(z, layers, backbone.layout.split(u), strict=True):
        torch.testing.assert_close(z_i, layer.mean + layer.std * u_i)
    torch.testing.assert_close(layers[0].std, torch.full_like(z[0], 1.01))


def test_readjusted_statistics_of_the_live_model_are_seen(model, generator):
    backbone = NVAEBackbone(model)
    u = draw(backbone, generator)
    before = backbone.to_z(u)
    batchnorm.readjust(model, temperature=1.0, iterations=3, batch_size=8, generator=generator)
    assert not torch.equal(backbone.to_z(u)[-1], before[-1])


def test_statistics_that_the_live_model_replaced_are_seen_after_refresh(model, generator):
    backbone = NVAEBackbone(model)
    u = draw(backbone, generator)
    before = backbone.logits(u)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean = module.running_mean + 1
    assert torch.equal(backbone.logits(u), before)
    backbone.refresh()
    assert not torch.equal(backbone.logits(u), before)


def test_given_statistics_stay_when_the_live_model_changes(model, generator):
    statistics = {k: v.clone() + 1 for k, v in model.state_dict().items() if "running" in k}
    backbone = NVAEBackbone(model, statistics)
    u = draw(backbone, generator)
    before = backbone.logits(u)
    assert not torch.equal(before, NVAEBackbone(model).logits(u))
    batchnorm.readjust(model, temperature=1.0, iterations=2, batch_size=8, generator=generator)
    backbone.refresh()
    assert torch.equal(backbone.logits(u), before)
    assert torch.equal(backbone.with_bn_statistics(None).logits(u), NVAEBackbone(model).logits(u))


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(ValueError, match=r"shape \(2, 3, 8, 8\), expected \(B, 1, 8, 8\)"):
        NVAEBackbone(model).infer(torch.zeros(2, 3, 8, 8))


def test_statistics_of_another_backbone_are_refused(model):
    with pytest.raises(ValueError, match="belong to another backbone"):
        NVAEBackbone(model, {"stem.running_mean": torch.zeros(3)})


def test_a_module_that_is_no_autoencoder_needs_its_config():
    with pytest.raises(ValueError, match=r"got Linear; .*ebm_prior\.attach"):
        NVAEBackbone(torch.nn.Linear(2, 2))
