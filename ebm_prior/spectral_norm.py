"""Spectral normalisation with exactly the state of the classic hook kind.

The parametrisation kind of PyTorch runs extra iterations at construction and has other keys, so
checkpoints of the reference and its training trajectories need this one (contract, networks.md).
"""

from __future__ import annotations

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
    """

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
        matrix = self.weight_orig.flatten(1)
        u, v = self.weight_u, self.weight_v
        if self.training:
            with torch.no_grad():
                v = F.normalize(matrix.t().mv(u), dim=0, eps=EPS)
                u = F.normalize(matrix.mv(v), dim=0, eps=EPS)
                # The graph of sigma keeps the new tensors, the buffers get copies: the next
                # forward must not overwrite what this one's backward still needs.
                self.weight_u.copy_(u)
                self.weight_v.copy_(v)
        return self.weight_orig / u.dot(matrix.mv(v))


class SNLinear(SpectralNorm, nn.Linear):
    """`nn.Linear` under spectral normalisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalise()

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.normalised_weight(), self.bias)


class SNConv2d(SpectralNorm, nn.Conv2d):
    """`nn.Conv2d` under spectral normalisation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.normalise()

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.normalised_weight(), self.bias)
