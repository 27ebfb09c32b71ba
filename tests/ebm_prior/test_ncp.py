"""The noise-contrastive prior: optimal logits, importance resampling, contexts."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

from ebm_prior import checkpoint, ncp
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.config import PriorConfig
from ebm_prior.latents import Layout
from ebm_prior.ncp import NCPPrior, context_shapes, importance_resample
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import LinearGaussian

SETTINGS = {
    "kind": "ncp",
    "network": "mlp",
    "width": 16,
    "depth": 1,
    "spectral_norm": False,
    "b2": 0.05,
    "num_steps": 60,
}


def make(backbone, context=True, **changes):
    if not context:
        contexts = None
    elif isinstance(backbone, LinearGaussian):  # its state is all of z above
        ends = itertools.accumulate(backbone.layout.sizes[:-1])
        contexts = (None, *((end,) for end in ends))
    else:
        contexts = context_shapes(backbone)
    settings = SETTINGS | {"contexts": contexts} | changes
    return NCPPrior(backbone, PriorConfig(backbone.layout.shapes, **settings))


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class QuadraticNets(nn.Module):
    """f_i = alpha_i + eta_i'u_i - u_i'B_i u_i/2 on the linear-Gaussian toy, in terms of z_i and h.

    In the place of the classifiers; with the right numbers it is log N(u_i; m, C) / N(u_i; 0, I).
    """

    def __init__(self, toy, means, covariances):
        super().__init__()
        self.toy = toy
        eye = [torch.eye(len(m)).double() for m in means]
        inverse = [C.inverse() for C in covariances]
        constant = [
            -0.5 * (C.logdet() + m @ P @ m)
            for m, C, P in zip(means, covariances, inverse, strict=True)
        ]
        self.alpha = nn.Parameter(torch.stack(constant))
        self.eta = nn.ParameterList(P @ m for m, P in zip(means, inverse, strict=True))
        self.B = nn.ParameterList(P - e for P, e in zip(inverse, eye, strict=True))

    def layer(self, i):
        n, toy = self.toy.layout.sizes[i], self.toy
        rows = slice(sum(toy.layout.sizes[:i]), sum(toy.layout.sizes[: i + 1]))

        def net(both, t):
            z, h = both[:, :n], both[:, n:]
            mean = h @ toy.coupling[rows, : h.shape[1]].T + toy.offset[rows]
            u = (z - mean) / toy.scale[rows]
            f = self.alpha[i] + u @ self.eta[i] - 0.5 * (u * (u @ self.B[i])).sum(1)
            return f.unsqueeze(1)

        return net


class Exact:
    """Data with u_i ~ N(m_i, C_i) on the linear-Gaussian toy, and the exact ratios."""

    def __init__(self, seed, sizes=(2, 2, 3), **changes):
        g = torch.Generator().manual_seed(seed)
        self.toy = LinearGaussian(sizes, seed=seed)
        self.means = [0.4 * normal(n, generator=g) for n in sizes]
        roots = [0.2 * normal(n, n, generator=g) for n in sizes]
        self.covariances = [0.6 * torch.eye(len(r)) + r @ r.T for r in roots]
        self.prior = make(self.toy, **changes)
        self.prior.classifiers = QuadraticNets(self.toy, self.means, self.covariances)
        self.mean, self.C = torch.cat(self.means), torch.block_diag(*self.covariances)

    def draw(self, n, generator):
        noise = normal(n, len(self.mean), generator=generator)
        return self.mean + noise @ torch.linalg.cholesky(self.C).T


def assert_moments(u, mean, C, slack=4):
    """The sample's mean and covariance within `slack` standard errors."""
    n = len(u)
    assert ((u.mean(0) - mean).abs() < slack * (C.diag() / n).sqrt()).all()
    error = ((torch.outer(C.diag(), C.diag()) + C.square()) / n).sqrt()
    assert ((u.T.cov() - C).abs() < slack * error).all()


# --- learning ------------------------------------------------------------------------------------


def test_the_losss_gradient_vanishes_at_the_log_ratio_and_points_back_to_it(seed, generator):
    def gradients(shift):
        """Of the loss in every layer's eta_0, over 40 batches, in standard errors."""
        case = Exact(seed)
        nets = case.prior.classifiers
        with torch.no_grad():
            for eta in nets.eta:
                eta[0] += shift
        found = []
        for _ in range(40):
            nets.zero_grad()
            loss, _info = case.prior.loss(case.draw(2000, generator), generator=generator)
            loss.backward()
            found.append(torch.cat([nets.alpha.grad, *(p.grad for p in nets.eta)]))
        every = torch.stack(found)
        return every.mean(0) / (every.std(0) / len(every) ** 0.5)

    assert gradients(0.0).abs().max() < 5
    firsts = [3, 5, 7]  # after the three alpha
    assert (gradients(0.3)[firsts] > 10).all()


