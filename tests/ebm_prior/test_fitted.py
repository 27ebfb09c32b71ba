import pytest
import torch

from ebm_prior import checkpoint, fitted
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.config import PriorConfig
from ebm_prior.fitted import FittedGaussian, FittedPrior, low_rank, principal_directions
from ebm_prior.latents import Layout
from tests.ebm_prior import small_vaes


class Flat:
    """z = u, in two layers."""

    def __init__(self, dim):
        self.layout = Layout(((1,), (dim - 1,)))


def fit(u, rank=0):
    backbone = Flat(u.shape[1])
    return FittedPrior.fit(
        backbone, PriorConfig(backbone.layout.shapes, kind="fitted", rank=rank), u
    )


def covariance(prior):
    g = prior.gaussian
    low = g.factor @ g.factor.T
    return low if g.diagonal is None else low + g.diagonal.diag()


def draws(n, C, generator, mean=0.0):
    noise = torch.randn(n, len(C), generator=generator, dtype=torch.float64)
    return mean + noise @ torch.linalg.cholesky(C).T


def spiked(dim, generator, strengths=(4.0, 2.0)):
    """Directions of variance 1 + strength in white noise."""
    square = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    v = torch.linalg.qr(square).Q[:, : len(strengths)]
    return torch.eye(dim).double() + v @ torch.tensor(strengths).double().diag() @ v.T


def test_draws_have_the_mean_and_covariance_of_the_data(generator):
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.5, 0.0], [-0.3, 0.2, 1.5]])
    u = torch.randn(4000, 3, generator=generator) @ factor.T + torch.tensor([1.0, -2.0, 0.5])
    num = 40000
    draws = FittedGaussian(u).sample(num, generator)
    deviation = u.std(0)
    assert ((draws.mean(0) - u.mean(0)).abs() < 4 * deviation / num**0.5).all()
    # The standard error of a covariance is at most sqrt(2) times the product of the deviations.
    bound = 4 * (2 / num) ** 0.5 * torch.outer(deviation, deviation)
    assert ((draws.T.cov() - u.T.cov()).abs() < bound).all()


@pytest.mark.parametrize(
    ("u", "message"),
    [
        (torch.zeros(3, 3), "needs more than D draws"),
        (torch.full((9, 2), float("nan")), "not finite"),
    ],
)
def test_bad_draws_are_refused(u, message):
    with pytest.raises(ValueError, match=message):
        FittedGaussian(u)


# --- the prior -----------------------------------------------------------------------------------


def test_the_full_fit_is_the_fitted_gaussians(generator):
    u = draws(400, spiked(5, generator), generator, mean=0.3)
    prior, plain = fit(u), FittedGaussian(u)
    assert torch.equal(prior.gaussian.mean, plain.mean)
    assert torch.equal(prior.gaussian.factor, plain.cholesky)
    states = {}
    sample = prior.sample_u(7, generator=generator, callback=states.__setitem__)
    assert list(states) == [1, 0]
    torch.testing.assert_close(sample, plain.mean + states[1] @ plain.cholesky.T)


@pytest.mark.parametrize("rank", [0, 2])
def test_energy_and_draws_are_those_of_the_fit(rank, generator):
    prior = fit(draws(400, spiked(6, generator), generator, mean=0.3), rank)
    C, n = covariance(prior), 20_000
    truth = torch.distributions.MultivariateNormal(prior.gaussian.mean, C)
    white = torch.distributions.MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double())
    u = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(prior.energy(u), white.log_prob(u) - truth.log_prob(u))
    sample = prior.sample_u(n, generator=generator)
    assert ((sample.mean(0) - truth.mean).abs() < 4 * (C.diag() / n).sqrt()).all()
    error = ((torch.outer(C.diag(), C.diag()) + C.square()) / n).sqrt()
    assert ((sample.T.cov() - C).abs() < 4 * error).all()


def test_a_low_rank_fit_finds_the_directions_and_keeps_all_variances(generator):
    C, n = spiked(8, generator), 60_000
    u = draws(n, C, generator)
    prior = fit(u, rank=2)
    torch.testing.assert_close(covariance(prior).diag(), u.var(0))
    assert ((covariance(prior) - C).abs() < 5 * C.diag().max() * (2 / n) ** 0.5 * 2).all()
    # With one direction too many, and with all but one, it is still that covariance.
    for rank in (3, 7):
        assert (covariance(fit(u, rank)) - C).norm() < 0.02 * C.norm()


