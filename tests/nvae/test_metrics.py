import numpy as np
import pytest
import torch
from scipy import linalg

from nvae.metrics import frechet_distance


def test_the_frechet_distance_is_that_of_scipys_matrix_root(generator):
    mixing = torch.randn(8, 8, generator=generator)
    a = torch.randn(300, 8, generator=generator) @ mixing
    b = torch.randn(200, 8, generator=generator) * 2 + 1
    mean = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_a_set_is_at_distance_zero_from_itself_and_a_shift_counts_squared(generator):
    a = torch.randn(100, 4, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(5, 3), "are of 4 features .* others of 3"),
        (torch.full((5, 4), float("nan")), "not finite"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.randn(5, 4), features)
