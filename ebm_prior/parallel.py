"""The processes of one training run under torchrun; alone, each call does nothing.

Every process holds the whole prior and its own batch. Noise differs, weights never do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

Loss = Callable[..., Any]


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
    """Replace each gradient by its mean over the processes, in one message, after the backward."""
    if not _several():
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


def averaged(loss: Loss, learned: nn.Module) -> Loss:
    """The loss, whose backward leaves in each gradient its mean over the processes.

    One `DistributedDataParallel` around the whole of it: its messages overlap with the backward,
    and its hooks expect one forward per backward, which the K forwards of a chain, of frozen
    parameters, are part of.

    Args:
        learned: the module whose parameters the loss depends on, all of them each time.
    """
    if not _several():
        return loss
    wrapped: Loss = nn.parallel.DistributedDataParallel(
        _OfParameters(loss, learned), gradient_as_bucket_view=True
    )
    # After its first backward it arranges its messages anew, and sums over processes depend on
    # the arrangement, by rounding. One before the first step: a run that goes on has that of the
    # run that was stopped.
    wrapped().backward()
    learned.zero_grad()
    return wrapped


class _OfParameters(nn.Module):
    """A loss as a module without buffers, which each process advances alike and need not send.

    Called with nothing, it is the sum of all parameters.
    """

    def __init__(self, loss: Loss, learned: nn.Module) -> None:
        super().__init__()
        self.loss, self.learned = loss, nn.ParameterList(learned.parameters())

    def forward(self, *args: Any, **further: Any) -> Any:
        if not args:
            return sum(parameter.sum() for parameter in self.learned)
        return self.loss(*args, **further)


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
