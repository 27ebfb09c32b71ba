"""The distribution of an HVAE's pixels given its output (contract, settings.md, "Pixel model").

Channels are independent given z, and in a mixture given its component, which they share: unlike
NVAE's, ours has no coefficients between channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.backbones.hvae.config import HVAEConfig

COMPONENTS = 5  # of the mixture


def soft_clamp(x: Tensor) -> Tensor:
    """5 tanh(x / 5)."""
    return 5 * torch.tanh(x / 5)


def parameters(config: HVAEConfig) -> int:
    """Channels of the output: what a pixel's distribution needs."""
    channels = config.image_shape[0]
    needed = {
        "gaussian": channels,
        "logistic": 2 * channels,
        "mixture": (1 + 2 * channels) * COMPONENTS,
    }
    return needed[config.likelihood]


def log_prob(config: HVAEConfig, output: Tensor, x: Tensor, log_std: Tensor | None) -> Tensor:
    r"""log p(x | z) in nats, (B,), of images (B, C, H, W) in [0, 1] on the levels.

    Of the mixture, per pixel: :math:`\log \sum_m \pi_m \prod_c p(y_c | \mu_{cm}, s_{cm})`.

    Args:
        log_std: of all pixels, before its clamp: for `gaussian`.
    """
    y, half_bin = 2 * x - 1, 1 / (config.levels - 1)
    if config.likelihood == "logistic":
        location, raw = output.chunk(2, dim=1)
        values = discretised_logistic(y, location, soft_clamp(raw), half_bin)
    elif config.likelihood == "mixture":
        weights, location, raw = _mixture(output)
        each = discretised_logistic(y[:, :, None], location, soft_clamp(raw), half_bin)
        values = torch.logsumexp(F.log_softmax(weights, dim=1) + each.sum(1), dim=1, keepdim=True)
    else:
        # The density at the level times the width of its bin: the deviation spans many bins.
        assert log_std is not None
        log_std = soft_clamp(log_std)
        values = (
            -0.5 * ((y - output) * torch.exp(-log_std)).square()
            - log_std
            - 0.5 * math.log(2 * math.pi)
            + math.log(2 * half_bin)
        )
    return values.sum(dim=(1, 2, 3))


def mean(config: HVAEConfig, output: Tensor) -> Tensor:
    """What is shown as the image, (B, C, H, W) in [0, 1]: the location.

    Of a mixture the components' mean location, as NVAE's images are made.
    """
    if config.likelihood == "mixture":
        weights, location, _ = _mixture(output)
        output = (weights.softmax(1)[:, None] * location).sum(2)
    elif config.likelihood == "logistic":
        output = output.chunk(2, dim=1)[0]
    return (output / 2 + 0.5).clamp(0, 1)


def _mixture(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, M, H, W), then locations and raw log-scales, each (B, C, M, H, W)."""
    values = output[:, COMPONENTS:].unflatten(1, (2, -1, COMPONENTS))
    return output[:, :COMPONENTS], values[:, 0], values[:, 1]


def discretised_logistic(
    y: Tensor, location: Tensor, log_scale: Tensor, half_bin: float
) -> Tensor:
    r"""Log probability of a level's bin on [-1, 1]; the first and the last bin own the tails.

    With :math:`a = (y + h - \mu) / s` and :math:`b = (y - h - \mu) / s`, exactly and without
    cancellation: :math:`\sigma(a) - \sigma(b) = \sigma(a)\,\sigma(-b)\,(1 - e^{-2h/s})`.
    """
    inverse = torch.exp(-log_scale)
    below = F.logsigmoid((y + half_bin - location) * inverse)
    above = F.logsigmoid((location - y + half_bin) * inverse)
    width = torch.log(-torch.expm1(-2 * half_bin * inverse))
    inside = below + above + width
    return torch.where(y < half_bin - 1, below, torch.where(y > 1 - half_bin, above, inside))
