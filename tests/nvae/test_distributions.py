"""Closed forms: distributions of latents and pixels sum to one, agree with torch's, and sample."""

from __future__ import annotations

import math

import pytest
import torch

from nvae.distributions import (
    Bernoulli,
    MixtureOfLogistics,
    Normal,
    NormalDecoder,
    standard_uniform,
)
from nvae.losses import reconstruction_loss


def test_normal_agrees_with_torch(generator: torch.Generator) -> None:
    raw = torch.randn(4, 2, 50, generator=generator, dtype=torch.float64)
    q, p = Normal.from_raw(raw[0], raw[1]), Normal.from_raw(raw[2], raw[3])
    other = [torch.distributions.Normal(n.mean, n.std) for n in (q, p)]
    x = q.sample(generator)
    torch.testing.assert_close(q.log_prob(x), other[0].log_prob(x))
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(*other))
    noise = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(q.standardise(q.sample(noise=noise)), noise)


def test_the_temperature_multiplies_after_the_floor() -> None:
    zero = torch.zeros(1)
    assert Normal.from_raw(zero, zero).std.item() == pytest.approx(1.01)
    assert Normal.from_raw(zero, zero, 0.7).std.item() == pytest.approx(0.707)
    assert Normal.from_raw(zero + 99, zero - 99).std.item() == pytest.approx(math.exp(-5) + 0.01)


def test_the_same_cpu_generator_gives_the_same_noise_each_time() -> None:
    normal = Normal(torch.zeros(3), torch.ones(3))
    a, b = (normal.sample(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(a, b)


def test_uniform_noise_stays_away_from_its_ends(generator: torch.Generator) -> None:
    noise = standard_uniform((100_000,), torch.zeros(1), generator)
    assert noise.min() >= 1e-5
    assert noise.max() <= 1 - 0.9e-5


@pytest.mark.parametrize("levels", [17, 32])
def test_grey_probabilities_of_all_levels_sum_to_one(
    generator: torch.Generator, levels: int
) -> None:
    logits = torch.randn(1, 9, 1, levels, generator=generator, dtype=torch.float64)
    logits = logits[..., :1].expand(-1, -1, -1, levels)
    x = torch.arange(levels, dtype=torch.float64).view(1, 1, 1, -1) / (levels - 1)
    log_prob = MixtureOfLogistics(logits, levels, channels=1).log_prob(x)
    assert log_prob.shape == (1, 1, levels)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_colour_probabilities_of_all_levels_sum_to_one(generator: torch.Generator) -> None:
    levels = 8  # 512 colours; D = 7
    values = torch.arange(levels, dtype=torch.float64) / (levels - 1)
    x = torch.cartesian_prod(values, values, values).T.reshape(1, 3, 1, -1)
    logits = torch.randn(1, 20, 1, 1, generator=generator, dtype=torch.float64)
    output = MixtureOfLogistics(logits.expand(-1, -1, -1, x.shape[-1]), levels)
    # Not exactly: below 1e-5 a bin's probability is its density times its width.
    assert float(output.log_prob(x).exp().sum()) == pytest.approx(1, abs=1e-4)


def test_grey_samples_follow_the_mixture(generator: torch.Generator) -> None:
    """Two narrow components at -0.5 and 0.5 with weights 1/4 and 3/4."""
    parameters = torch.tensor([0.0, math.log(3), -0.5, 0.5, -5, -5])
    logits = parameters.view(1, 6, 1, 1).expand(4000, -1, 1, 1)
    output = MixtureOfLogistics(logits, 17, channels=1)
    upper = (output.sample(generator=generator) > 0.5).float()
    assert upper.shape == (4000, 1, 1, 1)
    error = math.sqrt(0.25 * 0.75 / 4000)
    assert abs(float(upper.mean()) - 0.75) < 4 * error
    assert float(output.mean()[0]) == pytest.approx((0.25 * -0.5 + 0.75 * 0.5) / 2 + 0.5)


def test_a_pixel_temperature_below_one_adds_noise(generator: torch.Generator) -> None:
    logits = torch.zeros(1, 10, 8, 8)
    logits[:, 4:7] = -3
    output = MixtureOfLogistics(logits)
    noise = (torch.full((1, 1, 8, 8), 0.5), torch.rand(1, 3, 8, 8, generator=generator))
    noise[1].clamp_(1e-5, 1 - 1e-5)
    spread = [float(output.sample(t, noise=noise).std()) for t in (1.0, 0.5)]
    assert spread[1] > spread[0]


def test_mixture_log_prob_has_finite_gradients_everywhere() -> None:
    logits = torch.zeros(3, 10, 4, 4)
    logits[1] = 60
    logits[2] = -60
    logits.requires_grad_()
    x = torch.linspace(0, 1, 3 * 3 * 16).view(3, 3, 4, 4)
    MixtureOfLogistics(logits).log_prob(x).sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_mixture_refuses_a_number_of_channels_it_cannot_split() -> None:
    with pytest.raises(ValueError, match="11 channels, expected a multiple of 10"):
        MixtureOfLogistics(torch.zeros(1, 11, 2, 2))
    with pytest.raises(ValueError, match="only a mixture takes two"):
        NormalDecoder(torch.zeros(1, 6, 2, 2)).sample(noise=(torch.zeros(1), torch.zeros(1)))


def test_bernoulli_agrees_with_torch_and_samples_its_mean(generator: torch.Generator) -> None:
    logits = torch.randn(2000, 1, 4, 4, generator=generator)
    output, other = Bernoulli(logits), torch.distributions.Bernoulli(logits=logits)
    x = output.sample(generator=generator)
    assert set(x.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(output.log_prob(x), other.log_prob(x))
    error = math.sqrt(float((output.mean() * (1 - output.mean())).mean()) / x.numel())
    assert abs(float((x - output.mean()).mean())) < 4 * error


def test_reconstruction_loss_sums_what_the_border_leaves() -> None:
    output = Bernoulli(torch.zeros(2, 1, 8, 8))
    loss = reconstruction_loss(output, torch.ones(2, 1, 8, 8), border=2)
    torch.testing.assert_close(loss, torch.full((2,), 16 * math.log(2)))


def test_gaussian_decoder_is_a_density_of_twice_x_minus_one() -> None:
    logits = torch.zeros(1, 6, 1, 1)
    decoder = NormalDecoder(logits)
    expected = torch.distributions.Normal(0, 1.01).log_prob(torch.tensor(0.5))
    x = torch.full((1, 3, 1, 1), 0.75)
    torch.testing.assert_close(decoder.log_prob(x), expected.expand(1, 3, 1, 1))
    torch.testing.assert_close(decoder.mean(), torch.full((1, 3, 1, 1), 0.5))
