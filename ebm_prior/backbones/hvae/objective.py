"""What an HVAE is trained on, the weighted evidence lower bound, and what is measured of it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.backbones.hvae.model import HVAE
from ebm_prior.seeds import seeded

MEASURE_KEY = 2**31 + 1


class Terms(NamedTuple):
    """One batch's loss and what it is made of, in nats per image; means over the batch."""

    loss: Tensor  # (), in nats per value of the image
    nll: Tensor  # ()
    kl: Tensor  # (L,), per layer


def terms(
    model: HVAE, x: Tensor, generator: torch.Generator | None, kl_weight: float, free: float
) -> Terms:
    r"""The loss of images x, (B, C, H, W) in [0, 1].

    .. math:: -\log p(x | z) + \beta \sum_{i,c} \max(\text{free}, KL_{i,c})

    with KL the batch's mean for channel c of layer i, summed over pixels.
    """
    output, kl = model(x, generator)
    nll = -model.log_prob(output, x).mean()
    channels = [layer.mean(0) for layer in kl]
    weighted = torch.cat(channels).clamp_min(free).sum()
    loss = (nll + kl_weight * weighted) / model.config.image_dims
    return Terms(loss, nll, torch.stack([layer.sum() for layer in channels]))


@torch.no_grad()
def measure(
    model: HVAE, batches: Iterable[Tensor], seed: int, precision: contextlib.AbstractContextManager
) -> dict[str, Any]:
    """Bits per value of the image, nats per image and layer: one posterior draw per image.

    Args:
        batches: images on any device; each batch has its own random numbers.
        precision: the context of the network's computations.
    """
    device = model.start.device
    sums, count = torch.zeros(len(model.config.latents) + 1, dtype=torch.float64), 0
    for number, batch in enumerate(batches):
        x = batch.to(device)
        with precision:
            found = terms(model, x, seeded(device, seed, MEASURE_KEY, number), 1.0, 0.0)
        sums += len(x) * torch.stack([found.nll, *found.kl]).double().cpu()
        count += len(x)
    nll, *kl = (sums / count).tolist()
    return {
        "images": count,
        "bits_per_dim": (nll + sum(kl)) / (model.config.image_dims * math.log(2)),
        "nll": nll,
        "kl": sum(kl),
        "kl_per_layer": kl,
    }
