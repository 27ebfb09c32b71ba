"""EBMPrior: what it promises beside its numbers, which `test_golden` and `test_testbed` check."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from ebm_prior.config import PriorConfig
from ebm_prior.energy import EnergyNets
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import forward_pair
from tests.ebm_prior.toys import Energies, LinearGaussian

SIZES = (2, 3)


def make(**changes):
    toy = LinearGaussian(SIZES, dtype=torch.float32)
    settings = {
        "network": "mlp",
        "width": 8,
        "depth": 1,
        "spectral_norm": False,
        "num_steps": 3,
        "b2": 0.1,
        "energy_scale": "none",
        "step_rule": "plain",
    }
    return EBMPrior(toy, PriorConfig(toy.layout.shapes, **(settings | changes)))


# --- configuration ---------------------------------------------------------------------------


def test_a_config_survives_json():
    config = PriorConfig(((4, 8, 8), (3,)), network="mlp", b2=0.3, preset="digits")
    assert PriorConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shapes": "evil"}, "latent shapes"),
        ({"network": ["mlp"]}, "network is .*one of residual, conv, mlp"),
        ({"width": 10**9}, "width is 1000000000, expected a whole number from 1"),
        ({"width": True}, "width is True"),
        ({"depth": -1}, "depth is -1"),
        ({"max_T": 3.0}, "max_T is 3.0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"b2": float("nan")}, "b2 is nan, expected a positive number"),
        ({"b2": "1e-5"}, "b2 is '1e-5'"),
        ({"spectral_norm": 1}, "spectral_norm is 1, expected true or false"),
        ({"energy_scale": None}, "energy_scale is None"),
        ({"step_rule": {}}, "step_rule is {}"),
        ({"preset": 3}, "preset is 3"),
        ({"__class__": "os.system"}, "unknown prior settings __class__"),
    ],
)
def test_hostile_settings_are_refused_by_name(change, message):
    values = PriorConfig(((2,),)).to_dict() | change
    with pytest.raises(ValueError, match=message):
        PriorConfig.from_dict(values)


@pytest.mark.parametrize("values", [None, [], "x", {}, {"width": 8}])
def test_settings_that_are_no_settings_are_refused(values):
    with pytest.raises(ValueError, match="prior settings"):
        PriorConfig.from_dict(values)


# --- the module ------------------------------------------------------------------------------


def test_the_state_dict_holds_the_energies_and_nothing_of_the_backbone():
    toy = LinearGaussian(SIZES, dtype=torch.float32)
    holder = torch.nn.Linear(2, 2)
    holder.layout, holder.to_z = toy.layout, toy.to_z  # a backbone that is a module
    prior = EBMPrior(holder, PriorConfig(toy.layout.shapes, network="mlp", width=4))
    assert prior.backbone is holder
    assert all(
        key.startswith(("energies.netE0.", "energies.netE1.")) for key in prior.state_dict()
    )
    assert set(prior.parameters()) == set(prior.energies.parameters())
    assert isinstance(prior.energies, EnergyNets)
    assert prior.energies.layer(1) is prior.energies.netE1


def test_a_backbone_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="do not belong together"):
        EBMPrior(LinearGaussian((2, 2)), PriorConfig(((2,), (3,))))


@pytest.mark.parametrize("scale", ["step", "none"])
def test_energies_are_minus_f_divided_by_the_step_size_where_scaled(scale, generator):
    prior = make(energy_scale=scale)
    u, t = torch.randn(4, 5, generator=generator), torch.tensor([0, 1, 2, 1])
    f = prior.energies(prior.backbone.to_z(u), t)
    e2 = prior.step_sizes.float()[t].unsqueeze(1) if scale == "step" else 1.0
    torch.testing.assert_close(prior.layer_energy(u, t), -f / e2)
    torch.testing.assert_close(prior.energy(u, 1), prior.layer_energy(u, 1).sum(1))
    # log pi differs from its f = 0 control by F.
    pi, control = (prior.log_density(t, u + 1, zero_energy=z)(u) for z in (False, True))
    torch.testing.assert_close(pi - control, -prior.energy(u, t), rtol=1e-4, atol=1e-4)


def test_an_index_outside_the_diffusion_is_refused():
    with pytest.raises(ValueError, match=r"t is 3, expected a diffusion index 0\.\.2"):
        make().energy(torch.zeros(1, 5), 3)
    with pytest.raises(ValueError, match=r"expected \(2,\): one index per sample"):
        make().energy(torch.zeros(2, 5), torch.tensor([0]))


# --- sampling --------------------------------------------------------------------------------


def test_samples_repeat_with_their_seed_and_the_temperature_enters_only_at_the_end():
    prior = make()
    x = prior.sample(4, seed=5)
    assert torch.equal(x, prior.sample(4, generator=torch.Generator().manual_seed(5)))
    assert not torch.equal(x, prior.sample(4, seed=6))
    torch.testing.assert_close(prior.sample(4, temperature=0.7, seed=5), 0.7 * x)  # toy: x = T u
    torch.manual_seed(3)
    free = prior.sample(4)
    torch.manual_seed(3)
    assert torch.equal(free, prior.sample(4))
    with pytest.raises(ValueError, match="give one of them"):
        prior.sample(1, seed=0, generator=torch.Generator())


def test_sampling_leaves_modes_and_gradients_as_it_found_them():
    prior = make(spectral_norm=True)
    prior.energies.train()
    prior.energies.layer(0).eval()
    first = next(prior.energies.parameters()).requires_grad_(False)
    modes = [m.training for m in prior.energies.modules()]
    flags = [p.requires_grad for p in prior.energies.parameters()]
    buffers = [b.clone() for b in prior.energies.buffers()]
    prior.sample_u(2, generator=None)
    assert modes == [m.training for m in prior.energies.modules()]
    assert flags == [p.requires_grad for p in prior.energies.parameters()]
    assert not first.requires_grad
    assert all(map(torch.equal, buffers, prior.energies.buffers())), "eval freezes spectral norm"
    assert all(p.grad is None for p in prior.energies.parameters())


def test_a_chain_that_fails_leaves_modes_and_gradients_as_it_found_them():
    prior = make()

    def fails(z, t):
        assert not prior.energies.weight.requires_grad
        raise RuntimeError("out of memory")

    prior.energies = Energies(fails, dtype=torch.float32).train()
    with pytest.raises(RuntimeError, match="out of memory"):
        prior.sample_u(2, generator=None)
    assert prior.energies.training
    assert prior.energies.weight.requires_grad


def test_a_chain_that_leaves_the_numbers_says_where():
    prior = make()
    prior.energies = Energies(
        lambda z, t: torch.stack([0 * z[0].sum(1), (1e30 * z[1] ** 3).sum(1)], dim=1),
        dtype=torch.float32,
    )
    with pytest.raises(ValueError, match=r"finite numbers within .* t = 2 \(step size .*layers"):
        prior.sample_u(2, generator=None)


def test_the_control_chain_asks_no_network():
    prior = make()
    prior.energies = Energies(lambda z, t: 1 / 0, dtype=torch.float32)
    u = prior.sample_u(3, generator=None, zero_energy=True)
    assert u.shape == (3, 5)
    assert prior.energies.calls == 0


def test_the_callback_sees_every_state_from_noise_to_zero(seed):
    prior, seen = make(max_T=2), []
    u = prior.sample_u(
        2,
        generator=torch.Generator().manual_seed(seed),
        num_steps=1,
        callback=lambda k, u: seen.append((k, u)),
    )
    assert [k for k, _ in seen] == [2, 1, 0]
    assert torch.equal(seen[-1][1], u)
    noise = torch.randn(2, 5, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(seen[0][1], noise)


def test_a_callers_autocast_and_inference_mode_change_nothing():
    prior = make()
    plain = prior.sample(2, seed=0)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        u = prior.sample_u(2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(prior.backbone.decode(u.clone()), plain)


def test_held_layers_keep_their_bits(generator):
    prior = make()
    u = torch.randn(3, 5, generator=generator)
    moved = prior.reverse(1, u, generator=generator, mask=prior.layout.mask([0]))
    assert torch.equal(moved[:, :2], u[:, :2])
    assert (moved[:, 2:] != u[:, 2:]).all()


@pytest.mark.parametrize("network", ["residual", "conv", "mlp"])
def test_a_chain_and_a_training_step_never_wait_for_the_device(network):
    """Reading a value off the meta device is an error, and so is mixing it with the CPU's."""
    layout = Layout(((2, 8, 8), (2, 16, 16)))
    backbone = SimpleNamespace(layout=layout, to_z=layout.split)
    prior = EBMPrior(backbone, PriorConfig(layout.shapes, network=network, width=4, num_steps=2))
    prior.to("meta")
    u = torch.zeros(3, layout.dim, device="meta")
    assert prior.reverse(1, u, mask=layout.mask([0], device="meta")).is_meta
    prior.loss(u, generator=None, squared_penalty=0.1)[0].backward()


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("max_T", [1, 3])
def test_a_training_step_reaches_every_parameter(max_T, generator):
    prior = make(max_T=max_T, spectral_norm=True)
    loss, info = prior.loss(torch.randn(8, 5, generator=generator), generator=generator)
    loss.backward()
    for name, parameter in prior.energies.named_parameters():
        # The last bias shifts f+ and f- alike: its gradient is zero, and unscaled exactly so.
        assert parameter.grad.norm() > 0 or name.endswith("out.1.bias"), name
    assert info.layer_loss.shape == info.positive.shape == info.negative.shape == (2,)
    assert not any(value.requires_grad for value in info)
    torch.testing.assert_close(info.layer_loss.sum(), loss.detach())
    torch.testing.assert_close(info.difference, (info.negative - info.positive).sum())


