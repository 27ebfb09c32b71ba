"""Batches on their way to a GPU, which computes meanwhile.

A batch is a tensor, or a list of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor


def parts(batch: Any) -> list[Tensor]:
    return [batch] if isinstance(batch, Tensor) else list(batch)


def pinned(batch: Any) -> Any:
    """In memory from where a GPU reads by itself."""
    found = [part.pin_memory() for part in parts(batch)]
    return found[0] if isinstance(batch, Tensor) else found


def sent(batch: Any, device: torch.device) -> Any:
    """On its way to the device; what is computed there waits for it, we do not."""
    found = [part.to(device, non_blocking=True) for part in parts(batch)]
    return found[0] if isinstance(batch, Tensor) else found


def ahead(batches: Iterable[Any], device: torch.device) -> Iterator[Any]:
    """Pinned batches on a GPU; while one is used, the next travels on a stream of its own."""
    road = torch.cuda.Stream(device)
    waiting: list[tuple[Any, torch.cuda.Event]] = []

    def arrived() -> Any:
        batch, there = waiting.pop(0)
        here = torch.cuda.current_stream(device)
        here.wait_event(there)
        for part in parts(batch):
            part.record_stream(here)  # its memory is not to be given away before it is used
        return batch

    for batch in batches:
        with torch.cuda.stream(road):
            waiting.append((sent(batch, device), road.record_event()))
        if len(waiting) == 2:
            yield arrived()
    while waiting:
        yield arrived()
