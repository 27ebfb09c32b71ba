"""The marginal joint EBM: exact recursions in both spaces, the released log-determinant."""

from __future__ import annotations

import math

import pytest
import torch

from ebm_prior import checkpoint
from ebm_prior.backbones.base import Moments
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.config import PriorConfig
from ebm_prior.joint import JointPrior
from ebm_prior.latents import Layout
from tests.ebm_prior import small_vaes
from tests.ebm_prior.toys import EightModes, Energies, LinearGaussian, energy_distance

SETTINGS = {
    "kind": "joint",
    "max_T": 1,
    "network": "mlp",
    "width": 8,
    "depth": 1,
    "spectral_norm": False,
    "energy_scale": "none",
    "step_rule": "plain",
    "num_steps": 20,
    "b2": 0.02,
}


def make(backbone, function=None, **changes):
    """A prior, with energies given by a function (z, t) -> (B, L) or random networks."""
    prior = JointPrior(backbone, PriorConfig(backbone.layout.shapes, **(SETTINGS | changes)))
    if function is not None:
        prior.energies = Energies(function).eval()
    return prior


def normal(*shape, generator):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class Quadratic:
    """f_i = -1/2 (z_i - c_i)' Lam_i (z_i - c_i) on the linear-Gaussian toy: p is Gaussian."""

    def __init__(self, seed, **changes):
        g = torch.Generator().manual_seed(seed)
        self.toy = toy = LinearGaussian(seed=seed)
        roots = [0.5 * normal(n, n, generator=g) for n in toy.layout.sizes]
        self.Lam, self.c = torch.block_diag(*(r @ r.T for r in roots)), normal(7, generator=g)
        self.prior = make(toy, self.f, **changes)
        self.e2 = float(self.prior.step_sizes[0])
        eye = torch.eye(7).double()
        # Precision and precision times mean, in the sampler's own coordinates.
        if self.prior.config.sampler == "u":
            self.P = toy.M.T @ self.Lam @ toy.M + eye
            h = toy.M.T @ self.Lam @ (self.c - toy.m)
        else:
            inverse = torch.linalg.inv(toy.M)
            self.P = self.Lam + inverse.T @ inverse
            h = self.Lam @ self.c + inverse.T @ inverse @ toy.m
        self.mean = torch.linalg.solve(self.P, h)
        self.B = eye - self.e2 / 2 * self.P
        self.settled = torch.linalg.inv(self.P @ (eye - self.e2 / 4 * self.P))

    def f(self, z, t):
        off = self.toy.layout.join(z) - self.c
        parts = self.toy.layout.split(off * (off @ self.Lam))
        f = torch.stack([-0.5 * part.sum(1) for part in parts], dim=1)
        return f * self.prior.scale(t, f)  # a network read as energy times step gives e2 F

    def own(self, u):
        """u in the sampler's own coordinates, (B, D)."""
        return u if self.prior.config.sampler == "u" else self.toy.layout.join(self.toy.to_z(u))

    def after(self, start, num_steps):
        """The noiseless chain's state after K steps."""
        return self.mean + (start - self.mean) @ torch.linalg.matrix_power(self.B, num_steps).T