def test_a_training_step_calls_the_networks_k_plus_two_times_in_train_mode(generator):
    prior = make(num_steps=4)
    modes = []

    def watched(z, t):
        modes.append((prior.energies.training, prior.energies.weight.requires_grad))
        return torch.stack([part.sum(1) for part in z], dim=1)

    prior.energies = Energies(watched, dtype=torch.float32).eval()
    prior.loss(torch.randn(3, 5, generator=generator), generator=generator)
    assert modes == [(True, False)] * 4 + [(True, True)] * 2
    assert not prior.energies.training


def test_the_loss_is_the_scaled_difference_by_hand_with_mixed_t(generator):
    prior = make(energy_scale="step")
    positive, negative = torch.randn(2, 6, 5, generator=generator)
    t = torch.tensor([0, 1, 2, 0, 1, 2])
    loss, info = prior.contrast(positive, negative, t)
    f = [prior.energies(prior.backbone.to_z(u), t) for u in (positive, negative)]
    e2 = prior.step_sizes.float()[t].unsqueeze(1)
    torch.testing.assert_close(info.layer_loss, ((f[1] - f[0]) / e2).mean(0).detach())
    torch.testing.assert_close(loss, ((f[1] - f[0]) / e2).sum() / 6)
    torch.testing.assert_close(info.u_std, negative.std())
    penalised, _ = prior.contrast(positive, negative, t, squared_penalty=0.5)
    expected = loss + 0.5 * ((f[0] ** 2 + f[1] ** 2) / e2).sum() / 6
    torch.testing.assert_close(penalised, expected)