def test_layer_energies_are_minus_the_log_ratios(seed, generator):
    case = Exact(seed)
    u = case.draw(20, generator)
    expected = []
    for part, m, C in zip(case.toy.layout.split(u), case.means, case.covariances, strict=True):
        q = torch.distributions.MultivariateNormal(m, C)
        p = torch.distributions.MultivariateNormal(torch.zeros_like(m), torch.eye(len(m)).double())
        expected.append(p.log_prob(part) - q.log_prob(part))
    torch.testing.assert_close(case.prior.layer_energy(u), torch.stack(expected, 1))
    torch.testing.assert_close(case.prior.energy(u, 0), sum(expected))


def test_the_loss_is_the_cross_entropy_of_both_classes_layer_by_layer(seed, generator):
    case = Exact(seed)
    u = case.draw(30, generator)
    loss, info = case.prior.loss(
        u, generator=torch.Generator().manual_seed(3), squared_penalty=0.1
    )
    noise = normal(30, 7, generator=torch.Generator().manual_seed(3))
    f_positive = -case.prior.layer_energy(u)
    # The exact ratio depends on u_i alone, so the posterior's contexts change nothing here.
    f_negative = -case.prior.layer_energy(noise)
    D = torch.nn.functional.binary_cross_entropy
    layers = [
        D(p.sigmoid(), torch.ones_like(p)) + D(n.sigmoid(), torch.zeros_like(n))
        for p, n in zip(f_positive.T, f_negative.T, strict=True)
    ]
    penalty = 0.1 * (f_positive.square() + f_negative.square()).mean(0)
    torch.testing.assert_close(info.layer_loss, torch.stack(layers) + penalty)
    torch.testing.assert_close(loss, info.layer_loss.sum())
    torch.testing.assert_close(info.difference, (f_negative - f_positive).mean(0).sum())


class Recorder(nn.Module):
    """In a network's place: notes what it is given."""

    def __init__(self):
        super().__init__()
        self.given = []

    def forward(self, x, t):
        assert (t == 0).all()
        self.given.append(x.detach())
        return 0 * x.flatten(1).sum(1, keepdim=True)


@pytest.mark.parametrize("context", [True, False])
def test_both_classes_of_a_layer_see_the_posteriors_context(context, generator):
    toy = LinearGaussian((2, 3))
    prior = make(toy, context)
    prior.classifiers = ncp.EnergyNets(Recorder() for _ in range(2))
    u = 3 + normal(5, 5, generator=generator)
    prior.loss(u, generator=generator)
    nets = prior.classifiers.children()
    (top, top_negative), (low, low_negative) = (net.given[0].chunk(2) for net in nets)
    z = toy.to_z(u)
    assert torch.equal(top, z[0])
    assert (top_negative != top).all()
    if context:
        torch.testing.assert_close(low, torch.cat([z[1], z[0]], dim=1))
        assert torch.equal(low[:, 3:], low_negative[:, 3:])
    else:
        assert torch.equal(low, z[1])
    assert (low[:, :3] != low_negative[:, :3]).all()


