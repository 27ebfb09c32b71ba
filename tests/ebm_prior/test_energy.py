"""The energy networks: counts, shapes beyond the published ones, spectral norm's state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import normalize, silu

from ebm_prior.config import PriorConfig
from ebm_prior.energy import (
    ConvEnergy,
    EnergyNets,
    MapEnergy,
    MLPEnergy,
    ResidualEnergy,
    halvings,
    time_embedding,
)
from ebm_prior.spectral_norm import SNConv2d, SNLinear, in_shares

PUBLISHED = {  # contract, networks.md: trainable / spectral norm buffers, 20 channels
    (ResidualEnergy, 128): {
        8: (1_428_496, 12_861),
        16: (2_116_624, 18_749),
        32: (2_804_752, 24_637),
        128: (2_804_752 + 2 * 688_128, None),
    },
    (ConvEnergy, 64): {
        8: (1_790_208, 8_321),
        16: (1_855_744, 9_409),
        32: (1_921_280, 10_497),
        64: (1_986_816, 11_585),
        128: (2_052_352, 12_673),
    },
}


@pytest.mark.parametrize(
    ("variant", "width", "side", "counts"),
    [(*key, side, n) for key, by_side in PUBLISHED.items() for side, n in by_side.items()],
)
def test_published_networks_have_the_published_sizes(variant, width, side, counts):
    with torch.device("meta"):
        net = variant((20, side, side), width)
    assert sum(p.numel() for p in net.parameters()) == counts[0]
    assert counts[1] in (None, sum(b.numel() for b in net.buffers()))


def test_the_digits_prior_has_965_thousand_parameters():
    shapes = ((4, 2, 2), (4, 2, 2), (4, 4, 4), (4, 4, 4))
    config = PriorConfig(shapes, network="mlp", width=256, depth=2, spectral_norm=False)
    nets = EnergyNets.build(config)
    assert sum(p.numel() for p in nets.parameters()) == 964_612


@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        *(
            (v, s)
            for v in (ResidualEnergy, ConvEnergy)
            for s in ((2, 1, 1), (3, 4, 4), (2, 16, 4))
        ),
        *((v, s) for v in (MLPEnergy, MapEnergy) for s in ((5,), (4, 2, 2), (3, 6, 5))),
        (MapEnergy, (2, 16, 9)),
    ],
)
def test_every_parameter_and_input_gets_a_gradient_on_unpublished_shapes(
    variant, shape, spectral_norm, generator
):
    net = variant(shape, width=8, spectral_norm=spectral_norm)
    z = torch.randn(3, *shape, generator=generator, requires_grad=True)
    f = net(z, torch.tensor([0, 1, 2]))
    assert f.shape == (3, 1)
    f.sum().backward()
    assert (z.grad.flatten(1).norm(dim=1) > 0).all()
    for name, parameter in net.named_parameters():
        assert parameter.grad.norm() > 0, name
    other = variant(shape, width=8, spectral_norm=spectral_norm)
    other.load_state_dict(net.state_dict())
    assert torch.equal(
        other.eval()(z, torch.zeros(3).long()), net.eval()(z, torch.zeros(3).long())
    )


@pytest.mark.parametrize(
    ("shape", "final", "at_least", "plan", "pixels"),
    [
        ((1, 8, 8), 2, 2, [(True, True)] * 2, 4),
        ((1, 32, 32), 4, 1, [(True, True)] * 3, 16),
        ((1, 4, 4), 2, 2, [(True, True), (False, False)], 4),
        ((1, 2, 2), 4, 1, [(False, False)], 4),
        ((1, 8, 2), 2, 2, [(True, False)] * 2, 4),
    ],
)
def test_small_and_oblong_maps_keep_the_layers_and_halve_less(
    shape, final, at_least, plan, pixels
):
    assert halvings(shape, final, at_least) == (plan, pixels)


@pytest.mark.parametrize("shape", [(4,), (4, 6, 8), (4, 8, 12)])
def test_a_shape_no_convolution_can_halve_points_to_the_mlp(shape):
    for variant in (ResidualEnergy, ConvEnergy):
        with pytest.raises(ValueError, match="powers of two; use network 'mlp'"):
            variant(shape, width=4)


def test_the_mlp_adds_its_layers_to_a_running_sum(generator):
    net, t = MLPEnergy((2, 3), width=4, depth=2), torch.tensor([0, 2])
    z = torch.randn(2, 2, 3, generator=generator)
    y = net.input(z.flatten(1)) + net.time[2](silu(net.time[0](time_embedding(t, 128))))
    for layer in net.layers:
        y = y + layer[1](silu(y))
    assert torch.equal(net(z, t), net.out[1](silu(y)))


def test_spectral_norm_reaches_every_layer_of_the_light_network():
    net = MapEnergy((2, 8, 8), 4, spectral_norm=True)
    weights = {key for key, value in net.named_parameters() if value.ndim > 1}
    assert weights
    assert all(key.endswith("weight_orig") for key in weights)


def test_time_changes_the_energy():
    for net in (ResidualEnergy((2, 8, 8), 4), ConvEnergy((2, 8, 8), 4), MLPEnergy((6,), 4)):
        shape = (2, 6) if isinstance(net, MLPEnergy) else (2, 2, 8, 8)
        f = net(torch.ones(shape), torch.tensor([0, 1]))
        assert f[0] != f[1]


@pytest.mark.parametrize("layer", [SNLinear(6, 4, bias=True), SNConv2d(2, 4, 3, padding=1)])
def test_each_training_forward_advances_spectral_norm_once_and_eval_never(layer):
    x = torch.randn(2, 6) if isinstance(layer, SNLinear) else torch.randn(2, 2, 5, 5)
    matrix, u = layer.weight_orig.detach().flatten(1), layer.weight_u.clone()
    layer.train()(x)
    v = normalize(matrix.t() @ u, dim=0)
    torch.testing.assert_close(layer.weight_v, v)
    torch.testing.assert_close(layer.weight_u, normalize(matrix @ v, dim=0))
    before = [buffer.clone() for buffer in layer.buffers()]
    layer.eval()(x)
    assert all(map(torch.equal, before, layer.buffers()))
    for _ in range(300):
        layer.train()(x)
    largest = torch.linalg.matrix_norm(matrix, 2)
    torch.testing.assert_close(layer.normalised_weight(), layer.weight_orig / largest)


def test_two_training_forwards_can_share_one_backward():
    layer = SNLinear(3, 2)
    (layer(torch.ones(1, 3)) + layer(torch.ones(1, 3))).sum().backward()
    assert layer.weight_orig.grad is not None


@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("network", ["residual", "conv", "mlp", "map"])
def test_a_pair_in_one_call_is_two_calls_with_their_gradients_and_power_iterations(
    network, spectral_norm, generator
):
    shapes = ((2, 4, 4), (3, 8, 8))
    config = PriorConfig(shapes, network=network, width=4, spectral_norm=spectral_norm)
    torch.manual_seed(5)
    batched = EnergyNets.build(config).double().train()
    plain = copy.deepcopy(batched)
    z = [torch.randn(6, *s, generator=generator).double().requires_grad_() for s in shapes]
    t = torch.tensor([0, 1, 2])
    weights = torch.randn(2, 3, 2, generator=generator).double()
    found = torch.stack(batched.pair(z, t))
    halves = zip(*(part.chunk(2) for part in z), strict=True)
    expected = torch.stack([plain(half, t) for half in halves])
    torch.testing.assert_close(found, expected)
    gradients = [
        torch.autograd.grad((weights * f).sum(), [*z, *nets.parameters()])
        for f, nets in ((found, batched), (expected, plain))
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(batched.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("layer", [SNLinear(6, 4, bias=True), SNConv2d(2, 4, 3, padding=1)])
def test_a_call_in_shares_advances_spectral_norm_once_for_each_and_eval_never(layer):
    x = torch.randn(4, 6) if isinstance(layer, SNLinear) else torch.randn(4, 2, 5, 5)
    plain = copy.deepcopy(layer)
    with in_shares(layer, 2):
        found = layer(x)
    torch.testing.assert_close(found, torch.cat([plain(half) for half in x.chunk(2)]))
    assert all(map(torch.equal, layer.buffers(), plain.buffers()))
    layer.eval()
    with in_shares(layer, 2):
        torch.testing.assert_close(layer(x), plain.eval()(x))
    assert all(map(torch.equal, layer.buffers(), plain.buffers()))
