"""Draw many images in blocks and measure them; only features and the first images are kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.base import Prior
from ebm_prior.commands.shared import measure
from ebm_prior.commands.shared.session import Job
from nvae.evaluation import blocks

#: (first, count, generator) -> u (count, D): the block of draws that starts at `first`.
Draw = Callable[[int, int, torch.Generator], Tensor]
SHOWN = 60


class Sampled(NamedTuple):
    """What is known of a set of images."""

    numbers: dict[str, Any]
    pictures: Tensor  # the first images


class _Part(NamedTuple):
    seen: measure.Seen
    sums: Tensor  # (2, D) float64, of u and u^2
    ess: Tensor | None  # (count, L), of importance resampling
    pictures: Tensor
    seconds: float


@torch.no_grad()
def sampled(
    job: Job,
    ruler: measure.Ruler,
    draw: Draw,
    num: int,
    *,
    backbone: Any,
    key: str,
    temperature: float = 1.0,
    prior: Prior | None = None,
) -> Sampled | None:
    """Draw and decode `num` images and measure them, on all processes; the result on the first.

    A block's random numbers belong to the job's seed, the key and the block: what is drawn with
    the same key shares its noise.

    Args:
        backbone: decodes; the prior's own view of it, with the prior's BatchNorm statistics.
        prior: what draws, if it leaves effective sample sizes (`last_ess`) to be told.

    Returns:
        The ruler's numbers, and `u_std` of all coordinates together, `u_std_layers`,
        `images_per_second` (drawing and decoding, without measuring) and, where importance
        resampling draws, the mean `effective_sample_size` of each layer.

    Raises:
        ValueError: images with NaN or infinite values.
    """
    parts: dict[int, _Part] = {}
    for block in blocks.mine(num, job.batch_size, job.here, key):
        started = time.perf_counter()
        generator = job.generator(key, block.first)
        u = draw(block.first, block.count, generator)
        images = backbone.decode(u, temperature, generator).float().cpu()
        seconds = time.perf_counter() - started
        if not images.isfinite().all():
            raise ValueError(
                f"{key}: images {block.first} to {block.first + block.count - 1} hold NaN or"
                " infinite values; check checkpoint and prior with `ebm_prior doctor`"
            )
        double = u.double().cpu()
        parts[block.number] = _Part(
            ruler.look(images),
            torch.stack([double.sum(0), double.square().sum(0)]),
            getattr(prior, "last_ess", None),
            images[: max(0, SHOWN - block.first)],
            seconds,
        )
    every = blocks.gathered(parts, job.here)
    if every is None:
        return None
    found = list(every.values())
    means, squares = sum((part.sums for part in found), torch.zeros(())) / num
    pairs = backbone.layout.split(torch.stack([means, squares]))
    layers = [_deviation(pair.flatten(1)) for pair in pairs]
    numbers: dict[str, Any] = ruler.numbers(measure.joined(p.seen for p in found), job.seed)
    numbers |= {"u_std": _deviation(torch.stack([means, squares])), "u_std_layers": layers}
    numbers["images_per_second"] = num / sum(p.seconds for p in found) * job.here.world_size
    ess = [part.ess.double().cpu() for part in found if part.ess is not None]
    if ess:
        numbers["effective_sample_size"] = torch.cat(ess).mean(0).tolist()
    return Sampled(numbers, torch.cat([part.pictures for part in found]))


def _deviation(moments: Tensor) -> float:
    """(2, n), means of u and u^2 of n coordinates -> the deviation of all their values."""
    mean, square = moments.mean(1)
    return float((square - mean.square()).sqrt())