@pytest.mark.parametrize("energy_scale", ["none", "step"])
@pytest.mark.parametrize("sampler", ["u", "z"])
def test_without_noise_both_samplers_are_the_exact_linear_recursion(
    sampler, energy_scale, seed, generator
):
    case, num_steps = Quadratic(seed, sampler=sampler, energy_scale=energy_scale), 25
    start = normal(4, 7, generator=generator)
    u = case.prior.reverse(
        0, start, num_steps=num_steps, noise=[torch.zeros_like(start)] * num_steps
    )
    expected = case.after(case.own(start), num_steps)
    torch.testing.assert_close(case.own(u), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_the_settled_chain_has_the_exact_mean_and_covariance(sampler, seed, generator):
    n, case = 5000, Quadratic(seed, sampler=sampler, b2=0.1)
    assert case.e2 * torch.linalg.eigvalsh(case.P).max() < 4, "stable"
    num_steps = math.ceil(2 * 7 / (case.e2 * torch.linalg.eigvalsh(case.P).min()))
    start = normal(n, 7, generator=generator)
    u = case.own(case.prior.reverse(0, start, num_steps=num_steps, generator=generator))
    expected = case.after(case.own(torch.zeros(1, 7).double()), num_steps)
    assert ((u.mean(0) - expected).abs() <= 5 * (case.settled.diag() / n).sqrt()).all()
    assert (u.T.cov() - case.settled).norm() / case.settled.norm() <= 0.1


def test_the_step_size_is_b2_under_either_rule():
    for rule in ("plain", "cumulative"):
        step_sizes = make(EightModes(), b2=0.3, step_rule=rule).step_sizes
        assert step_sizes.shape == (1,)
        assert abs(step_sizes[0] - 0.3) < 0.3 * 1e-4


# --- the released log-determinant ----------------------------------------------------------------


def test_the_released_density_lacks_the_log_determinant(generator):
    toy = EightModes()
    exact, released = (make(toy, joint_logdet=which).double() for which in ("exact", "released"))
    released.energies = exact.energies
    u = normal(50, 4, generator=generator).requires_grad_()
    gradients = []
    for prior, deviations in ((exact, 0.0), (released, (0.5 + 0.5 * u[:, :2].sigmoid()).log())):
        z = toy.to_z(u)
        f = prior.energies(z, torch.zeros(50)).sum(1)
        by_hand = f - 0.5 * u.square().sum(1) - (deviations + 0 * u[:, :2]).sum(1)
        log_p = prior.log_density(0, u)(u)
        torch.testing.assert_close(log_p, by_hand)
        ours, theirs = (torch.autograd.grad(x.sum(), u)[0] for x in (log_p, by_hand))
        torch.testing.assert_close(ours, theirs)
        gradients.append(ours)
    difference = gradients[1] - gradients[0]
    assert (difference[:, :2] < 0).all(), "narrow lower layers are preferred"
    assert (difference[:, 2:] == 0).all()


def test_constant_deviations_make_no_difference(seed, generator):
    start, ends = normal(5, 7, generator=generator), []
    for joint_logdet in ("exact", "released"):
        prior = Quadratic(seed, joint_logdet=joint_logdet).prior
        g = torch.Generator().manual_seed(seed)
        ends.append(prior.reverse(0, start, generator=g))
    torch.testing.assert_close(*ends)


class Exponential:
    """z_1 = u_1 exp(c z_2): the log-deviation is linear, and log p_beta known by heart."""

    layout, c = Layout(((1,), (1,))), 0.4

    def to_z(self, u, temperature=1.0):
        top, low = self.layout.split(temperature * u)
        return [top, low * (self.c * top).exp()]

    def moments(self, z):
        top = z[0]
        one = Moments(torch.zeros_like(top), torch.ones_like(top), None)
        return [one, Moments(torch.zeros_like(top), (self.c * top).exp(), top)]


def test_the_released_chain_drifts_where_the_prior_alone_should_stay(generator):
    # exp(-|u|^2/2 - c u_top) is N(-c, 1): the chain relaxes towards -c with 1 - e2/2 a step.
    start, num_steps = normal(3, 2, generator=generator), 30
    still = [torch.zeros_like(start)] * num_steps
    for joint_logdet, mean in (("exact", 0.0), ("released", -Exponential.c)):
        prior = make(Exponential(), joint_logdet=joint_logdet)
        u = prior.reverse(0, start, num_steps=num_steps, noise=still, zero_energy=True)
        shrink = (1 - float(prior.step_sizes[0]) / 2) ** num_steps
        centre = torch.tensor([mean, 0.0]).double()
        torch.testing.assert_close(u, centre + (start - centre) * shrink)


# --- samples -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "b2", "num_steps"), [("u", 0.1, 100), ("z", 0.05, 200)], ids=["u", "z"]
)
def test_with_the_optimal_energy_both_samplers_reach_the_data(sampler, b2, num_steps, generator):
    toy, n = EightModes(), 2000
    prior = make(toy, sampler=sampler, b2=b2, num_steps=num_steps)
    prior.energies = Energies(toy.oracle(prior.schedule))
    assert abs(energy_distance(prior.sample_u(n, generator=generator), toy.draw(n, generator))) < (
        0.004  # the Gaussian prior is at 0.024
    )


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_without_energies_the_prior_of_the_vae_comes_back(sampler, generator):
    n, b2 = 20_000, 0.01
    prior = make(EightModes(), sampler=sampler, b2=b2).double()
    u = prior.sample_u(n, generator=generator, zero_energy=True)
    assert (u.mean(0).abs() < 4 / n**0.5).all()
    inflation = b2 / 0.5**2  # of the narrowest layer in z-space, a bound for the others
    bound = 4 * (2 / n) ** 0.5 + inflation
    assert ((u.T.cov() - torch.eye(4)).abs() < bound).all()


