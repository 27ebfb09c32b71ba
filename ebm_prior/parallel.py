"""The processes of one training run under torchrun; alone, each call does nothing.

Every process holds the whole prior and its own batch. Noise differs, weights never do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def rank() -> int:
    return dist.get_rank() if _several() else 0


def world_size() -> int:
    return dist.get_world_size() if _several() else 1


def _several() -> bool:
    return dist.is_available() and dist.is_initialized()


def broadcast(module: nn.Module) -> None:
    """Give every process the parameters and buffers of the first."""
    broadcast_tensors([*module.parameters(), *module.buffers()])


@torch.no_grad()
def broadcast_tensors(tensors: Sequence[Tensor]) -> None:
    """Overwrite the tensors by those of the first process."""
    if _several():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


@torch.no_grad()
def average_gradients(module: nn.Module) -> None:
    """Replace each gradient by its mean over the processes, in one message.

    By hand and not by `DistributedDataParallel`: its hooks expect one forward per backward, while
    here K forwards of a chain with frozen parameters come first, and all of the backward passes
    are over when this is called, so that there is nothing to overlap with.
    """
    if not _several():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def gather(values: Tensor) -> Tensor:
    """(n,) of each process -> (processes, n), the same on all of them."""
    if not _several():
        return values[None]
    every = [torch.empty_like(values) for _ in range(world_size())]
    dist.all_gather(every, values)
    return torch.stack(every)


def alike(module: nn.Module) -> bool:
    """Whether all processes hold the same weights and buffers, told by two sums of each tensor."""
    sums = [
        part
        for tensor in module.state_dict().values()
        for part in (tensor.double().sum(), tensor.double().square().sum())
    ]
    every = gather(torch.stack(sums))
    return bool((every == every[0]).all())


def collect(value: Any) -> list[Any]:
    """Any small value of each process, in the order of ranks, on all of them."""
    every = [value] * world_size()
    if _several():
        dist.all_gather_object(every, value)
    return every


def wait() -> None:
    """Return when every process has come here."""
    if _several():
        dist.barrier()
