"""What is shown and measured of a model while it trains; none of it changes the training.

All draws have generators of their own, so that a run that is looked at is the run that is not.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nvae.model import AutoEncoder
from nvae.seeds import seeded

TEMPERATURES = (0.7, 0.8, 0.9, 1.0)
IMAGES = 16  # per picture
_RECONSTRUCTION, _SAMPLES = 1, 2  # keys of their random numbers


def tiled(images: Tensor) -> Tensor:
    """As many of the images (N, C, H, W) as fill a square, row by row: (C, n H, n W)."""
    n = math.isqrt(len(images))
    _, c, h, w = images.shape
    square = images[: n * n].reshape(n, n, c, h, w)
    return square.permute(2, 0, 3, 1, 4).reshape(c, n * h, n * w)


def every(period: int, epoch: int, epochs: int) -> bool:
    """Whether something is due after this epoch: every so many, and at the last."""
    return epoch % period == 0 or epoch == epochs - 1


def evaluation_due(epoch: int, epochs: int) -> bool:
    return every(1 if epochs <= 50 else 20, epoch, epochs)


def checkpoint_due(epoch: int, epochs: int) -> bool:
    return every(math.ceil(epochs / 100), epoch, epochs)


def _shown(model: AutoEncoder, logits: Tensor, t: float, generator: torch.Generator) -> Tensor:
    """Pixel samples, but the mean of binary pixels."""
    output = model.decoder_output(logits)
    if model.config.data.output == "bernoulli":
        return output.mean()
    return output.sample(t, generator=generator)


@torch.no_grad()
def reconstruction(model: AutoEncoder, x: Tensor, logits: Tensor, seed: int, step: int) -> Tensor:
    """Images and what became of them, side by side."""
    generator = seeded(x.device, seed, _RECONSTRUCTION, step)
    output = _shown(model, logits[:IMAGES], 1.0, generator)
    return torch.cat([tiled(x[:IMAGES]), tiled(output)], dim=2)


@torch.no_grad()
def samples(model: AutoEncoder, temperature: float, seed: int) -> Tensor:
    """Tiled images from the prior; the same noise each time. Puts the model's mode back."""
    was_training, device = model.training, model.prior_ftr0.device
    model.eval()
    generator = seeded(device, seed, _SAMPLES)
    with torch.autocast(device.type, enabled=False):
        logits = model.sample(IMAGES, temperature, generator=generator)
        images = _shown(model, logits, temperature, generator)
    model.train(was_training)
    return tiled(images)
