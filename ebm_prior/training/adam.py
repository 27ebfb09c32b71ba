"""One Adam over all layers, by the kernels that take all of their tensors at once.

It computes what the reference's one per layer does.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ebm_prior.training import apex

FUSED = ("cpu", "cuda")  # where PyTorch has one kernel for a whole update


def make(
    parameters: Iterable[Tensor],
    *,
    name: str,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """`adam`: PyTorch's, fused where it can be; `apex_adam`: apex's. The same to rounding.

    Raises:
        ValueError: apex cannot be used.
    """
    parameters = list(parameters)
    if name == "apex_adam":
        return apex.adam(parameters, lr=lr, betas=betas, weight_decay=weight_decay)
    fused = all(p.is_floating_point() and p.device.type in FUSED for p in parameters)
    return torch.optim.Adam(
        parameters,
        lr=lr,
        betas=betas,
        weight_decay=weight_decay,
        fused=fused or None,  # None: PyTorch chooses
    )


def gradient_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """The norm of all gradients together, (); they are scaled down to a limit above 0."""
    parameters = list(parameters)
    if limit:
        return torch.nn.utils.clip_grad_norm_(parameters, limit)
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
