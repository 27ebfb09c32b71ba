"""Frozen layers with a backward pass of their own: each keeps no more than its gradient needs.

A stage maps a state (B, H, W, C), channels last, to the next one. The weights are constants, so a
linear stage keeps nothing and an activation its input. What is kept lies on a tape, in the order
of the forward pass, and is taken off it by the backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


class Tape:
    """What the backward pass will need, last in, first out.

    Args:
        keep: False for a forward pass without a backward one: nothing is kept.
        scratch: of another tape, to share.
    """

    def __init__(self, keep: bool = True, scratch: dict[Any, Tensor] | None = None) -> None:
        self.keep = keep
        self.scratch = {} if scratch is None else scratch
        self._kept: list[Tensor] = []

    def put(self, *tensors: Tensor) -> None:
        if self.keep:
            self._kept.extend(tensors)

    def take(self) -> Tensor:
        return self._kept.pop()

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(x.numel() * x.element_size() for x in self._kept)

    def passing(self, like: Tensor) -> Tensor:
        """A tensor like this one for what the next stage uses up: always the same, still cached.

        Its content lasts until another of its shape is asked for.
        """
        key = like.shape, like.dtype
        if key not in self.scratch:
            self.scratch[key] = torch.empty_like(like)
        return self.scratch[key]


class Stage(ABC):
    """A differentiable map with constant weights."""

    @abstractmethod
    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        """The output at x, (B, H, W, C)."""

    @abstractmethod
    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        """The gradient with respect to x, from that with respect to the output.

        An activation overwrites `dy`: before it comes the product of a convolution's backward.
        """


class Chain(Stage):
    """Stages one after the other."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        for stage in self.stages:
            x = stage.forward(x, tape)
        return x

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        for stage in reversed(self.stages):
            dy = stage.backward(dy, tape)
        return dy


class Recomputed(Stage):
    """Keeps a stage's input alone and runs its forward pass again on the way back."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        tape.put(x)
        return self.stage.forward(x, Tape(keep=False, scratch=tape.scratch))

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        again = Tape(scratch=tape.scratch)
        self.stage.forward(tape.take(), again)
        return self.stage.backward(dy, again)


class Pointwise(Stage):
    """1x1 convolution: a matrix product over all pixels.

    In float32 on CUDA a convolution all the same: PyTorch lets these use TF32 and products not,
    and the plain walk's are convolutions.

    Args:
        weight: (C_out, C_in).
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.convolve = weight.is_cuda and weight.dtype == torch.float32

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        if self.convolve:
            kernel = self.weight[:, :, None, None]
            return _channels_last(F.conv2d(_channels_first(x), kernel, self.bias))
        return F.linear(x, self.weight, self.bias)

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        if self.convolve:
            kernel = self.weight.t()[:, :, None, None]
            return _channels_last(F.conv2d(_channels_first(dy), kernel))
        return dy @ self.weight


