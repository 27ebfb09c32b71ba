"""Spectral normalisation with exactly the state of the classic hook kind.

The parametrisation kind of PyTorch runs extra iterations at construction and has other keys, so
checkpoints of the reference and its training trajectories need this one (contract, networks.md).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-12


def power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    r"""One step towards the leading singular vectors of W (..., out, in), from u (..., out).

    .. math:: v \leftarrow W^\top u / |W^\top u|, \; u \leftarrow W v / |W v|
    """
    v = F.normalize((u.unsqueeze(-2) @ matrix).squeeze(-2), dim=-1, eps=EPS)
    return F.normalize((matrix @ v.unsqueeze(-1)).squeeze(-1), dim=-1, eps=EPS), v


class SpectralNorm(nn.Module):
    r"""Mix-in for layers with a weight: W / sigma, sigma estimating W's largest singular value.

    .. math::
        \text{train: } v \leftarrow W^\top u / |W^\top u|, \; u \leftarrow W v / |W v|
        \qquad \sigma = u^\top W v

    with W as a matrix of output channels times everything else. Every forward in train mode
    advances u and v by one iteration, in place; eval mode leaves them. Gradients flow through
    sigma to W, with u and v constant. At construction u and v are random, so the eval output of a
    fresh layer has an arbitrary scale, even sign, until some train-mode forwards were run.

    `weight_orig`, `weight_u` and `weight_v` are names of the file format.

    Attributes:
        shares: calls that a call in train mode stands for, see `in_shares`.
    """

    shares = 1
    weight_orig: nn.Parameter
    weight_u: Tensor
    weight_v: Tensor

    def normalise(self) -> None:
        """Turn the layer's `weight` into `weight_orig` with fresh u and v."""
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.weight_orig = nn.Parameter(weight.detach())
        matrix = self.weight_orig.flatten(1)
        for name, size in zip(("weight_u", "weight_v"), matrix.shape, strict=True):
            vector = F.normalize(matrix.new_empty(size).normal_(), dim=0, eps=EPS)
            self.register_buffer(name, vector.detach())

    def normalised_weight(self) -> Tensor:
        """W / sigma; in train mode after one power iteration."""
        return self.weight_orig / self._sigma()

    def _sigma(self) -> Tensor:
        matrix = self.weight_orig.flatten(1)
        u, v = self.weight_u, self.weight_v
        if self.training:
            with torch.no_grad():
                u, v = power_iteration(matrix, u)
                # The graph of sigma keeps the new tensors, the buffers get copies: the next
                # forward must not overwrite what this one's backward still needs.
                self.weight_u.copy_(u)
                self.weight_v.copy_(v)
        return u.dot(matrix.mv(v))

    @property
    def _several(self) -> bool:
        return self.training and self.shares > 1

    def _scaled(self, y: Tensor) -> Tensor:
        """What the bare W makes of a batch, each share of its rows divided by a sigma of its own.

        The layer is linear, so that x (W / sigma) = (x W) / sigma.
        """
        sigmas = torch.stack([self._sigma() for _ in range(self.shares)])
        rows = sigmas.repeat_interleave(len(y) // self.shares, output_size=len(y))
        return y / rows.view(-1, *(1,) * (y.ndim - 1))


@contextlib.contextmanager
def in_shares(module: nn.Module, shares: int) -> Iterator[None]:
    """Inside, a call of the module in train mode is to spectral norm what `shares` calls are.

    Each equal share of the batch, in the order of its rows, has the weights that a call of its own
    would have, and u and v advance as often.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, SpectralNorm)]
    try:
        for layer in layers:
            layer.shares = shares
        yield
    finally:
        for layer in layers:
            layer.shares = 1


class SNLinear(SpectralNorm, nn.Linear):
    """`nn.Linear` under spectral normalisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalise()

    def forward(self, input: Tensor) -> Tensor:
        if self._several:
            y = self._scaled(F.linear(input, self.weight_orig))
            return y if self.bias is None else y + self.bias
        return F.linear(input, self.normalised_weight(), self.bias)


class SNConv2d(SpectralNorm, nn.Conv2d):
    """`nn.Conv2d` under spectral normalisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalise()

    def forward(self, input: Tensor) -> Tensor:
        if self._several:
            y = self._scaled(self._conv_forward(input, self.weight_orig, None))
            return y if self.bias is None else y + self.bias[:, None, None]
        return self._conv_forward(input, self.normalised_weight(), self.bias)
