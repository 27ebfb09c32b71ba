"""Seconds to sample a fixed number of images: chain, T and decoder."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from ebm_prior.base import Prior

Name = TypeVar("Name")


@torch.no_grad()
def seconds(
    prior: Prior, num: int, batch_size: int, generator: torch.Generator, **drawing: Any
) -> float:
    """Wall seconds of drawing and decoding `num` images in blocks."""
    _wait(prior.device)
    started = time.perf_counter()
    for first in range(0, num, batch_size):
        u = prior.sample_u(min(batch_size, num - first), generator=generator, **drawing)
        prior.backbone.decode(u, generator=generator)
    _wait(prior.device)
    return time.perf_counter() - started


def interleaved(
    cells: Mapping[Name, tuple[Prior, dict[str, Any]]],
    num: int,
    batch_size: int,
    repeats: int,
    generator: torch.Generator,
) -> dict[Name, list[float]]:
    """The seconds of every cell, `repeats` times in turn, after a warm-up.

    Taken in turn, a machine that slows down or that others use slows all cells alike.

    Args:
        cells: a prior and further arguments of its `sample_u`.
    """
    found: dict[Name, list[float]] = {name: [] for name in cells}
    for prior, drawing in cells.values():
        seconds(prior, min(num, batch_size), batch_size, generator, **drawing)
    for _ in tqdm(range(repeats), desc="timing", unit="round"):
        for name, (prior, drawing) in cells.items():
            found[name].append(seconds(prior, num, batch_size, generator, **drawing))
    return found


def medians(found: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    """The middle of each cell's seconds."""
    return {name: statistics.median(values) for name, values in found.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