class Conv(Stage):
    """Convolution of stride 1; its gradient is one with the kernel turned round.

    Args:
        weight: (C_out, C_in / groups, k, k).
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, padding: int, dilation: int, groups: int
    ) -> None:
        self.bias, self.padding, self.dilation, self.groups = bias, padding, dilation, groups
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        blocks = weight.unflatten(0, (groups, -1)).transpose(1, 2).flip(3, 4).flatten(0, 1)
        self.turned = blocks.contiguous(memory_format=torch.channels_last)
        self.padding_back = dilation * (weight.shape[-1] - 1) - padding

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return self._convolved(x, self.weight, self.bias, self.padding)

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        return self._convolved(dy, self.turned, None, self.padding_back)

    def _convolved(self, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        y = F.conv2d(
            _channels_first(x),
            weight,
            bias,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups,
        )
        return _channels_last(y)


class Affine(Stage):
    """A factor and a summand per channel: BatchNorm in eval mode, where it cannot be folded."""

    def __init__(self, scale: Tensor, shift: Tensor) -> None:
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale)

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        return dy * self.scale


class Silu(Stage):
    """x sigmoid(x), called swish by NVAE."""

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        tape.put(x)
        return aten.silu.out(x, out=tape.passing(x))

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        return aten.silu_backward(dy, tape.take(), grad_input=dy)


class Elu(Stage):
    """ELU with alpha 1; keeps its output, from which the slope follows."""

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = F.elu(x)
        tape.put(y)
        return y

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        return aten.elu_backward(dy, 1.0, 1.0, 1.0, True, tape.take(), grad_input=dy)


class NearestX2(Stage):
    """Each pixel four times."""

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        return _channels_last(F.interpolate(_channels_first(x), scale_factor=2, mode="nearest"))

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        # The sum over each 2x2: an average that divides by one.
        return _channels_last(F.avg_pool2d(_channels_first(dy), 2, divisor_override=1))


class BilinearX2(Stage):
    """Bilinear up-sampling with corners aligned."""

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = F.interpolate(_channels_first(x), scale_factor=2, mode="bilinear", align_corners=True)
        return _channels_last(y)

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        dy = _channels_first(dy)
        before = [*dy.shape[:2], dy.shape[2] // 2, dy.shape[3] // 2]
        dx = aten.upsample_bilinear2d_backward(dy, list(dy.shape[2:]), before, True, None, None)
        return _channels_last(dx)


class Gate:
    """Squeeze and excitation: a factor per channel, made of the channels' means over pixels.

    .. math:: g = 0.1\\,\\text{sigmoid}(W_2 \\text{ReLU}(W_1 \\bar y + b_1) + b_2)

    The cell's factor 0.1 is part of it.
    """

    def __init__(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        self.first, self.second = first, second

    def forward(self, y: Tensor, tape: Tape) -> Tensor:
        """(B, C) at y (B, H, W, C), without the 0.1."""
        hidden = F.relu(F.linear(y.mean((1, 2)), *self.first))
        gate = F.linear(hidden, *self.second).sigmoid()
        tape.put(hidden, gate)
        return gate

    def backward(self, dgate: Tensor, gate: Tensor, hidden: Tensor) -> Tensor:
        """(B, C): the gradient with respect to the means."""
        inner = aten.sigmoid_backward(dgate, gate) @ self.second[0]
        return aten.threshold_backward(inner, hidden, 0) @ self.first[0]


class Residual(Stage):
    """skip(x) + 0.1 gate(branch(x)) branch(x), without a gate where the model has none."""

    FACTOR = 0.1

    def __init__(self, skip: Stage | None, branch: Stage, gate: Gate | None) -> None:
        self.skip, self.branch, self.gate = skip, branch, gate

    def forward(self, x: Tensor, tape: Tape) -> Tensor:
        y = self.branch.forward(x, tape)
        kept = x if self.skip is None else self.skip.forward(x, tape)
        if self.gate is None:
            return torch.add(kept, y, alpha=self.FACTOR)
        gate = self.gate.forward(y, tape)
        tape.put(y)
        return torch.addcmul(kept, y, gate[:, None, None], value=self.FACTOR)

    def backward(self, dy: Tensor, tape: Tape) -> Tensor:
        dbranch = self._behind_gate(dy, tape)
        dskip = dy if self.skip is None else self.skip.backward(dy, tape)
        return self.branch.backward(dbranch, tape).add_(dskip)

    def _behind_gate(self, dy: Tensor, tape: Tape) -> Tensor:
        if self.gate is None:
            return dy * self.FACTOR
        y, gate, hidden = tape.take(), tape.take(), tape.take()
        pixels = y.shape[1] * y.shape[2]
        dgate = (dy * y).sum((1, 2))
        dmean = self.gate.backward(dgate, gate, hidden) * (self.FACTOR / pixels)
        return torch.addcmul(dmean[:, None, None], dy, gate[:, None, None], value=self.FACTOR)


def _channels_first(x: Tensor) -> Tensor:
    """The view (B, C, H, W) that convolutions take."""
    return x.permute(0, 3, 1, 2)


def _channels_last(x: Tensor) -> Tensor:
    """(B, H, W, C), contiguous: a view if the kernel kept the memory format."""
    return x.permute(0, 2, 3, 1).contiguous()
