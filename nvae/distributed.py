"""The processes of one run; alone, each call does nothing."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def several() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    return dist.get_rank() if several() else 0


def world_size() -> int:
    return dist.get_world_size() if several() else 1


class _Sum(torch.autograd.Function):
    """The sum over processes; as each process's output sees every input, so does the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _summed(grad)


def _summed(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def total(x: Tensor) -> Tensor:
    """The sum of `x` over all processes, on each of them. Differentiable."""
    if not several():
        return x
    result: Tensor = _Sum.apply(x)
    return result


def mean(x: Tensor) -> Tensor:
    """The mean of `x` over all processes, on each of them. Differentiable."""
    return total(x) / world_size()


def largest(x: Tensor) -> Tensor:
    """The element-wise maximum of `x` over all processes, on each of them."""
    if several():
        x = x.clone()
        dist.all_reduce(x, op=dist.ReduceOp.MAX)
    return x


def collect(value: Any) -> list[Any]:
    """Any small value of each process, in the order of ranks, on all of them."""
    every = [value] * world_size()
    if several():
        dist.all_gather_object(every, value)
    return every


def wait() -> None:
    """Return when every process has come here."""
    if several():
        dist.barrier()
