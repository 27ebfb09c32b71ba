"""Distances between features: closed forms, SciPy's matrix root, files of statistics."""

import math

import numpy as np
import pytest
import torch
from scipy import linalg

from nvae import metrics
from nvae.metrics import Statistics, frechet_distance


def test_the_frechet_distance_is_that_of_scipys_matrix_root(generator):
    mixing = torch.randn(8, 8, generator=generator)
    a = torch.randn(300, 8, generator=generator) @ mixing
    b = torch.randn(200, 8, generator=generator) * 2 + 1
    mean = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    root = linalg.sqrtm(cov_a @ cov_b).real
    expected = mean + np.trace(cov_a + cov_b - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_fewer_images_than_features_are_no_trouble(generator):
    a, b = (torch.rand(30, 64, generator=generator) ** 2 * scale for scale in (1, 1.5))
    cov_a, cov_b = (np.cov(x.double().numpy(), rowvar=False) for x in (a, b))
    half = linalg.sqrtm(cov_a + 1e-13 * np.eye(64)).real
    root = np.sqrt(np.linalg.eigvalsh(half @ cov_b @ half).clip(0)).sum()
    mean = ((a.double().mean(0) - b.double().mean(0)) ** 2).sum().item()
    expected = mean + np.trace(cov_a) + np.trace(cov_b) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)


def test_a_set_is_at_distance_zero_from_itself_and_a_shift_counts_squared(generator):
    a = torch.randn(100, 4, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(a, a + 3) == pytest.approx(4 * 9, rel=1e-5)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (torch.zeros(5, 3), "are of 4 features .* others of 3"),
        (torch.full((5, 4), float("nan")), "not finite"),
        (torch.zeros(1, 4), "N >= 2"),
    ],
)
def test_features_that_do_not_fit_are_refused(features, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(torch.randn(5, 4), features)


def test_the_kernel_distance_of_all_images_is_the_unbiased_estimate(generator):
    a = torch.randn(40, 6, generator=generator)
    b = torch.randn(40, 6, generator=generator) + 0.5

    def kernel(x, y):
        return (x.double() @ y.double().T / 6 + 1) ** 3

    within = [(k.sum() - k.trace()) / (40 * 39) for k in (kernel(a, a), kernel(b, b))]
    expected = within[0] + within[1] - 2 * kernel(a, b).mean()
    mean, deviation = metrics.kernel_distance(a, b)
    assert mean == pytest.approx(expected.item(), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_the_inception_score_runs_from_one_to_the_number_of_classes(generator):
    assert metrics.inception_score(torch.zeros(100, 8))[0] == pytest.approx(1)
    certain = 100 * torch.eye(4).repeat(100, 1)
    mean, _ = metrics.inception_score(certain)
    assert 3.5 < mean <= 4
    with pytest.raises(ValueError, match="needs 20"):
        metrics.inception_score(torch.zeros(19, 8))


def test_only_fids_own_features_are_called_fid():
    assert [metrics.key("fid", label) for label in ("2048", "768", "random-0123")] == [
        "fid",
        "fid_768",
        "fid_random",
    ]


def test_torchs_generator_is_left_alone(generator, monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 20)
    a = torch.randn(50, 3, generator=generator)
    state = torch.get_rng_state()
    first = metrics.kernel_distance(a, a + 1, seed=1)
    assert first == metrics.kernel_distance(a, a + 1, seed=1)
    assert first != metrics.kernel_distance(a, a + 1, seed=2)
    assert torch.equal(state, torch.get_rng_state())


# --- files


def test_statistics_come_back_from_their_file(generator, tmp_path):
    features = torch.randn(50, 5, generator=generator)
    made = Statistics.of(features, label="768", sample=features[:9], protocol={"num_images": 50})
    metrics.write(tmp_path / "s.npz", made)
    back = metrics.read(tmp_path / "s.npz")
    assert torch.equal(back.mean, made.mean)
    assert torch.equal(back.covariance, made.covariance)
    assert torch.equal(back.sample, features[:9])
    assert (back.label, back.protocol) == ("768", {"num_images": 50})
    with np.load(tmp_path / "s.npz") as file:  # as the field's programs read them
        np.testing.assert_allclose(file["sigma"], np.cov(features.numpy().T), rtol=1e-5)


def test_the_fields_files_of_mu_and_sigma_are_read(generator, tmp_path):
    features = torch.randn(50, 5, generator=generator).double().numpy()
    np.savez(tmp_path / "s.npz", mu=features.mean(0), sigma=np.cov(features.T))
    back = metrics.read(tmp_path / "s.npz")
    assert (back.label, back.sample) == (None, None)
    distance = metrics.frechet(back, Statistics.of(torch.from_numpy(features) + 1))
    assert distance == pytest.approx(5)
    np.savez(tmp_path / "fid.npz", mu=np.zeros(2048), sigma=np.eye(2048, dtype=np.float32))
    assert metrics.read(tmp_path / "fid.npz").label == "2048"


def test_statistics_of_other_features_are_refused():
    one = Statistics(torch.zeros(3), torch.eye(3), "random-aaa")
    with pytest.raises(ValueError, match=r"random-aaa.*random-bbb.*same --features"):
        metrics.check_same_features(one, "random-bbb", 3)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "no npz of mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.eye(2)}, r"expected \(F,\) and \(F, F\)"),
        ({"mu": np.zeros(2), "sigma": np.full((2, 2), math.nan)}, "not finite"),
    ],
)
def test_damaged_statistics_are_one_line(arrays, message, tmp_path):
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        metrics.read(tmp_path / "s.npz")
    (tmp_path / "s.npz").write_bytes(b"PK and no more")
    with pytest.raises(ValueError, match="write it again"):
        metrics.read(tmp_path / "s.npz")
