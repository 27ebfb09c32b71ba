"""What the optional fifth method of a backbone, `moments(z)`, gives: log p_beta(z), and a walk.

Needed by the baselines that look at single layers: `ncp.py` and the variants of `joint.py`.
z_{>i} in formulas is z above layer i in the paper's numbers, which grow towards the top; our lists
are top first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from ebm_prior.backbones.base import Backbone, BackboneWithMoments, Moments


def with_moments(backbone: Backbone, purpose: str) -> BackboneWithMoments:
    """The backbone, if it has the optional method.

    Raises:
        ValueError: it has not; `purpose` says what asked.
    """
    if not callable(getattr(backbone, "moments", None)):
        raise ValueError(
            f"{purpose} needs the mean and deviation of every layer's prior, but"
            f" {type(backbone).__name__} has no method moments(z); add it (see"
            " ebm_prior.backbones.base.BackboneWithMoments)"
        )
    return cast(BackboneWithMoments, backbone)


def log_prior(z: Sequence[Tensor], moments: Sequence[Moments]) -> Tensor:
    r"""(B,): the VAE's own density of z, with the moments computed from this very z.

    .. math:: \log p_\beta(z) = \sum_i \log N(z_i; \mu_i(z_{>i}), \sigma_i(z_{>i}))
    """
    u = torch.cat(
        [((part - m.mean) / m.std).flatten(1) for part, m in zip(z, moments, strict=True)], dim=1
    )
    return -0.5 * u.square().sum(1) - log_std(moments) - 0.5 * u.shape[1] * math.log(2 * math.pi)


def log_std(moments: Sequence[Moments]) -> Tensor:
    """(B,): sum over layers and coordinates of log sigma_i, the log-determinant of T."""
    return torch.cat([m.std.flatten(1) for m in moments], dim=1).log().sum(1)


def smallest_std(moments: Sequence[Moments]) -> float:
    """The smallest sigma of all layers and samples."""
    return min(float(m.std.min()) for m in moments)


def ancestral(
    backbone: BackboneWithMoments, like: Tensor, choose: Callable[[int, Moments], Tensor]
) -> Tensor:
    """Walk from the top: `choose` gets a layer and its moments and gives its u_i, (B, *shape).

    The protocol has no walk that can be entered halfway, so this asks for the moments of all
    layers once per layer, with the lower ones still zero: L calls of a function that costs L
    layers, cheap beside Langevin steps through all layers, and the same for every backbone.

    Args:
        like: (B, D), for the number of samples, the device and the precision.

    Returns:
        u, (B, D).
    """
    z = backbone.layout.split(torch.zeros_like(like))
    u: list[Tensor] = []
    for i in range(len(z)):
        with torch.no_grad():
            layer = backbone.moments(z)[i]
        u.append(choose(i, layer))
        z[i] = layer.mean + layer.std * u[i]
    return backbone.layout.join(u)