def test_the_loss_is_what_two_calls_of_normalised_classifiers_give(generator):
    toy = LinearGaussian((2, 3))
    prior = make(toy, spectral_norm=True).double()
    plain = copy.deepcopy(prior)
    u = normal(6, 5, generator=generator)
    noise = normal(6, 5, generator=generator.clone_state())
    loss, _ = prior.loss(u, generator=generator)
    loss.backward()
    z = toy.to_z(u)
    moments = prior.moments(z)
    parts = zip(moments, toy.layout.split(noise), strict=True)
    negative = [m.mean + m.std * part for m, part in parts]
    plain.classifiers.train()
    f_positive, f_negative = plain.logits(z, moments), plain.logits(negative, moments)
    expected = (softplus(-f_positive) + softplus(f_negative)).mean(0).sum()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(prior.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
    for ours, theirs in zip(prior.buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_context_tells_what_a_layer_alone_cannot(generator):
    """u_low follows u_top with correlation 0.8 but is N(0, 1) alone."""
    toy, n = LinearGaussian((1, 1), dtype=torch.float32), 256
    toy.coupling.zero_()  # z_low holds nothing of z_top
    toy.M = toy.scale.diag()
    toy.m = toy.offset

    def draw():
        top, rest = torch.randn(2, n, 1, generator=generator)
        return torch.cat([top, 0.8 * top + 0.6 * rest], dim=1)

    entropies, correlations = {}, {}
    for context in (True, False):
        prior = make(toy, context, proposals=48)
        optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
        losses = []
        for _ in range(100):
            loss, info = prior.loss(draw(), generator=generator)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(info.layer_loss[1])
        entropies[context] = float(torch.stack(losses[-30:]).mean())
        correlations[context] = float(prior.sample_u(1500, generator=generator).T.corrcoef()[0, 1])
    blind = 2 * math.log(2)
    assert abs(entropies[False] - blind) < 0.02
    assert entropies[True] < blind - 0.2
    assert abs(correlations[True] - 0.8) < 0.1
    assert abs(correlations[False]) < 0.1


# --- importance resampling -----------------------------------------------------------------------


def gaussian_log_ratio(m, s):
    return lambda u: (-0.5 * ((u - m) / s).square() + 0.5 * u.square()).sum(1)


def test_resampling_with_the_exact_ratio_draws_from_the_target(generator):
    n, m, s = 4000, torch.tensor([0.5, -0.3]).double(), torch.tensor([0.8, 0.9]).double()
    start = normal(n, 2, generator=generator)
    u, _ess = importance_resample(start, gaussian_log_ratio(m, s), 200, generator)
    assert_moments(u, m, s.square().diag())


def test_the_effective_sample_size_has_its_closed_forms(generator):
    start = normal(500, 1, generator=generator)
    _, ess = importance_resample(start, lambda u: torch.full((len(u),), 7.0), 37, generator)
    torch.testing.assert_close(ess, torch.full((500,), 37.0).double())
    _, ess = importance_resample(start, lambda u: 1e6 * u.squeeze(1), 37, generator)
    torch.testing.assert_close(ess, torch.ones(500).double())
    # 1 / sum w^2 -> M E[r]^2 / E[r^2] = M exp(-m^2) for the ratio of N(m, 1) to N(0, 1).
    m, proposals = 0.5, 400
    _, ess = importance_resample(start, gaussian_log_ratio(m, 1.0), proposals, generator)
    expected = proposals * math.exp(-(m**2))
    assert abs(ess.mean() - expected) < 4 * ess.std() / len(ess) ** 0.5 + 0.01 * expected


def test_of_all_blocks_of_proposals_the_heaviest_wins(generator):
    proposals, seen = 2 * ncp.CHUNK + 5, []
    start = normal(6, 2, 3, generator=generator)

    def log_ratio(u):
        seen.append(u.view(6, -1, 2, 3))
        return 1e9 * u[:, 0, 0]

    u, _ess = importance_resample(start, log_ratio, proposals, generator)
    every = torch.cat(seen, dim=1)
    assert every.shape[1] == proposals
    assert torch.equal(every[:, 0], start), "the given start is a proposal"
    heaviest = every[:, :, 0, 0].argmax(1)
    assert torch.equal(u, every[torch.arange(6), heaviest])
    assert len(set(heaviest.tolist())) > 1


# --- sampling ------------------------------------------------------------------------------------


def test_ancestral_resampling_with_exact_ratios_gives_the_data(seed, generator):
    case, states = Exact(seed, proposals=100), {}
    u = case.prior.sample_u(3000, generator=generator, callback=states.__setitem__)
    assert_moments(u, case.mean, case.C, slack=4.5)
    assert case.prior.last_ess.shape == (3000, 3)
    assert (case.prior.last_ess > 1).all()
    assert (case.prior.last_ess < 100).all()
    assert list(states) == [1, 0]
    assert_moments(states[1], torch.zeros(7).double(), torch.eye(7).double(), slack=4.5)
    assert torch.equal(states[0], u)


def test_langevin_per_layer_settles_at_its_closed_form(seed, generator):
    case = Exact(seed, sampler="langevin", num_steps=200)
    u = case.prior.sample_u(5000, generator=generator)
    P = case.C.inverse()  # of exp(f_i) N(u_i; 0, I), which is the data here
    settled = torch.linalg.inv(P @ (torch.eye(7) - case.prior.config.b2 / 4 * P))
    assert_moments(u, case.mean, settled, slack=4.5)
    assert case.prior.last_ess is None


@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_without_ratios_the_prior_of_the_vae_comes_back(sampler, seed, generator):
    case = Exact(seed, sampler=sampler, proposals=20, b2=1e-3)
    u = case.prior.sample_u(5000, generator=generator, zero_energy=True)
    assert_moments(u, torch.zeros(7).double(), torch.eye(7).double(), slack=4.5)


def test_diverged_classifiers_are_named(generator):
    prior = make(LinearGaussian((2, 2)), sampler="langevin", b2=1e30).double()
    with pytest.raises(ValueError, match="langevin left the finite numbers"):
        prior.sample_u(4, generator=generator)
    prior = make(LinearGaussian((2, 2))).double()
    with torch.no_grad():
        prior.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="sir left the finite numbers"):
        prior.sample_u(4, generator=generator)


@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_it_draws_inside_inference_mode(sampler, seed, generator):
    prior = Exact(seed, sampler=sampler, proposals=5, num_steps=2).prior
    with torch.inference_mode():
        assert prior.sample_u(3, generator=generator).shape == (3, 7)


# --- networks and files --------------------------------------------------------------------------


@pytest.mark.parametrize("network", ["mlp", "residual", "conv"])
@pytest.mark.parametrize("sampler", ["sir", "langevin"])
def test_it_learns_and_draws_on_an_nvae_and_its_file_says_how(
    network, sampler, tmp_path, generator
):
    backbone = NVAEBackbone(small_vaes.vae())
    settings = {"network": network, "sampler": sampler, "proposals": 20, "num_steps": 2}
    prior = make(backbone, width=4, spectral_norm=True, **settings)
    assert prior.config.contexts == context_shapes(backbone)
    assert prior.config.contexts[0] is None, "nothing comes before the top layer"
    u = torch.randn(4, backbone.layout.dim, generator=generator)
    before = copy.deepcopy(prior.state_dict())
    prior.loss(u, generator=generator)[0].backward()
    # Dense layers on the time embedding see the constant t = 0: sines of it give nothing.
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())
    moved = [k for k, v in prior.state_dict().items() if not torch.equal(v, before[k])]
    assert moved, "learning advances the spectral norm"
    checkpoint.save(tmp_path / "prior.safetensors", prior)
    after = copy.deepcopy(prior.state_dict())
    again = checkpoint.load(tmp_path / "prior.safetensors", backbone)
    assert isinstance(again, NCPPrior)
    assert again.config == prior.config
    assert torch.equal(again.sample(3, seed=1), prior.sample(3, seed=1))
    assert all(torch.equal(v, after[k]) for k, v in prior.state_dict().items()), "sampling not"
    assert all(key.startswith(("netE0.", "netE1.")) for key in prior.learned.state_dict())


