"""A Langevin step that spends what the released code spends: the yardstick of the fast path.

Written from a description of where that code's time goes, not from the code. What it does of the
work that a step does not need, and `ebm_prior.frozen` leaves out:

- weight norm and BatchNorm are evaluated in every call, none folded into a convolution;
- swish is a Python autograd function that keeps its input and computes the sigmoid twice;
- the walk goes on to the image, which nobody looks at;
- the energies run one by one, each with its own time embedding, and every layer under spectral
  norm computes its sigma and divides (the eval-mode division; no power iteration);
- u is a list of layers: noise, gradient and update are taken layer by layer;
- two backward passes, one for the energies through the walk, one for the Gaussian terms;
- the norm of each layer's gradient is read by the host, which waits for the device.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior import langevin
from ebm_prior.prior import Conditional, EBMPrior, Force
from nvae.layers import BatchNormSwish, SyncedBatchNorm2d


class Swish(torch.autograd.Function):
    """x sigmoid(x) in two passes over x, and six in the backward, which keeps x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return gradient * (s * (1 + x * (1 - s)))


class PythonBatchNormSwish(BatchNormSwish):
    """swish(BN(x)) with the swish of this module."""

    def forward(self, x: Tensor) -> Tensor:
        return Swish.apply(SyncedBatchNorm2d.forward(self, x))


def in_python(model: nn.Module) -> nn.Module:
    """A copy of the model's modules around the same tensors, its BN-swishes in Python."""
    shared = [*model.parameters(), *model.buffers()]
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in shared})
    for module in result.modules():
        if isinstance(module, BatchNormSwish):
            module.__class__ = PythonBatchNormSwish  # the same state, another forward
    return result


class Reference:
    """The step on one prior's conditional, with u and gradients as lists of layers."""

    def __init__(self, prior: EBMPrior, t: int, u_next: Tensor) -> None:
        self.model: Any = in_python(prior.backbone.model)  # type: ignore[attr-defined]
        self.nets = list(prior.energies.children())
        self.layout = prior.layout
        density = prior.log_density(t, u_next)
        assert isinstance(density, Conditional)
        assert isinstance(density.f, Force)
        self.density, self.f = density, density.f
        self.t = torch.full((len(u_next),), t, device=u_next.device)
        self.u_next = self.layout.split(u_next)
        self.step_size = float(prior.step_sizes[t])
        self.logged: list[float] = []

    def energies(self, u: Sequence[Tensor]) -> Tensor:
        """F(T(u), t), (B,): the walk to the image, then the networks one by one."""
        z: list[Tensor] = []

        def choose(i: int, prior: Any, h: Tensor | None) -> Tensor:
            z.append(prior.mean + prior.std * u[i])
            return z[-1]

        self.model.walk(len(u[0]), choose)
        columns = [net(part, self.t) for net, part in zip(self.nets, z, strict=True)]
        f = self.f.coupling.total(torch.cat(columns, dim=1))
        return (f / self.f.scale).sum(1)

    def gaussian(self, u: Sequence[Tensor]) -> Tensor:
        """-1/2 |u|^2 - w/2 |alpha u - u_next|^2, (B,), summed layer by layer."""
        total = u[0].new_zeros(len(u[0]))
        for part, after in zip(u, self.u_next, strict=True):
            part, after = part.flatten(1), after.flatten(1)
            off = self.density.alpha * part - after
            total = total - 0.5 * part.square().sum(1)
            total = total - 0.5 * (self.density.weight * off.square()).sum(1)
        return total

    def step(self, u: Sequence[Tensor], noise: Sequence[Tensor]) -> list[Tensor]:
        """One Langevin step from u, one (B, ...) tensor per layer."""
        leaves = [part.detach().requires_grad_() for part in u]
        with torch.enable_grad():
            of_f = torch.autograd.grad(self.energies(leaves).sum(), leaves)
            of_gauss = torch.autograd.grad(self.gaussian(leaves).sum(), leaves)
        moved, self.logged = [], []
        for part, first, second, eps in zip(leaves, of_f, of_gauss, noise, strict=True):
            gradient = first + second
            self.logged.append(gradient.norm().item())
            drift = part.detach() + 0.5 * self.step_size * gradient
            moved.append(drift + self.step_size**0.5 * eps)
        return moved

    def noise(self, generator: torch.Generator | None) -> list[Tensor]:
        """Standard normal, layer by layer."""
        return [langevin.standard_normal(part, generator) for part in self.u_next]
