"""Volume-preserving inverse autoregressive flow of the posterior (contract 1.9).

Attribute names that hold weights are upstream's: they are the file format.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvae.layers import MaskedConv2d


class _Hidden(nn.Module):
    """Masked 3x3, ELU, masked depthwise 5x5, ELU: (B, nz, H, W) -> (B, 6 nz, H, W)."""

    def __init__(self, num_latent: int, mirror: bool) -> None:
        super().__init__()
        hidden = 6 * num_latent
        self.convz = nn.Sequential(
            MaskedConv2d(num_latent, hidden, 3, bias=False, zero_diag=True, mirror=mirror),
            nn.ELU(),
            MaskedConv2d(hidden, hidden, 5, bias=False, groups=hidden, mirror=mirror),
            nn.ELU(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.convz(z)


class _Shift(nn.Module):
    """ELU, masked 1x1. With the ELU before it this one is the second in a row, as upstream's."""

    def __init__(self, num_latent: int, mirror: bool) -> None:
        super().__init__()
        self.conv_0 = MaskedConv2d(6 * num_latent, num_latent, 1, mirror=mirror)
        with torch.no_grad():
            self.conv_0.log_weight_norm.add_(math.log(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_0(F.elu(x))


class HalfFlow(nn.Module):
    r"""z - mu(z), where mu at a pixel sees only pixels and channels before it.

    The Jacobian is triangular with ones on its diagonal: the log-determinant is 0.
    """

    def __init__(self, num_latent: int, mirror: bool) -> None:
        super().__init__()
        self.conv = _Hidden(num_latent, mirror)
        self.mu = _Shift(num_latent, mirror)

    def forward(self, z: Tensor) -> Tensor:
        return z - self.mu(self.conv(z))


class Flow(nn.Module):
    """One pass from the first pixel on, one from the last."""

    def __init__(self, num_latent: int) -> None:
        super().__init__()
        self.cell1 = HalfFlow(num_latent, mirror=False)
        self.cell2 = HalfFlow(num_latent, mirror=True)

    def forward(self, z: Tensor) -> Tensor:
        return self.cell2(self.cell1(z))
