"""Residual cells and combiners (NVAE paper, section 3.1).

Attribute names that hold weights are upstream's: they are the file format.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.arch import INVERTED_RESIDUALS, RESIDUALS
from nvae.layers import (
    BatchNorm,
    BatchNormSwish,
    Conv2d,
    DataInitConv2d,
    PlainConv2d,
    SqueezeExcitation,
    bilinear_x2,
    nearest_x2,
)


class Residual(nn.Module):
    """[BN,] activation, [nearest x2,] 3x3 convolution: the `res_*` primitives.

    Args:
        stride: 1, 2 (halve the resolution) or -1 (double it).
    """

    def __init__(self, name: str, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        if name == "res_bnelu":
            self.bn = BatchNorm(c_in)
        elif name != "res_elu":
            self.bn_act = BatchNormSwish(c_in)
        self.name = name
        self.upsample = nearest_x2() if stride == -1 else nn.Identity()
        conv = DataInitConv2d if name == "res_elu" else Conv2d
        dilation = RESIDUALS[name]
        self.conv_0 = conv(
            c_in, c_out, 3, stride=max(stride, 1), padding=dilation, dilation=dilation
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.name == "res_elu":
            x = F.elu(x)
        elif self.name == "res_bnelu":
            x = F.elu(self.bn(x))
        else:
            x = self.bn_act(x)
        return self.conv_0(self.upsample(x))


class ConvBNSwish(nn.Module):
    """Plain convolution, BN, swish: the first two thirds of an inverted residual."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            PlainConv2d(c_in, c_out, kernel, stride=stride, padding=kernel // 2, groups=groups),
            BatchNormSwish(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class InvertedResidual(nn.Module):
    """[nearest x2,] BN, expand 1x1, BN, swish, (depthwise) k x k, BN, swish, shrink 1x1, BN.

    The hidden width is a multiple of the *input* width, also in cells that halve it.
    """

    def __init__(self, name: str, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        expansion, kernel, groups = INVERTED_RESIDUALS[name]
        hidden = c_in * expansion
        layers: list[nn.Module] = [nearest_x2()] if stride == -1 else []
        self.conv = nn.Sequential(
            *layers,
            BatchNorm(c_in),
            ConvBNSwish(c_in, hidden, 1, 1, 1),
            ConvBNSwish(hidden, hidden, kernel, max(stride, 1), groups or hidden),
            PlainConv2d(hidden, c_out, 1),
            BatchNorm(c_out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FactorizedReduce(nn.Module):
    """Skip path of a down cell: four strided 1x1 convolutions see the four pixels of each 2x2."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        quarter = c_out // 4
        self.conv_1 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_2 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_3 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_4 = Conv2d(c_in, c_out - 3 * quarter, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(x)
        # The file format fixes which convolution sees which (row, column) offset.
        return torch.cat(
            [
                self.conv_1(x),
                self.conv_2(x[:, :, 1:, 1:]),
                self.conv_3(x[:, :, :, 1:]),
                self.conv_4(x[:, :, 1:, :]),
            ],
            dim=1,
        )


class Cell(nn.Module):
    """skip(x) + 0.1 SE(op_k(... op_1(x))).

    Args:
        primitives: names of the ops; the first changes width and resolution.
        stride: 1; 2 halves the resolution and doubles the width; -1 the reverse.
    """

    def __init__(self, primitives: list[str], c_in: int, stride: int, use_se: bool) -> None:
        super().__init__()
        c_out = {1: c_in, 2: 2 * c_in, -1: c_in // 2}[stride]
        self.skip: nn.Module
        if stride == 1:
            self.skip = nn.Identity()
        elif stride == 2:
            self.skip = FactorizedReduce(c_in, c_out)
        else:
            self.skip = nn.Sequential(bilinear_x2(), Conv2d(c_in, c_out, 1, bias=False))
        self._ops = nn.ModuleList()
        width = c_in
        for name in primitives:
            kind = InvertedResidual if name in INVERTED_RESIDUALS else Residual
            self._ops.append(kind(name, width, c_out, stride))
            width, stride = c_out, 1
        if use_se:
            self.se = SqueezeExcitation(c_out)
        self.use_se = use_se

    def forward(self, x: Tensor) -> Tensor:
        branch = x
        for op in self._ops:
            branch = op(branch)
        if self.use_se:
            branch = self.se(branch)
        return torch.add(self.skip(x), branch, alpha=0.1)


class EncoderCombiner(nn.Module):
    """Adds the decoder's state, brought to the encoder's width, to the bottom-up features."""

    def __init__(self, c_enc: int, c_dec: int) -> None:
        super().__init__()
        self.conv = Conv2d(c_dec, c_enc, 1)

    def forward(self, features: Tensor, h: Tensor) -> Tensor:
        return features + self.conv(h)


class DecoderCombiner(nn.Module):
    """Mixes z into the decoder's state: a 1x1 convolution of both, the state first."""

    def __init__(self, channels: int, num_latent: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels + num_latent, channels, 1)

    def forward(self, h: Tensor, z: Tensor) -> Tensor:
        return self.conv(torch.cat([h, z], dim=1))
