"""Labels in the energies: the contract's identities (conditional.md), and its oracle table."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from ebm_prior.config import PriorConfig
from ebm_prior.coupling import Attribute, Coupling
from ebm_prior.prior import EBMPrior
from tests.ebm_prior.toys import EightModes, Energies, LinearGaussian, energy_distance

SMALL = {"network": "mlp", "width": 8, "energy_scale": "none", "step_rule": "plain", "b2": 0.1}
COLOUR = Attribute("colour", 3, (0, 1))
SHAPE = Attribute("shape", 2, (2,))


def network_prior(*attributes, seed=0, toy=None, **changes):
    """Random dense networks on the linear-Gaussian toy of layers 2, 2, 3, in float64."""
    toy = toy or LinearGaussian(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings = SMALL | {"spectral_norm": False, "num_steps": 3} | changes
        return EBMPrior(
            toy, PriorConfig(toy.layout.shapes, attributes=attributes, **settings)
        ).double()


def gradient(function, u):
    u = u.clone().requires_grad_()
    value = function(u)
    return value.detach(), torch.autograd.grad(value.sum(), u)[0]


def points(n, generator, dim=7):
    """u and u_next."""
    return torch.randn(2, n, dim, generator=generator, dtype=torch.float64)


def by_hand(prior, u, t):
    """The networks' own outputs per layer, (B, classes) or (B, 1), as log densities."""
    index = torch.full((len(u),), t)
    outputs = [prior.energies.layer(i)(z, index) for i, z in enumerate(prior.backbone.to_z(u))]
    scale = float(prior.step_sizes[t]) if prior.config.energy_scale == "step" else 1.0
    return outputs, scale


# --- (1), (2), (3): one class, equal classes, the gradient at a label


@pytest.mark.parametrize("energy_scale", ["none", "step"])
def test_one_class_is_the_unconditional_prior_bit_for_bit(energy_scale, seed, generator):
    plain = network_prior(seed=seed, energy_scale=energy_scale)
    one = network_prior(Attribute("one", 1, (1,)), seed=seed, energy_scale=energy_scale)
    one.energies.load_state_dict(plain.energies.state_dict())
    u, _ = points(32, generator)
    labels = torch.zeros(32, 1, dtype=torch.long)
    results = []
    for prior, given in ((plain, {}), (one, {}), (one, {"labels": labels})):
        prior.energies.zero_grad()
        loss, info = prior.loss(u, generator=torch.Generator().manual_seed(seed), **given)
        loss.backward()
        drawn = prior.sample_u(32, generator=torch.Generator().manual_seed(seed), **given)
        slopes = [p.grad.clone() for p in prior.energies.parameters()]
        energies = [prior.energy(u, 0).detach(), prior.layer_energy(u, 0).detach()]
        results.append([loss.detach(), *info[:-1], drawn, *slopes, *energies])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_equal_classes_add_a_constant_and_no_gradient(generator):
    u, u_next = points(8, generator)
    toy = LinearGaussian()

    def f(z, t):
        return torch.stack([-part.square().sum(1) for part in z], dim=1)

    def repeated(z, t):
        return f(z, t)[:, [0, 0, 0, 1, 1, 1, 2]]

    plain, equal = network_prior(toy=toy), network_prior(COLOUR, toy=toy)
    plain.energies, equal.energies = Energies(f), Energies(repeated)
    value, slope = gradient(plain.log_density(1, u_next), u)
    value_equal, slope_equal = gradient(equal.log_density(1, u_next), u)
    torch.testing.assert_close(value_equal, value + math.log(3))
    torch.testing.assert_close(slope_equal, slope)
    given = {"labels": torch.tensor([[0], [1], [2], [-1]] * 2)}
    _, slope_labelled = gradient(equal.log_density(1, u_next, **given), u)
    torch.testing.assert_close(slope_labelled, slope)