def test_equal_positives_and_negatives_teach_nothing(generator):
    prior = make()
    u = torch.randn(6, 5, generator=generator)
    loss, _ = prior.contrast(u, u, torch.tensor([0, 1, 2] * 2))
    loss.backward()
    assert abs(loss) < 1e-6
    assert all(p.grad.abs().max() < 1e-6 for p in prior.energies.parameters())


def test_the_same_generator_gives_the_same_loss_and_draws_t_per_sample(seed, generator):
    seen = []
    prior = make()
    nets = prior.energies
    prior.energies = Energies(lambda z, t: seen.append(t) or nets(z, t), dtype=torch.float32)
    u = torch.randn(64, 5, generator=generator)
    losses = [
        prior.loss(u, generator=torch.Generator().manual_seed(seed))[0].item() for _ in range(2)
    ]
    assert losses[0] == losses[1]
    assert set(seen[0].tolist()) == {0, 1, 2}


def test_the_loss_contrasts_a_chain_from_u_next_drawn_with_independent_noises(seed, generator):
    prior, n = make(), 8
    u = torch.randn(n, 5, generator=generator)
    loss, _ = prior.loss(u, generator=torch.Generator().manual_seed(seed))
    g = torch.Generator().manual_seed(seed)
    t = torch.randint(3, (n,), generator=g)
    positive, u_next = forward_pair(
        u, t, prior.schedule, torch.randn(n, 5, generator=g), torch.randn(n, 5, generator=g)
    )
    noise = [torch.randn(n, 5, generator=g) for _ in range(3)]
    by_hand, _ = prior.contrast(positive, prior.reverse(t, u_next, noise=noise), t)
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize("zero_energy", [False, True])
@pytest.mark.parametrize("last_step_kernel", [False, True])
def test_the_gradient_by_hand_is_autograds(zero_energy, last_step_kernel, generator):
    prior = make(last_step_kernel=last_step_kernel)
    u, u_next = torch.randn(2, 6, prior.layout.dim, generator=generator)
    t = torch.tensor([0, 1, 2, 0, 1, 2])
    log_pi = prior.log_density(t, u_next, zero_energy=zero_energy)
    value, gradient = log_pi.with_gradient(u)
    point = u.clone().requires_grad_()
    by_autograd = log_pi(point)
    torch.testing.assert_close(value, by_autograd.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(by_autograd.sum(), point)[0])
    assert not gradient.requires_grad
