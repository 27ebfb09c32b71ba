r"""Hierarchical sampling: new draws for some layers, the others kept (paper, Figure 2).

A reference u* and variants v^j are whole chain samples of one prior. A panel shows one group of
layers: the group's latents come from v^j, those of all other layers from u* (`swap`, `swap_z`),
or from a reverse chain of the group alone, with the others clamped (`conditional`). What the top
decides should be coarse: `Change.low_pass_share` is the part of a change that survives
down-sampling (contract, procedures.md, section 1).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import Schedule

NUM_GROUPS = 4
LOW_PASS = 8  # the published images' down-sampling


def groups(layout: Layout, number: int = NUM_GROUPS) -> list[tuple[int, ...]]:
    """Contiguous groups of layers, top first: at most `number`, and at most one per layer.

    Of equal counts, give or take one. A hierarchy of at least four spatial scales, and not fewer
    than `number`, is cut between scales only. Where it does not come out even, the upper groups
    get one more.
    """
    if number < 1:
        raise ValueError(f"{number} groups of layers: expected at least 1")
    scales: dict[tuple[int, ...], list[int]] = {}
    for i, shape in enumerate(layout.shapes):
        scales.setdefault(shape[1:], []).append(i)
    by_scale = len(scales) >= max(NUM_GROUPS, number)
    units = list(scales.values()) if by_scale else [[i] for i in range(layout.num_layers)]
    number = min(number, len(units))
    size, longer = divmod(len(units), number)
    ends = [size * (g + 1) + min(g + 1, longer) for g in range(number)]
    return [
        tuple(i for unit in units[begin:end] for i in unit)
        for begin, end in itertools.pairwise([0, *ends])
    ]


# --- three ways to a panel


def swap(reference: Tensor, variants: Tensor, group: Tensor) -> Tensor:
    """u with the group's coordinates from the variants and all others from the reference, (n, D).

    The lower z follow the changed upper ones: their moments are computed anew.

    Args:
        reference: (D,) or (1, D).
        variants: (n, D).
        group: (D,) bool, `Layout.mask` of its layers.
    """
    return torch.where(group, variants, reference)


@torch.no_grad()
def swap_z(
    backbone: Backbone, reference: Tensor, variants: Tensor, layers: Sequence[int]
) -> Tensor:
    """The swap in z-space: the z of the other layers stay the reference's; (n, D), in u-space.

    The decoder's state is recomputed, so the u that stand for the fixed z differ from the
    reference's wherever moments of theirs depend on the group.
    """
    z = backbone.to_z(variants)
    fixed = backbone.to_z(reference.expand_as(variants))
    return backbone.to_u([z[i] if i in layers else fixed[i] for i in range(len(z))])


def conditional(
    prior: EBMPrior, reference: Tensor, num: int, group: Tensor, *, generator: torch.Generator
) -> Tensor:
    r"""The group's own reverse chain given the other layers, (num, D).

    The clamped layers follow a forward process of u*, drawn anew for each row,
    :math:`u^*_0 = u^*, \; u^*_k = \alpha_k u^*_{k-1} + \sigma_k \epsilon`; at index t they are
    held at u*_t, and the kernel sees u*_{t+1}. They end as the very bits of u*.

    Args:
        reference: u*, (D,) or (1, D), a state 0.
        group: (D,) bool, True at the coordinates to draw.
    """
    path = forward_path(reference.expand(num, -1), prior.schedule, generator)
    u = torch.where(group, langevin.standard_normal(path[-1], generator), path[-1])
    for t in reversed(range(prior.config.max_T)):
        start = torch.where(group, u, path[t])
        u = prior.reverse(t, u, init=start, mask=~group, generator=generator)
    return u


def forward_path(u: Tensor, schedule: Schedule, generator: torch.Generator) -> list[Tensor]:
    """States 0 to N of the forward process from state 0, (B, D) each."""
    states = [u]
    for alpha, sigma in zip(schedule.alpha[1:].tolist(), schedule.sigma[1:].tolist(), strict=True):
        states.append(alpha * states[-1] + sigma * langevin.standard_normal(u, generator))
    return states


# --- how much changed, and how coarsely


class Change(NamedTuple):
    """Mean squared differences per pixel and channel; averages over many panels add up."""

    pixel: float
    low_pass: float  # of the images after down-sampling by block means

    @property
    def low_pass_share(self) -> float:
        """The share of the squared change that block means keep, 0 (fine) to 1 (coarse)."""
        return self.low_pass / self.pixel if self.pixel else 0.0


def low_pass_factor(height: int, width: int) -> int:
    """8, or less for small images: four blocks a side at least."""
    return max(1, min(LOW_PASS, min(height, width) // 4))


def change(images: Tensor, reference: Tensor) -> Change:
    """How images (n, C, H, W) differ from the reference, of the same shape or (1, C, H, W)."""
    difference = (images - reference).double()
    factor = low_pass_factor(*difference.shape[-2:])
    # Whole blocks only, in both numbers, so that a share never exceeds 1.
    height, width = (side - side % factor for side in difference.shape[-2:])
    difference = difference[..., :height, :width]
    coarse = F.avg_pool2d(difference, factor)
    return Change(float(difference.square().mean()), float(coarse.square().mean()))


def mean_change(changes: Sequence[Change]) -> Change:
    """The average of panels of equally many images."""
    count = len(changes)
    return Change(sum(c.pixel for c in changes) / count, sum(c.low_pass for c in changes) / count)


def falls(values: Sequence[float]) -> bool:
    """Whether each value is below the one before."""
    return all(after < before for before, after in itertools.pairwise(values))
