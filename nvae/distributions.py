"""Distributions of the latents and of the images (contract chapter 3).

Noise is an argument: give it, or a generator to draw it from. A generator may live on another
device than the model; the same CPU generator gives the same draw everywhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


def standard_normal(
    shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """N(0, I) noise with the device and dtype of `like`, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    noise = torch.randn(shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


def standard_uniform(
    shape: tuple[int, ...] | torch.Size, like: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform noise in [1e-5, 1 - 1e-5], so that its logarithms are finite."""
    device = like.device if generator is None else generator.device
    noise = torch.rand(shape, generator=generator, device=device, dtype=like.dtype)
    return (1e-5 + noise * (1 - 2e-5)).to(like.device)


def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5): the identity near 0, never beyond 5."""
    return 5 * torch.tanh(x / 5)


@dataclass(frozen=True, eq=False)
class Normal:
    """Diagonal normal distribution given by its moments.

    `raw` holds the network outputs it was made of, if it was: a residual posterior adds to those.
    """

    mean: Tensor
    std: Tensor
    raw: tuple[Tensor, Tensor] | None = None

    @classmethod
    def from_raw(cls, mean: Tensor, log_std: Tensor, temperature: float = 1.0) -> Normal:
        r"""From the raw outputs of a network.

        .. math:: \mu = 5\tanh(m/5), \quad \sigma = t\,(e^{5\tanh(l/5)} + 0.01)

        The floor 0.01 is inside, the temperature multiplies after it.
        """
        clamped = cls(soft_clamp(mean), soft_clamp(log_std).exp() + 0.01, (mean, log_std))
        return clamped.tempered(temperature)

    def tempered(self, temperature: float) -> Normal:
        return self if temperature == 1 else Normal(self.mean, temperature * self.std)

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """mean + std * noise."""
        if noise is None:
            noise = standard_normal(self.mean.shape, self.std, generator)
        return noise * self.std + self.mean

    def standardise(self, x: Tensor) -> Tensor:
        """The noise that would give x: the inverse of `sample`."""
        return (x - self.mean) / self.std

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density, element by element."""
        return -0.5 * self.standardise(x).square() - 0.5 * math.log(2 * math.pi) - self.std.log()

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other), element by element."""
        shift, ratio = (self.mean - other.mean) / other.std, self.std / other.std
        return 0.5 * (shift.square() + ratio.square()) - 0.5 - ratio.log()


class ImageDistribution(Protocol):
    """p(x | z), for images in [0, 1]."""

    def log_prob(self, x: Tensor) -> Tensor: ...
    def sample(
        self,
        t: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...
    def mean(self) -> Tensor: ...


class Bernoulli:
    """Independent binary pixels."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def log_prob(self, x: Tensor) -> Tensor:
        """(B, 1, H, W)."""
        return -F.binary_cross_entropy_with_logits(self.logits, x, reduction="none")

    def sample(
        self,
        t: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """0 or 1 per pixel; `t` is not used. `noise` is uniform, (B, 1, H, W)."""
        uniform = _single(noise)
        if uniform is None:
            uniform = standard_uniform(self.logits.shape, self.logits, generator)
        return (uniform < self.mean()).to(self.logits.dtype)

    def mean(self) -> Tensor:
        """What upstream shows and saves as the image."""
        return torch.sigmoid(self.logits)


class NormalDecoder:
    """Gaussian pixels on [-1, 1] (`num_mixture_dec` = 1): 3 means, then 3 log-sigmas."""

    def __init__(self, logits: Tensor) -> None:
        mean, self.raw_log_std = logits.chunk(2, dim=1)
        self.normal = Normal.from_raw(mean, self.raw_log_std)

    def log_prob(self, x: Tensor, min_log_std: float | None = None) -> Tensor:
        """Log density of 2x - 1, (B, 3, H, W), without the Jacobian of that scaling.

        Args:
            min_log_std: VAEBM evaluates p(x | z) with the clamped log-sigma bounded below by -2.
        """
        normal = self.normal
        if min_log_std is not None:
            log_std = soft_clamp(self.raw_log_std).clamp_min(min_log_std)
            normal = Normal(normal.mean, log_std.exp() + 0.01)
        return normal.log_prob(2 * x - 1)

    def sample(
        self,
        t: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """A pixel sample. `noise` is normal, (B, 3, H, W).

        Upstream ignores the temperature here, which is 1.
        """
        y = self.normal.tempered(t).sample(generator, _single(noise))
        return y.clamp(-1, 1) / 2 + 0.5

    def mean(self) -> Tensor:
        """Not clamped: values may leave [0, 1]."""
        return 0.5 * self.normal.mean + 0.5


class MixtureOfLogistics:
    """Mixture of discretised logistics (PixelCNN++), of `channels` 3 or 1.

    Logits are the M mixture logits, then per channel M means, M log-scales and, with three
    channels, M coefficients by which green depends on red and blue on both: 10 M channels for
    colour. One channel, our `grey`, has no coefficients: 3 M channels.

    Args:
        levels: number of values a pixel can take.
    """

    def __init__(self, logits: Tensor, levels: int = 256, channels: int = 3) -> None:
        batch, total, height, width = logits.shape
        kinds = 3 if channels == 3 else 2  # means, log-scales[, coefficients]
        num_mix = total // (1 + channels * kinds)
        if num_mix * (1 + channels * kinds) != total:
            raise ValueError(
                f"logits have {total} channels, expected a multiple of {1 + channels * kinds}"
            )
        self.mix_logits = logits[:, :num_mix]
        values = logits[:, num_mix:].view(batch, channels, kinds, num_mix, height, width)
        self.means = values[:, :, 0]  # (B, channels, M, H, W), like the two below
        self.log_scales = values[:, :, 1].clamp_min(-7)
        self.coefficients = torch.tanh(values[:, :, 2]) if channels == 3 else None
        self.half_bin = 1 / (levels - 1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log probability of the pixels' values, all channels together: (B, H, W)."""
        y = (2 * x - 1)[:, :, None]
        means = self.means
        if self.coefficients is not None:
            c_red, c_green, c_blue = self.coefficients.unbind(1)
            red, green, _ = y.unbind(1)
            shift = [torch.zeros_like(c_red), c_red * red, c_green * red + c_blue * green]
            means = means + torch.stack(shift, dim=1)
        centred, inverse = y - means, torch.exp(-self.log_scales)
        plus = inverse * (centred + self.half_bin)
        minus = inverse * (centred - self.half_bin)
        mid = inverse * centred
        delta = torch.sigmoid(plus) - torch.sigmoid(minus)
        density = mid - self.log_scales - 2 * F.softplus(mid) + math.log(2 * self.half_bin)
        inside = torch.where(delta > 1e-5, delta.clamp_min(1e-10).log(), density)
        # The first and the last value own the tails. The limits do not depend on `levels`: with
        # 256 of them 254 counts as the last too, as upstream.
        upper = torch.where(y > 0.99, -F.softplus(minus), inside)
        lower = torch.where(y < -0.999, plus - F.softplus(plus), upper)
        return torch.logsumexp(lower.sum(1) + F.log_softmax(self.mix_logits, dim=1), dim=1)

    def sample(
        self,
        t: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """A pixel sample, not rounded to levels.

        The logistic scale is *divided* by `t`, as upstream: below 1 the pixels get noisier.

        Args:
            noise: uniform (B, M, H, W) for the component and (B, channels, H, W) for the value.
        """
        if noise is None:
            batch, channels, _, height, width = self.means.shape
            pick = standard_uniform(self.mix_logits.shape, self.mix_logits, generator)
            value = standard_uniform((batch, channels, height, width), self.mix_logits, generator)
        else:
            pick, value = noise
        chosen = (self.mix_logits / t - torch.log(-torch.log(pick))).argmax(1)
        index = chosen[:, None, None].expand(-1, self.means.shape[1], 1, -1, -1)
        logistic = torch.log(value) - torch.log(1 - value)
        x = self.means.gather(2, index).squeeze(2)
        x = x + self.log_scales.gather(2, index).squeeze(2).exp() / t * logistic
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = coefficients.gather(2, index).squeeze(2)
        return self._chain(x, coefficients)

    def mean(self) -> Tensor:
        """The image of averaged means and coefficients: not the true mean, but what FID uses."""
        weights = torch.softmax(self.mix_logits, dim=1)[:, None]
        coefficients = self.coefficients
        if coefficients is not None:
            coefficients = (coefficients * weights).sum(2)
        return self._chain((self.means * weights).sum(2), coefficients)

    @staticmethod
    def _chain(x: Tensor, coefficients: Tensor | None) -> Tensor:
        """Red, then green given red, then blue given both; each clamped; then to [0, 1]."""
        if coefficients is None:
            return x.clamp(-1, 1) / 2 + 0.5
        c_red, c_green, c_blue = coefficients.unbind(1)
        red = x[:, 0].clamp(-1, 1)
        green = (x[:, 1] + c_red * red).clamp(-1, 1)
        blue = (x[:, 2] + c_green * red + c_blue * green).clamp(-1, 1)
        return torch.stack([red, green, blue], dim=1) / 2 + 0.5


def _single(noise: Tensor | tuple[Tensor, Tensor] | None) -> Tensor | None:
    if isinstance(noise, tuple):
        raise ValueError("got two noise tensors, expected one: only a mixture takes two")
    return noise
