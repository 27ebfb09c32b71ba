"""The fast path against the plain one: values, gradients, chains, spectral norm, refreshes."""

from __future__ import annotations

import copy

import pytest
import torch

import ebm_prior
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.base import in_mode
from ebm_prior.config import PriorConfig
from ebm_prior.energy import Energy, EnergyNets
from ebm_prior.frozen import Steps, fast, wide
from ebm_prior.frozen.convolution import Convolution, Product
from ebm_prior.frozen.wide import WideEnergies
from ebm_prior.prior import EBMPrior
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import LinearGaussian

NETWORKS = ("residual", "conv", "map", "mlp")


class Maps:
    """Four layers of maps of two shapes, out of order, each layer's z its u plus the one above."""

    layout = ebm_prior.Layout(((2, 8, 8), (2, 16, 16), (2, 8, 8), (2, 16, 16)))

    def to_z(self, u, temperature=1.0):
        a, b, c, d = self.layout.split(temperature * u)
        up = torch.nn.functional.interpolate
        low = b + up(a, scale_factor=2).tanh()
        return [a, low, c + low[..., ::2, ::2], d * low.sigmoid()]


def make(network="residual", spectral_norm=True, dtype=torch.float64, backbone=None, **changes):
    """A prior whose spectral norms have found their vectors."""
    backbone = backbone or Maps()
    settings = {"width": 4, "num_steps": 4, "b2": 1e-3, "depth": 2} | changes
    config = PriorConfig(
        backbone.layout.shapes, network=network, spectral_norm=spectral_norm, **settings
    )
    prior = EBMPrior(backbone, config).to(dtype)
    u = torch.randn(2, backbone.layout.dim, dtype=dtype)
    with torch.no_grad(), in_mode(prior.energies, training=True):
        for _ in range(8):
            prior.energies(backbone.to_z(u), torch.tensor([0, 1]))
    return prior


@pytest.fixture(autouse=True)
def _pairs_are_grouped(monkeypatch):
    monkeypatch.setattr(wide, "FEW", 2)


def chain(prior, u, t=1):
    return prior.reverse(t, u, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def u(generator):
    return torch.randn(3, Maps.layout.dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("spectral_norm", [True, False])
@pytest.mark.parametrize("network", NETWORKS)
def test_energies_side_by_side_are_the_networks_own(network, spectral_norm, u, generator):
    prior = make(network, spectral_norm)
    t = torch.tensor([0, 1, 2])
    for steps in (Steps(), Steps(group=False), Steps(once=False), Steps(merge=False)):
        quick = fast(prior, steps)
        ours, theirs = (p.log_density(t, 0.9 * u).with_gradient(u) for p in (quick, prior))
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(chain(quick, u, t), chain(prior, u, t), rtol=0, atol=1e-12)


@pytest.mark.parametrize("network", NETWORKS)
def test_in_train_mode_every_call_advances_spectral_norm_as_the_networks_do(network, u):
    plain = make(network)
    other = copy.deepcopy(plain)
    quick = fast(other)
    before = copy.deepcopy(plain.energies.state_dict())
    with in_mode(plain.energies, training=True), in_mode(quick.energies, training=True):
        torch.testing.assert_close(chain(quick, u), chain(plain, u), rtol=0, atol=1e-12)
    after, theirs = other.energies.state_dict(), plain.energies.state_dict()
    torch.testing.assert_close(after, theirs, rtol=0, atol=1e-12)
    moved = [name for name in after if not torch.equal(after[name], before[name])]
    assert moved
    assert all(name.endswith(("weight_u", "weight_v")) for name in moved)


def test_labels_classes_and_layers_of_different_width(u):
    attributes = ({"name": "a", "classes": 3, "layers": (0, 3)},)
    prior = make(attributes=attributes)
    quick = fast(prior)
    labels = torch.tensor([[0], [2], [-1]])
    ours, theirs = (
        p.log_density(0, u, labels=labels, guidance=2.0).with_gradient(u) for p in (quick, prior)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        torch.testing.assert_close(quick.class_logits(u), prior.class_logits(u))
        torch.testing.assert_close(quick.layer_energy(u), prior.layer_energy(u))


def test_weights_trained_further_or_loaded_are_seen(u):
    prior = make(spectral_norm=False)
    quick = fast(prior)
    first = chain(quick, u)
    with torch.no_grad():
        for parameter in prior.energies.parameters():
            parameter.mul_(1.1)
    assert not torch.allclose(chain(quick, u), first, rtol=0, atol=1e-9)
    torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)
    prior.energies.load_state_dict(make(spectral_norm=False).energies.state_dict())
    torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)
    for parameter in prior.energies.parameters():  # as an average of weights takes its place
        parameter.data = 0.5 * parameter.data
    torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)


def test_an_update_past_pytorchs_counters_is_seen_after_a_training_step(u):
    prior = make(spectral_norm=False)
    quick = fast(prior)
    chain(quick, u)
    quick.loss(u, generator=torch.Generator().manual_seed(0))
    for parameter in prior.energies.parameters():
        parameter.detach().numpy()[:] *= 1.1
    torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)


def test_a_fused_optimisers_steps_are_seen(u):
    prior = make("mlp", spectral_norm=False)
    quick = fast(prior)
    optimizer = torch.optim.Adam(prior.energies.parameters(), lr=0.1, fused=True)
    for learning in (prior, quick):
        chain(quick, u)
        learning.contrast(u, u + 1, torch.tensor([0, 1, 2]))[0].backward()
        optimizer.step()  # changes no version
        torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)