def test_held_layers_keep_their_bits_in_z_space(generator):
    toy = EightModes()
    prior = make(toy, sampler="z").double()
    start = normal(5, 4, generator=generator)
    u = prior.reverse(0, start, generator=generator, mask=toy.layout.mask([0]))
    assert torch.equal(u[:, :2], start[:, :2])
    assert (u[:, 2:] != start[:, 2:]).all()
    with pytest.raises(ValueError, match="hold layers from the top on, or take the sampler 'u'"):
        prior.reverse(0, start, generator=generator, mask=toy.layout.mask([1]))


@pytest.mark.parametrize("settings", [{}, {"joint_logdet": "released"}, {"sampler": "z"}])
def test_it_learns_and_draws_on_an_nvae_and_its_file_says_how(settings, tmp_path, generator):
    backbone = NVAEBackbone(small_vaes.vae())
    prior = make(backbone, num_steps=2, b2=1e-3, **settings)
    loss, info = prior.loss(
        torch.randn(4, backbone.layout.dim, generator=generator), generator=generator
    )
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())
    assert info.layer_loss.shape == (2,)
    checkpoint.save(tmp_path / "prior.safetensors", prior)
    again = checkpoint.load(tmp_path / "prior.safetensors", backbone)
    assert isinstance(again, JointPrior)
    assert again.config == prior.config
    assert torch.equal(again.sample(3, seed=1), prior.sample(3, seed=1))


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_the_loss_contrasts_clean_draws_with_chains_from_noise(sampler, seed, generator):
    case = Quadratic(seed, sampler=sampler)
    u = 2 + normal(6, 7, generator=generator)
    loss, info = case.prior.loss(u, generator=torch.Generator().manual_seed(5))
    g = torch.Generator().manual_seed(5)
    negative = case.prior.reverse(0, normal(6, 7, generator=g), generator=g)
    f_positive, f_negative = (
        case.f(case.toy.to_z(x), torch.zeros(6).long()) for x in (u, negative)
    )
    torch.testing.assert_close(info.positive, f_positive.mean(0))
    torch.testing.assert_close(info.negative, f_negative.mean(0))
    torch.testing.assert_close(loss, (f_negative - f_positive).mean(0).sum())


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_eighty_steps_of_learning_close_most_of_a_wide_gap(sampler, generator):
    toy = EightModes()

    def draw(n):
        centre = torch.tensor([1.0, -0.5, 0.5, 0.0])
        return centre + 0.5 * torch.randn(n, 4, generator=generator)

    prior = make(toy, sampler=sampler, width=16, b2=0.2, num_steps=15)
    optimizer = torch.optim.Adam(prior.parameters(), lr=3e-3, betas=(0.9, 0.999))
    for _ in range(80):
        loss, _info = prior.loss(draw(128), generator=generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    before, after = torch.randn(1000, 4), prior.sample_u(1000, generator=generator)
    assert energy_distance(after, draw(1000)) < 0.25 * energy_distance(before, draw(1000))


# --- refused -------------------------------------------------------------------------------------


class Bare:
    layout = Layout(((2,), (2,)))


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        (EightModes, {"max_T": 3}, "max_T is 3, expected 1: one marginal EBM"),
        (EightModes, {"last_step_kernel": True}, "expected false: the joint prior has none"),
        (EightModes, {"sampler": "z", "joint_logdet": "released"}, "take the sampler 'u'"),
        (Bare, {"sampler": "z"}, r"sampler 'z' needs .* Bare has no method moments\(z\)"),
        (Bare, {"joint_logdet": "released"}, r"'released' needs .* no method moments\(z\)"),
    ],
)
def test_settings_that_do_not_fit_are_refused(backbone, changes, message):
    with pytest.raises(ValueError, match=message):
        make(backbone(), **changes)


@pytest.mark.parametrize("sampler", ["u", "z"])
def test_labels_are_refused(sampler, generator):
    prior = make(LinearGaussian(), sampler=sampler, b2=1e-3).double()
    u, labels = torch.zeros(2, 7).double(), torch.zeros(2, 1, dtype=torch.long)
    for use in (
        lambda: prior.reverse(0, u, labels=labels),
        lambda: prior.log_density(0, u, labels=labels),
        lambda: prior.sample_u(2, generator=generator, labels=labels),
        lambda: prior.loss(u, generator=generator, labels=labels),
    ):
        with pytest.raises(ValueError, match="labels for a prior without attributes"):
            use()


def test_a_step_too_large_for_the_narrowest_layer_is_refused_before_the_chain(generator):
    prior = make(EightModes(), sampler="z", b2=2.0).double()
    prior.energies = Energies(lambda z, t: torch.zeros(len(t), 2))
    with pytest.raises(ValueError, match=r"step size 2 is too large .* set a smaller b2"):
        prior.sample_u(10, generator=generator)
    assert prior.energies.calls == 0