@pytest.mark.parametrize("energy_scale", ["none", "step"])
def test_the_gradient_at_a_label_is_that_of_its_own_logit(energy_scale, seed, generator):
    prior = network_prior(COLOUR, SHAPE, seed=seed, energy_scale=energy_scale)
    u, u_next = points(6, generator)
    labels = torch.tensor([[0, 1], [1, 0], [2, 1], [0, 0], [1, 1], [2, 0]])
    rows = torch.arange(6)

    def own_logits(u):
        (a, b, c), scale = by_hand(prior, u, 0)
        return ((a + b)[rows, labels[:, 0]] + c[rows, labels[:, 1]]) / scale

    def with_softmax(u):
        (a, b, c), scale = by_hand(prior, u, 0)
        marginal = (a + b).logsumexp(1) + c.logsumexp(1)
        log_p = (a + b).log_softmax(1)[rows, labels[:, 0]]
        return (marginal + log_p + c.log_softmax(1)[rows, labels[:, 1]]) / scale

    def ours(u):
        gaussian = prior.log_density(0, u_next, zero_energy=True)(u)
        return prior.log_density(0, u_next, labels=labels)(u) - gaussian

    expected = gradient(own_logits, u)
    for function in (with_softmax, ours):
        for got, want in zip(gradient(function, u), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


# --- how the columns become F^, F[y] and the classifier


def test_the_marginal_energy_sums_inside_one_log_sum_exp_per_attribute(seed, generator):
    prior = network_prior(COLOUR, seed=seed)
    u, u_next = points(5, generator)
    (a, b, c), _ = by_hand(prior, u, 0)
    torch.testing.assert_close(prior.energy(u, 0), -((a + b).logsumexp(1) + c[:, 0]))
    own = -torch.stack([a.logsumexp(1), b.logsumexp(1), c[:, 0]], dim=1)
    torch.testing.assert_close(prior.layer_energy(u, 0), own)
    (logits,) = prior.class_logits(u)
    torch.testing.assert_close(logits.softmax(1), (a + b).softmax(1))
    gaussian = prior.log_density(0, u_next, zero_energy=True)(u)
    torch.testing.assert_close(prior.log_density(0, u_next)(u), gaussian - prior.energy(u, 0))


def test_each_coupled_layer_is_a_classifier_of_its_own_where_asked(seed, generator):
    prior = network_prior(COLOUR, seed=seed, per_layer_classes=True)
    u, u_next = points(3, generator)
    (a, b, c), _ = by_hand(prior, u, 0)
    torch.testing.assert_close(prior.energy(u, 0), -(a.logsumexp(1) + b.logsumexp(1) + c[:, 0]))
    gaussian = prior.log_density(0, u_next, zero_energy=True)(u)
    labelled = prior.log_density(0, u_next, labels=torch.tensor([[0], [1], [2]]))(u) - gaussian
    torch.testing.assert_close(labelled, (a + b)[range(3), [0, 1, 2]] + c[:, 0])


def test_attributes_add_and_an_unspecified_one_is_summed_over(seed, generator):
    prior = network_prior(COLOUR, SHAPE, seed=seed)
    u, u_next = points(4, generator)
    (a, b, c), _ = by_hand(prior, u, 0)
    colour = a + b
    labels = torch.tensor([[1, 0], [2, -1], [-1, 1], [-1, -1]])
    expected = torch.stack(
        [
            colour[0, 1] + c[0, 0],
            colour[1, 2] + c[1].logsumexp(0),
            colour[2].logsumexp(0) + c[2, 1],
            colour[3].logsumexp(0) + c[3].logsumexp(0),
        ]
    )
    gaussian = prior.log_density(0, u_next, zero_energy=True)(u)
    got = prior.log_density(0, u_next, labels=labels)(u) - gaussian
    torch.testing.assert_close(got, expected)


def test_no_label_is_the_marginal_bit_for_bit(seed, generator):
    prior = network_prior(COLOUR, SHAPE, seed=seed)
    u, u_next = points(4, generator)
    free = torch.full((4, 2), -1)
    marginal = gradient(prior.log_density(0, u_next), u)
    for got, want in zip(
        gradient(prior.log_density(0, u_next, labels=free), u), marginal, strict=True
    ):
        assert torch.equal(got, want)


def test_guidance_goes_from_the_marginal_through_the_label_and_on(seed, generator):
    prior = network_prior(COLOUR, SHAPE, seed=seed)
    u, u_next = points(4, generator)
    labels = torch.tensor([[0, 0], [1, 1], [2, -1], [-1, 1]])

    def density(g):
        return prior.log_density(0, u_next, labels=labels, guidance=g)(u)

    marginal = prior.log_density(0, u_next)(u)
    log_p = prior.log_density(0, u_next, labels=labels)(u) - marginal
    assert (log_p < 0).all()
    torch.testing.assert_close(density(0.0), marginal, rtol=0, atol=1e-12)
    torch.testing.assert_close(density(2.5), marginal + 2.5 * log_p)


def test_labels_act_at_the_last_steps_alone(seed):
    prior = network_prior(COLOUR, seed=seed, max_T=4, label_steps=2)
    labels = torch.tensor([[0], [1], [2], [-1]])

    def states(**given):
        found = {}
        generator = torch.Generator().manual_seed(seed)
        prior.sample_u(4, generator=generator, callback=found.__setitem__, **given)
        return found

    free, steered = states(), states(labels=labels)
    assert all(torch.equal(free[k], steered[k]) for k in (4, 3, 2))
    assert not (free[1] == steered[1])[:3].any()
    assert torch.equal(free[0][3], steered[0][3]), "the sample without a label"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(4, dtype=torch.long), r"expected \(4, 1\)"),
        (torch.zeros(3, 1, dtype=torch.long), r"shape \(3, 1\)"),
        (torch.zeros(4, 1), "float"),
    ],
)
def test_labels_of_another_shape_are_refused(labels, message, generator):
    prior = network_prior(COLOUR)
    with pytest.raises(ValueError, match=message):
        prior.log_density(0, points(4, generator)[0], labels=labels)