def test_the_shapes_of_contexts_are_asked_of_the_backbone():
    toy = LinearGaussian((1, 2, 3), dtype=torch.float32)
    assert context_shapes(toy) == make(toy).config.contexts == (None, (1,), (3,))


def test_contexts_of_another_backbone_are_refused():
    with pytest.raises(ValueError, match=r"see decoder states of shapes \(None, \(1,\), \(2,\)\)"):
        make(LinearGaussian((1, 2, 3)), contexts=(None, (1,), (2,)))
    with pytest.raises(ValueError, match="expected none for another kind than ncp"):
        PriorConfig(((1,), (2,)), contexts=(None, (1,)))


@pytest.mark.parametrize("context", [(3, 8, 8), (3, 2, 2), (3, 4, 4), (3,)])
def test_contexts_of_any_size_come_to_the_size_of_the_layer(context, generator):
    config = PriorConfig(((2, 4, 4),), kind="ncp", width=4, contexts=(context,))
    net = NCPPrior.networks(config).layer(0)
    z, h = torch.zeros(5, 2, 4, 4), torch.rand(5, *context, generator=generator)
    both = ncp._input(z, h, "residual")
    torch.testing.assert_close(both[:, 2:].mean((2, 3)), h.reshape(5, 3, -1).mean(2))
    assert net(both, torch.zeros(5)).shape == (5, 1)


class Bare:
    layout = Layout(((2,), (2,)))


def test_a_backbone_without_moments_is_refused():
    with pytest.raises(ValueError, match=r"Bare has no method moments\(z\); add it"):
        make(Bare(), context=False)
