"""n convolutions with constant kernels at once, in two ways; both keep none of their input.

x is (n B, in, H, W), the first network's batch first, the kernels are (n, out, in, k, l).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.grad import conv2d_input


class Convolution(torch.autograd.Function):
    """n convolutions with constant kernels (n, out, in, k, l), of which nothing is kept.

    Autograd's own would keep the input, which a gradient with respect to the kernel would need.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        n = len(weight)
        ctx.weight, ctx.n = weight, n
        ctx.how = {"stride": stride, "padding": padding, "groups": n}
        wide = _side_by_side(x, n)
        ctx.shape = wide.shape
        flat = None if bias is None else bias.flatten()
        return _one_behind_the_other(F.conv2d(wide, weight.flatten(0, 1), flat, **ctx.how), n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        weight = ctx.weight.flatten(0, 1)
        dx = conv2d_input(ctx.shape, weight, _side_by_side(dy, ctx.n), **ctx.how)
        return _one_behind_the_other(dx, ctx.n), None, None, None, None


class Product(torch.autograd.Function):
    """The same by matrix products, (n, B H' W', in k l) times (n, in k l, out)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        n, out, _, *kernel = weight.shape
        ctx.shape, ctx.kernel, ctx.stride, ctx.padding = x.shape, kernel, stride, padding
        ctx.matrices = weight.flatten(2)
        (high, wide), (down, right) = padding, stride
        last = F.pad(x.permute(0, 2, 3, 1), (0, 0, wide, wide, high, high))
        windows = last.unfold(1, kernel[0], down).unfold(2, kernel[1], right)
        ctx.out = (out, *windows.shape[1:3])
        y = windows.reshape(n, -1, ctx.matrices.shape[2]) @ ctx.matrices.transpose(1, 2)
        if bias is not None:
            y += bias.unsqueeze(1)
        return y.view(len(x), *ctx.out[1:], out).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None, None]:
        (batch, channels, *sides), (out, h, w) = ctx.shape, ctx.out
        (tall, broad), (down, right), (high, wide) = ctx.kernel, ctx.stride, ctx.padding
        rows = dy.permute(0, 2, 3, 1).reshape(len(ctx.matrices), -1, out) @ ctx.matrices
        taps = rows.view(batch, h, w, channels, tall, broad).permute(0, 4, 5, 1, 2, 3)
        # The padded input as a grid of stride x stride cells: taps whose numbers differ by less
        # than the stride fall on different pixels and are added at once.
        grid = [-(-tall // down) - 1 + h, -(-broad // right) - 1 + w]
        dx = dy.new_zeros(batch, grid[0], down, grid[1], right, channels)
        for i in range(0, tall, down):
            for j in range(0, broad, right):
                part = taps[:, i : i + down, j : j + right]
                cells = dx[:, i // down :, : part.shape[1], j // right :, : part.shape[2]]
                cells[:, :h, :, :w] += part.permute(0, 3, 1, 4, 2, 5)
        dx = dx.view(batch, grid[0] * down, grid[1] * right, channels)
        missing = [2 * high + sides[0] - dx.shape[1], 2 * wide + sides[1] - dx.shape[2]]
        if max(missing) > 0:  # pixels that no window reaches
            dx = F.pad(dx, (0, 0, 0, max(0, missing[1]), 0, max(0, missing[0])))
        dx = dx[:, high : high + sides[0], wide : wide + sides[1]]
        return dx.permute(0, 3, 1, 2), None, None, None, None


def _side_by_side(x: Tensor, n: int) -> Tensor:
    """(n B, C, H, W) -> (B, n C, H, W)."""
    return x.unflatten(0, (n, -1)).transpose(0, 1).flatten(1, 2)


def _one_behind_the_other(x: Tensor, n: int) -> Tensor:
    """(B, n C, H, W) -> (n B, C, H, W)."""
    return x.unflatten(1, (n, -1)).transpose(0, 1).flatten(0, 1)
