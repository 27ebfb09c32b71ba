import pytest
import torch

from ebm_prior.fitted import FittedGaussian


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
