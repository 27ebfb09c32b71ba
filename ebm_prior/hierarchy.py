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
SIGNIFICANT = 3.0  # standard errors


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


def name_of(group: Sequence[int]) -> str:
    """A group in words, for pictures and reports."""
    return f"layers {group[0]}-{group[-1]}" if len(group) > 1 else f"layer {group[0]}"


# --- three ways to a panel


def swap(reference: Tensor, variants: Tensor, group: Tensor) -> Tensor:
    """u with the group's coordinates from the variants and all others from the reference, (n, D).

    The lower z follow the changed upper ones: their moments are computed anew.

    Args:
        reference: (1, D), or (n, D) for a reference per row.
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
    prior: EBMPrior, reference: Tensor, group: Tensor, *, generator: torch.Generator
) -> Tensor:
    r"""The group's own reverse chain given the other layers, (n, D).

    The clamped layers follow a forward process of u*, drawn anew for each row,
    :math:`u^*_0 = u^*, \; u^*_k = \alpha_k u^*_{k-1} + \sigma_k \epsilon`; at index t they are
    held at u*_t, and the kernel sees u*_{t+1}. They end as the very bits of u*.

    Args:
        reference: u*, (n, D), a state 0 for each chain.
        group: (D,) bool, True at the coordinates to draw.
    """
    path = forward_path(reference, prior.schedule, generator)
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


def change(images: Tensor, reference: Tensor, factor: int | None = None) -> Change:
    """How images (n, C, H, W) differ from the reference, of the same shape or (1, C, H, W).

    Args:
        factor: pixels on a side of a block; by default `low_pass_factor`.
    """
    difference = (images - reference).double()
    factor = factor or low_pass_factor(*difference.shape[-2:])
    # Whole blocks only, in both numbers, so that a share never exceeds 1.
    height, width = (side - side % factor for side in difference.shape[-2:])
    difference = difference[..., :height, :width]
    coarse = F.avg_pool2d(difference, factor)
    return Change(float(difference.square().mean()), float(coarse.square().mean()))


def mean_change(changes: Sequence[Change]) -> Change:
    """The average of panels of equally many images."""
    count = len(changes)
    return Change(sum(c.pixel for c in changes) / count, sum(c.low_pass for c in changes) / count)


def deviations(changes: Sequence[Change]) -> Tensor:
    r"""(R,): what each of R references adds to the error of their common share.

    The delta method for a ratio of means; `standard_error` of these is the share's, that of their
    difference to another panel's, over the same references, is the difference's.
    """
    mean = mean_change(changes)
    rest = [c.low_pass - mean.low_pass_share * c.pixel for c in changes]
    return torch.tensor(rest, dtype=torch.float64) / (mean.pixel or 1.0)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of values (R,); None for a single one."""
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else None


class Fall(NamedTuple):
    """How much less coarse a group's changes are than those of the group above."""

    by: float  # share of the upper group minus share of the lower one
    standard_error: float | None


def fall(upper: Sequence[Change], lower: Sequence[Change]) -> Fall:
    """From one panel to the next, over the same references."""
    by = mean_change(upper).low_pass_share - mean_change(lower).low_pass_share
    return Fall(by, standard_error(deviations(upper) - deviations(lower)))


def falls(steps: Sequence[Fall]) -> bool | None:
    """Whether the share falls at every step, by `SIGNIFICANT` standard errors or more.

    False where it rises by as much at one step; None where the references are too few to tell, or
    there is one group only.
    """
    signs = [_sign(step) for step in steps]
    if -1 in signs:
        return False
    return True if signs and all(signs) else None


def _sign(step: Fall) -> int:
    if step.standard_error is None or abs(step.by) < SIGNIFICANT * step.standard_error:
        return 0
    return 1 if step.by > 0 else -1