def test_white_noise_in_many_dimensions_gets_no_directions(generator):
    u = torch.randn(200, 2000, generator=generator)
    x = (u - u.mean(0)).double()
    assert torch.linalg.matrix_norm(x, ord=2) ** 2 / 199 > 10, "plain PCA would find them"
    _mean, factor, _diagonal = low_rank(u, 20)
    assert factor.square().sum(0).max() < 1.5


def test_both_ways_to_the_principal_directions_are_exact(monkeypatch, generator):
    monkeypatch.setattr(fitted, "BLOCK", 7)
    for n, dim in ((12, 30), (30, 12), (12, 12)):
        u = torch.randn(n, dim, generator=generator, dtype=torch.float64)
        v = principal_directions(u, 4)
        expected = torch.linalg.svd(u - u.mean(0)).Vh[:4]
        torch.testing.assert_close(v.T @ v, torch.eye(4).double())
        torch.testing.assert_close(v @ v.T, expected.T @ expected)


def test_draws_that_never_differ_fit_a_point(generator):
    u = torch.ones(10, 20)
    prior = fit(u, rank=3)
    sample = prior.sample_u(4, generator=generator)
    torch.testing.assert_close(sample, torch.ones(4, 20), atol=0.01, rtol=0)


@pytest.mark.parametrize("rank", [0, 3])
def test_its_file_gives_the_same_pictures(rank, tmp_path, generator):
    backbone = NVAEBackbone(small_vaes.vae())
    config = PriorConfig(backbone.layout.shapes, kind="fitted", rank=rank)
    u = torch.randn(backbone.layout.dim + 10, backbone.layout.dim, generator=generator)
    prior = FittedPrior.fit(backbone, config, u)
    checkpoint.save(tmp_path / "prior.safetensors", prior)
    again = checkpoint.load(tmp_path / "prior.safetensors", backbone)
    assert isinstance(again, FittedPrior)
    assert torch.equal(again.sample(3, seed=1), prior.sample(3, seed=1))
    assert torch.equal(again.energy(u), prior.energy(u))


@pytest.mark.parametrize(
    ("rank", "damage", "message"),
    [
        (
            3,
            lambda t: t["diagonal"][:2].neg_(),
            r"2 variances .* not positive; the file is damaged",
        ),
        (3, lambda t: t["diagonal"].zero_(), "80 variances .* not positive"),
        (0, lambda t: t["factor"][1, :2].zero_(), "1 values on the Cholesky .* not positive"),
        (0, lambda t: t["factor"][0, 5:6].fill_(1.0), "not lower triangular"),
        (80, lambda t: None, "rank 80 of 80 coordinates"),
    ],
)
def test_a_file_that_is_no_covariance_is_refused(rank, damage, message, tmp_path):
    config = PriorConfig(Flat(80).layout.shapes, kind="fitted", rank=rank)
    prior = FittedPrior(Flat(80), config)
    damage(dict(prior.gaussian.named_buffers()))
    checkpoint.save(tmp_path / "prior.safetensors", prior, fingerprint="any")
    with pytest.raises(ValueError, match=message):
        checkpoint.read(tmp_path / "prior.safetensors")


def test_a_covariance_has_no_energy_of_single_layers():
    prior = FittedPrior(Flat(4), PriorConfig(Flat(4).layout.shapes, kind="fitted"))
    with pytest.raises(ValueError, match="a fitted prior has no energy of single layers"):
        prior.layer_energy(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("u", "rank", "message"),
    [
        (torch.randn(3, 4), 0, r"needs more than D draws; take more, or a low rank"),
        (torch.randn(9, 5), 5, r"above the rank 5: take more draws or a lower rank"),
        (torch.randn(7, 5), 3, r"above the rank 3"),
        (torch.full((9, 2), float("nan")), 1, "not finite"),
    ],
)
def test_draws_that_do_not_suffice_are_refused(u, rank, message):
    with pytest.raises(ValueError, match=message):
        fit(u, rank)


def test_draws_of_another_backbone_are_refused():
    config = PriorConfig(Flat(4).layout.shapes, kind="fitted")
    with pytest.raises(ValueError, match=r"expected \(N, 4\): posterior draws of this backbone"):
        FittedPrior.fit(Flat(4), config, torch.randn(9, 5))