def test_energies_first_asked_in_inference_mode_sample_afterwards(u):
    prior = make()
    quick = fast(prior)
    with torch.inference_mode():
        quick.energy(u)
    torch.testing.assert_close(chain(quick, u), chain(prior, u), rtol=0, atol=1e-12)


def test_another_precision_makes_other_copies(u):
    quick = fast(make())
    chain(quick, u)
    assert chain(quick.float(), u.float()).dtype == torch.float32


class Odd(Energy):
    """A network with a layer that has no wide form."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(3)

    def timed(self, embedding):
        return []

    def f(self, z, timed):
        return self.norm(z).sum(1, keepdim=True)


def test_networks_that_are_not_known_stay_as_they_are():
    toy = LinearGaussian((3, 3))
    prior = make("mlp", False, backbone=toy)
    prior.energies = EnergyNets([Odd(), Odd()]).double()
    quick = fast(prior)
    assert quick.energies is prior.energies
    u = torch.zeros(2, 6, dtype=torch.float64)
    torch.testing.assert_close(chain(quick, u), chain(prior, u))


@pytest.mark.parametrize("spectral_norm", [True, False])
def test_a_training_step_has_the_plain_ones_loss_and_gradients(spectral_norm, u):
    plain = make(spectral_norm=spectral_norm)
    other = copy.deepcopy(plain)
    losses = [
        p.loss(u, generator=torch.Generator().manual_seed(3))[0] for p in (fast(other), plain)
    ]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(other.energies.parameters(), plain.energies.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(other.energies.state_dict(), plain.energies.state_dict())


def test_the_learned_part_is_shared_and_has_the_files_names():
    prior = make()
    quick = fast(prior)
    assert isinstance(quick.energies, WideEnergies)
    assert type(prior.energies) is EnergyNets
    assert list(quick.learned.state_dict()) == list(prior.learned.state_dict())
    pairs = zip(quick.learned.parameters(), prior.learned.parameters(), strict=True)
    assert all(a is b for a, b in pairs)
    assert isinstance(fast(quick).energies, WideEnergies)


def test_equal_shapes_are_one_group_wherever_they_stand():
    quick = fast(make())
    quick.energies.at(torch.tensor([0]))
    assert [group.which for group in quick.energies._groups] == [[0, 2], [1, 3]]


def test_few_convolutional_networks_are_evaluated_one_by_one(monkeypatch):
    monkeypatch.setattr(wide, "FEW", 3)
    for network, groups in (("residual", [[0], [2], [1], [3]]), ("mlp", [[0, 2], [1, 3]])):
        quick = fast(make(network))
        quick.energies.at(torch.tensor([0]))
        assert [group.which for group in quick.energies._groups] == groups


def test_what_is_no_prior_is_refused():
    with pytest.raises(ValueError, match=r"fast got str .*, expected a prior"):
        fast("prior.safetensors")


def test_the_part_that_sees_t_runs_once_per_chain(u, monkeypatch):
    quick, calls = fast(make()), []
    quick.energies.at(torch.tensor([0]))
    for group in quick.energies._groups:
        timed = group.net.timed
        monkeypatch.setattr(group.net, "timed", lambda e, timed=timed: calls.append(1) or timed(e))
    chain(quick, u)
    assert len(calls) == len(quick.energies._groups)


@pytest.mark.parametrize(
    ("kernel", "stride", "side"),
    [
        ((3, 3), (1, 1), 8),
        ((4, 4), (2, 2), 8),
        ((4, 3), (2, 1), 8),
        ((3, 3), (2, 2), 7),
        ((3, 3), (2, 2), 8),
        ((3, 3), (2, 1), 5),
    ],
)
@pytest.mark.parametrize("way", [Convolution, Product])
def test_convolutions_side_by_side_are_pytorchs(way, kernel, stride, side, generator):
    n, batch = 3, 2
    x = torch.randn(n * batch, 4, side, side, generator=generator, dtype=torch.float64)
    weight = torch.randn(n, 5, 4, *kernel, generator=generator, dtype=torch.float64)
    bias = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    ours = way.apply(x, weight, bias, stride, (1, 1))
    theirs = torch.cat(
        [
            torch.nn.functional.conv2d(part, weight[i], bias[i], stride, padding=1)
            for i, part in enumerate(x.split(batch))
        ]
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    dy = torch.randn(theirs.shape, generator=generator, dtype=torch.float64)
    gradients = [torch.autograd.grad(y, x, dy)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


# --- whole priors


def test_on_a_real_backbone_the_samples_agree(generator):
    vae = small_vaes.vae()
    prior = small_vaes.prior(NVAEBackbone(vae), network="map")
    quick = fast(prior)
    samples = [p.sample(4, seed=1) for p in (quick, prior)]
    torch.testing.assert_close(*samples, rtol=1e-4, atol=1e-4)
    assert fast(prior, Steps(tower=False)).backbone is prior.backbone


def test_backbones_without_a_fast_copy_and_other_energies_stay_as_they_are():
    toy = LinearGaussian((2, 3))
    prior = make("mlp", False, backbone=toy)
    quick = fast(prior)
    assert quick.backbone is toy
    given = fast(prior, Steps(once=False, group=False, merge=False))
    assert given.energies is prior.energies


def test_a_fast_prior_leaves_the_given_one_alone(u):
    prior = make()
    energies, before = prior.energies, chain(prior, u)
    quick = fast(prior)
    quick.sampler = None
    assert prior.energies is energies
    assert torch.equal(chain(prior, u), before)
