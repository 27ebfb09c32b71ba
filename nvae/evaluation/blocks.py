"""Blocks of images: dealt out to the processes, gathered again in their order.

Seeds belong to blocks and not to processes, so any number of processes makes the same images (to
rounding, which the number of threads may change).
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from nvae.runtime import Runtime

Value = TypeVar("Value")


class Images(Sized, Protocol):
    """Images by position."""

    def __getitem__(self, index: int) -> Tensor: ...


@dataclass(frozen=True)
class Block:
    """Images `first` to `first + count - 1`; the `index`-th block of this process."""

    number: int
    first: int
    count: int
    index: int

    def of(self, images: Images) -> Tensor:
        """Its images, (count, C, H, W)."""
        return torch.stack([images[self.first + i] for i in range(self.count)])


def mine(total: int, size: int, here: Runtime, description: str) -> Iterator[Block]:
    """The blocks of this process, under a progress bar on the main one."""
    from tqdm import tqdm

    numbers = range(-(-total // size))[here.rank :: here.world_size]
    bar = tqdm(numbers, desc=description, unit="block", disable=not here.is_main)
    for index, number in enumerate(bar):
        first = number * size
        yield Block(number, first, min(size, total - first), index)


def gathered(parts: dict[int, Value], here: Runtime) -> dict[int, Value] | None:
    """The parts of all processes by block number, in order, on the main one; None elsewhere.

    All processes of the group call it together; the parts travel over the CPU.
    """
    if here.world_size == 1:
        return parts
    import torch.distributed as dist

    # Unequal work keeps the first ones waiting.
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=1))
    everybodys: list[Any] | None = [None] * here.world_size if here.is_main else None
    dist.gather_object(parts, everybodys, group=group)
    dist.destroy_process_group(group)
    if everybodys is None:
        return None
    merged = {number: value for some in everybodys for number, value in some.items()}
    return {number: merged[number] for number in sorted(merged)}
