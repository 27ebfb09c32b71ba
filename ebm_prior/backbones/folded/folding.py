"""NVAE's cells as frozen stages: weight norm evaluated, BatchNorm folded, up-sampling last.

A cell becomes a list of operations, `fold` and `commute` rewrite it, `stages` casts the result.
Both rewritings are exact: in eval mode BatchNorm is a factor and a summand per channel, which a
neighbouring convolution takes up where no activation and no padding lies between; what acts pixel
by pixel commutes with nearest up-sampling, and a 1x1 convolution with the bilinear one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.backbones.folded.stages import (
    Affine,
    BilinearX2,
    Chain,
    Conv,
    Elu,
    Gate,
    NearestX2,
    Pointwise,
    Recomputed,
    Residual,
    Silu,
    Stage,
)
from ebm_prior.steps import Steps
from nvae import cells, layers


@dataclass(frozen=True, eq=False)
class Norm:
    """BatchNorm in eval mode, x -> scale x + shift per channel, in float64."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def of(cls, bn: nn.BatchNorm2d) -> Norm:
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight.detach().double() * (bn.running_var.double() + bn.eps).rsqrt()
        return cls(scale, bn.bias.detach().double() - bn.running_mean.double() * scale)

    def stage(self, dtype: torch.dtype) -> Stage:
        return Affine(self.scale.to(dtype), self.shift.to(dtype))


@dataclass(frozen=True, eq=False)
class Kernel:
    """A convolution of stride 1 in float64: weight (C_out, C_in / groups, k, k), bias (C_out,)."""

    weight: Tensor
    bias: Tensor
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @classmethod
    def of(cls, conv: layers.Conv2d | layers.PlainConv2d) -> Kernel:
        weight = conv.effective_weight().detach().double()
        bias = weight.new_zeros(len(weight)) if conv.bias is None else conv.bias.detach().double()
        assert conv.stride == (1, 1), "the decoder's tower never halves"
        return cls(weight, bias, int(conv.padding[0]), conv.dilation[0], conv.groups)

    @property
    def pointwise(self) -> bool:
        return tuple(self.weight.shape[2:]) == (1, 1) and self.groups == 1

    def then(self, norm: Norm) -> Kernel:
        """This and the normalisation behind it."""
        weight = self.weight * norm.scale[:, None, None, None]
        return self._with(weight, self.bias * norm.scale + norm.shift)

    def behind(self, norm: Norm) -> Kernel:
        """This and the normalisation before it; a padding would have to be shifted, too."""
        assert self.pointwise
        weight = self.weight * norm.scale[:, None, None]
        return self._with(weight, self.bias + self.weight[..., 0, 0] @ norm.shift)

    def _with(self, weight: Tensor, bias: Tensor) -> Kernel:
        return Kernel(weight, bias, self.padding, self.dilation, self.groups)

    def stage(self, dtype: torch.dtype) -> Stage:
        weight = self.weight.to(dtype)
        bias = self.bias.to(dtype) if self.bias.any() else None
        if self.pointwise:
            return Pointwise(weight[..., 0, 0].contiguous(), bias)
        return Conv(weight, bias, self.padding, self.dilation, self.groups)


Operation = Norm | Kernel | Silu | Elu | NearestX2 | BilinearX2


def fold(operations: Sequence[Operation]) -> list[Operation]:
    """Every normalisation that a convolution beside it can take up, taken up."""
    done: list[Operation] = []
    for operation in operations:
        before = done[-1] if done else None
        if isinstance(operation, Norm) and isinstance(before, Kernel):
            done[-1] = before.then(operation)
        elif isinstance(operation, Kernel) and operation.pointwise and isinstance(before, Norm):
            done[-1] = operation.behind(before)
        else:
            done.append(operation)
    return done


def commute(operations: Sequence[Operation]) -> list[Operation]:
    """Up-sampling behind whatever acts pixel by pixel: a quarter of the work there."""
    done = list(operations)
    for i in range(len(done) - 1):
        here, following = done[i : i + 2]
        spatial = isinstance(following, Kernel) and not following.pointwise
        if isinstance(here, NearestX2) and not spatial:
            done[i : i + 2] = [following, here]
        elif (
            isinstance(here, BilinearX2) and not spatial and not isinstance(following, Silu | Elu)
        ):
            done[i : i + 2] = [following, here]
    return done


def stages(operations: Sequence[Operation], steps: Steps, dtype: torch.dtype) -> Chain:
    """The operations as they are to run."""
    if steps.fold:
        operations = fold(operations)
    if steps.commute:
        operations = commute(operations)
    return Chain([o.stage(dtype) if isinstance(o, Norm | Kernel) else o for o in operations])


def operations_of(op: nn.Module, up: bool) -> list[Operation]:
    """A primitive of a cell; `up`: it doubles the resolution."""
    first: list[Operation] = [NearestX2()] if up else []
    if isinstance(op, cells.InvertedResidual):
        modules: list[Any] = list(op.conv)[-5:]
        bn_in, expand, spread, shrink, bn_out = modules
        (widen, bn_widen), (inner, bn_inner) = expand.conv, spread.conv
        return [
            *first,
            *(Norm.of(bn_in.bn), Kernel.of(widen), Norm.of(bn_widen), Silu()),
            *(Kernel.of(inner), Norm.of(bn_inner), Silu()),
            *(Kernel.of(shrink), Norm.of(bn_out.bn)),
        ]
    assert isinstance(op, cells.Residual)
    conv = Kernel.of(op.conv_0)
    if op.name == "res_elu":
        return [Elu(), *first, conv]
    if op.name == "res_bnelu":
        return [Norm.of(op.bn.bn), Elu(), *first, conv]
    return [Norm.of(op.bn_act), Silu(), *first, conv]


def cell_stage(cell: cells.Cell, steps: Steps, dtype: torch.dtype) -> Stage:
    """A cell of the decoder's tower: skip(x) + 0.1 SE(op_k(... op_1(x)))."""
    up = not isinstance(cell.skip, nn.Identity)
    skip = None
    if isinstance(cell.skip, nn.Sequential):
        _, conv = cell.skip
        assert isinstance(conv, layers.Conv2d)
        skip = stages([BilinearX2(), Kernel.of(conv)], steps, dtype)
    operations: list[Operation] = []
    for number, op in enumerate(cell._ops):
        operations += operations_of(op, up and number == 0)
    gate = None
    if cell.use_se:
        dense = [m for m in cell.se.se if isinstance(m, nn.Linear)]
        first, second = ((m.weight.detach().to(dtype), m.bias.detach().to(dtype)) for m in dense)
        gate = Gate(first, second)
    stage = Residual(skip, stages(operations, steps, dtype), gate)
    return Recomputed(stage) if steps.recompute else stage