def test_labels_for_a_prior_without_attributes_are_refused(generator):
    with pytest.raises(ValueError, match="without attributes"):
        network_prior().log_density(
            0, points(4, generator)[0], labels=torch.zeros(4, 1, dtype=torch.long)
        )


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ([COLOUR, Attribute("size", 2, (1,))], "layer 1 is coupled to 'colour' and 'size'"),
        ([Attribute("size", 2, (3,))], "layers 0 .top. to 2"),
        ([Attribute("size", 0, (1,))], "0 classes"),
        ([Attribute("size", 2, ())], "no layers"),
        ([SHAPE, Attribute("shape", 2, (0,))], "twice"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(attributes, message):
    with pytest.raises(ValueError, match=message):
        Coupling(3, attributes)


# --- the learning signal


def contrast(prior, u, t, labels, **given):
    """Loss of u against itself moved a little: the energies' part does not depend on labels."""
    negative = u + 0.1
    with_labels, info = prior.contrast(u, negative, t, labels=labels, **given)
    without, _ = prior.contrast(u, negative, t)
    return with_labels - without, info


@pytest.mark.parametrize("energy_scale", ["none", "step"])
def test_cross_entropy_counts_where_t_is_0_and_a_label_is_given(energy_scale, seed, generator):
    prior = network_prior(COLOUR, SHAPE, seed=seed, energy_scale=energy_scale)
    u, _ = points(6, generator)
    t = torch.tensor([0, 0, 0, 1, 2, 0])
    labels = torch.tensor([[0, 1], [2, -1], [-1, -1], [1, 0], [2, 1], [-1, 0]])
    colour, shape = (x.log_softmax(1) for x in prior.class_logits(u))
    expected = -(colour[0, 0] + shape[0, 1] + colour[1, 2] + shape[5, 0]) / 6
    if energy_scale == "step":
        expected = expected / prior.step_sizes[0]
    for weight in (1.0, 0.3):
        added, info = contrast(prior, u, t, labels, label_weight=weight)
        torch.testing.assert_close(added, weight * expected)
        assert int(info.classified[1]) == 4
    hits = [
        int(colour[0].argmax() == 0),
        int(shape[0].argmax() == 1),
        int(colour[1].argmax() == 2),
        int(shape[5].argmax() == 0),
    ]
    assert int(info.classified[0]) == sum(hits)


@pytest.mark.parametrize("t", [1, 0], ids=["no t = 0", "no labels"])
def test_a_batch_without_a_labelled_clean_sample_has_no_cross_entropy(t, seed, generator):
    prior = network_prior(COLOUR, seed=seed)
    u, _ = points(3, generator)
    labels = torch.full((3, 1), 2 if t else -1)
    loss, info = prior.contrast(u, u + 1, torch.full((3,), t), labels=labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in prior.energies.parameters())
    assert info.classified.tolist() == [0, 0]
    assert torch.equal(loss, prior.contrast(u, u + 1, torch.full((3,), t))[0])


def test_the_chains_of_training_do_not_see_the_labels(seed, generator):
    prior = network_prior(COLOUR, seed=seed)
    u, _ = points(16, generator)
    spread = [
        prior.loss(u, generator=torch.Generator().manual_seed(seed), **given)[1].u_std
        for given in ({}, {"labels": torch.randint(3, (16, 1), generator=generator)})
    ]
    assert torch.equal(*spread)


# --- (4): linear logits, where pi(u_0 | y, u_1) is a known Gaussian


class LinearLogits:
    """f_i[y] = w_y'z_i - b/2 |z_i|^2 at the coupled layers 0 and 1, -b/2 |z_2|^2 at layer 2.

    pi(u_0 | y, u_1) = N(P^-1 h, P^-1), P = b M'M + (1 + k) I, h = M'(w_y - b m) + pull u_1.
    """

    def __init__(self, seed, b2, energy_scale="none", b=0.7):
        g = torch.Generator().manual_seed(seed)
        self.toy = LinearGaussian(seed=seed)
        self.w = torch.randn(3, 7, generator=g, dtype=torch.float64)
        self.w[:, 4:] = 0  # layer 2 does not know the class
        self.b = b
        self.prior = network_prior(COLOUR, toy=self.toy, b2=b2, energy_scale=energy_scale)
        self.prior.energies = Energies(self.f).eval()
        s, t = self.prior.schedule, 0
        a, s2 = s.alpha[t + 1], s.sigma[t + 1] ** 2
        self.pull, M = a / s2, self.toy.M
        self.P = b * M.T @ M + (1 + a**2 / s2) * torch.eye(7).double()

    def f(self, z, t):
        square = torch.stack([-0.5 * self.b * part.square().sum(1) for part in z], dim=1)
        linear = [part @ w.T for part, w in zip(z, self.toy.layout.split(self.w), strict=True)]
        columns = [square[:, i, None] + linear[i] for i in (0, 1)]
        columns = torch.cat([*columns, square[:, 2:]], dim=1)
        return columns * self.prior.scale(t, columns)

    def mean(self, u_next, y):
        h = (self.w[y] - self.b * self.toy.m) @ self.toy.M + self.pull * u_next
        return torch.linalg.solve(self.P, h.T).T


@pytest.mark.parametrize("energy_scale", ["none", "step"])
def test_with_linear_logits_the_labelled_chain_is_an_exact_recursion(
    energy_scale, seed, generator
):
    case, num_steps = LinearLogits(seed, 0.05, energy_scale), 25
    _, u_next = points(3, generator)
    labels = torch.tensor([[0], [1], [2]])
    noise = [torch.zeros_like(u_next)] * num_steps
    u = case.prior.reverse(0, u_next, labels=labels, num_steps=num_steps, noise=noise)
    B = torch.eye(7).double() - case.prior.step_sizes[0] / 2 * case.P
    mu = case.mean(u_next, labels[:, 0])
    expected = mu + (u_next - mu) @ torch.linalg.matrix_power(B, num_steps).T
    torch.testing.assert_close(u, expected, rtol=0, atol=1e-10)


def test_with_linear_logits_the_labelled_chain_settles_at_the_exact_gaussian(seed, generator):
    n, case = 6000, LinearLogits(seed, 0.15)
    e2 = case.prior.step_sizes[0]
    num_steps = math.ceil(2 * 7 / (e2 * torch.linalg.eigvalsh(case.P).min()))
    u_next = points(1, generator)[0].expand(3 * n, 7)
    labels = torch.arange(3).repeat_interleave(n).unsqueeze(1)
    u = case.prior.reverse(0, u_next, labels=labels, num_steps=num_steps, generator=generator)
    C = torch.linalg.inv(case.P @ (torch.eye(7).double() - e2 / 4 * case.P))
    for y, part in enumerate(u.split(n)):
        error = part.mean(0) - case.mean(u_next[:1], torch.tensor([y]))[0]
        assert (error.abs() <= 5 * (C.diag() / n).sqrt()).all()
        assert (part.T.cov() - C).norm() / C.norm() <= 0.09  # .05 of the contract is for 20,000


# --- (5): the optimum of a mixture, and what it samples


def oracle_prior(**changes):
    """The exact F[y] of the eight modes with their four corners as classes."""
    toy = EightModes()
    settings = SMALL | {"num_steps": 30} | changes
    attributes = (Attribute("corner", 4, (1,)),)
    prior = EBMPrior(toy, PriorConfig(toy.layout.shapes, attributes=attributes, **settings))
    prior.energies = Energies(toy.oracle(prior.schedule, 4))
    return prior


@pytest.mark.parametrize("t", [0, 1, 2])
def test_with_the_optimal_logits_pi_is_the_true_reverse_conditional_with_its_class(t, generator):
    prior = oracle_prior(last_step_kernel=True)
    s, means = prior.schedule, prior.backbone.means
    u, u_next = points(40, generator, dim=4)
    u_next = u_next[:1].expand(40, 4)
    y = torch.arange(40) % 4
    std = (0.09 * s.alpha_bar[t] ** 2 + s.sigma_bar[t] ** 2).sqrt()
    modes = torch.distributions.Normal(s.alpha_bar[t] * means, std)
    log_joint = modes.log_prob(u.unsqueeze(1)).sum(2).unflatten(1, (2, 4)).logsumexp(1)
    kernel = torch.distributions.Normal(s.alpha[t + 1] * u, s.sigma[t + 1])
    log_kernel = kernel.log_prob(u_next).sum(1)
    labelled = prior.log_density(t, u_next, labels=y.unsqueeze(1))(u)
    constant = labelled - log_joint[range(40), y] - log_kernel  # the same for every class
    torch.testing.assert_close(constant, constant[:1].expand(40), rtol=0, atol=1e-10)
    marginal = prior.log_density(t, u_next)(u) - log_joint.logsumexp(1) - log_kernel
    torch.testing.assert_close(marginal, constant, rtol=0, atol=1e-10)
    torch.testing.assert_close(prior.class_logits(u, t)[0].softmax(1), log_joint.softmax(1))


# The contract's numbers, of one draw each. Over twelve seeds here: N = 3, t = 0: agreement .997,
# distance .0093 +- .0030; N = 6, t = 0: .757 +- .012, .182 +- .0065; N = 6, t = 0, 1, 2: .998,
# .0051 +- .0028. Tolerances are 4 such deviations, of two draws where the row is far from 0.
EXACT = (0.99, 1.0)
ORACLE = {
    "N=3, t=0, K=30": ({}, EXACT, 0.005, 0.012),
    "N=3, t=0,1, K=30": ({"label_steps": 2}, EXACT, 0.001, 0.009),
    "N=3, all t, K=30": ({"label_steps": 3}, EXACT, 0.005, 0.009),
    "N=6, t=0, K=30": ({"max_T": 6}, (0.77 - 0.038, 0.77 + 0.038), 0.196, 0.037),
    "N=6, t=0,1,2, K=30": ({"max_T": 6, "label_steps": 3}, EXACT, 0.006, 0.009),
}
LONG = {"N=3, t=0, K=300": ({"num_steps": 300}, EXACT, 0.010, 0.012)}


@pytest.mark.parametrize(
    ("changes", "between", "distance", "tolerance"),
    [
        *(pytest.param(*row, id=name) for name, row in ORACLE.items()),
        *(pytest.param(*row, id=name, marks=pytest.mark.slow) for name, row in LONG.items()),
    ],
)
def test_the_oracle_samples_the_class_it_is_asked_for(
    changes, between, distance, tolerance, generator
):
    n, prior = 500, oracle_prior(**changes)
    means = prior.backbone.means
    y = torch.arange(4).repeat_interleave(n)
    u = prior.sample_u(4 * n, generator=generator, labels=y.unsqueeze(1))
    nearest = torch.cdist(u, means).argmin(1) % 4
    assert between[0] <= float((nearest == y).double().mean()) <= between[1]
    distances = []
    for k, part in enumerate(u.split(n)):
        mode = k + 4 * torch.randint(2, (n,), generator=generator)
        noise = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        distances.append(energy_distance(part, means[mode] + 0.3 * noise))
    assert abs(sum(distances) / 4 - distance) <= tolerance


def test_without_labels_the_conditional_oracle_ends_at_the_truth(generator):
    prior = oracle_prior()
    u = prior.sample_u(3000, generator=generator)
    assert energy_distance(u, prior.backbone.draw(3000, generator)) <= 0.002


@pytest.mark.slow
def test_a_learned_conditional_prior_obeys_the_label(generator):
    """The toy learned with both layers coupled; chance is 25%."""
    toy = EightModes()
    toy.means = toy.means.float()
    config = PriorConfig(
        toy.layout.shapes,
        attributes=(Attribute("corner", 4, (0, 1)),),
        **(SMALL | {"width": 96, "depth": 1, "num_steps": 20, "b2": 0.15, "spectral_norm": False}),
    )
    prior = EBMPrior(toy, config)
    average = copy.deepcopy(prior)
    optimizer = torch.optim.Adam(prior.energies.parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 600)
    for _ in range(600):
        mode = torch.randint(8, (256,), generator=generator)
        u = toy.means[mode] + 0.3 * torch.randn(256, 4, generator=generator)
        loss, _ = prior.loss(u, generator=generator, labels=(mode % 4).unsqueeze(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        decay.step()
        with torch.no_grad():
            for slow, live in zip(
                average.energies.parameters(), prior.energies.parameters(), strict=True
            ):
                slow.lerp_(live, 0.02)
    y = torch.arange(4).repeat_interleave(250)
    u = average.sample_u(1000, generator=generator, labels=y.unsqueeze(1))
    nearest = torch.cdist(u, toy.means).argmin(1) % 4
    assert (nearest == y).double().mean() > 0.8
