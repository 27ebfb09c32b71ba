"""Discriminators d(z) for the hole between posterior and prior: a light network per layer, summed.

The kinds are those of the energies: dense, or convolutional where a layer is a map.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ebm_prior.energy import MLPEnergy


class MapNet(nn.Module):
    """A light convolutional net with biases for one layer's map (C, H, W); vectors count as 1x1.

    conv3, then a local head (conv1, summed over the map) beside strided convolutions to 4x4, two
    residual conv3 and a dense head: local structure has a short way to the output.
    """

    def __init__(self, shape: Sequence[int], width: int = 64) -> None:
        super().__init__()
        channels, height, width_of_map = (*shape, 1, 1)[:3]
        self.shape = (channels, height, width_of_map)
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.local = nn.Conv2d(width, 1, 1)
        self.down = nn.Sequential()
        high, wide = height, width_of_map
        while max(high, wide) > 4:
            stride = (2 if high > 4 else 1, 2 if wide > 4 else 1)
            self.down.extend([nn.SiLU(), nn.Conv2d(width, width, 3, stride, padding=1)])
            high, wide = -(-high // stride[0]), -(-wide // stride[1])
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.SiLU(), nn.Conv2d(width, width, 3, padding=1)) for _ in range(2)
        )
        hidden = nn.Linear(width * high * wide, 64)
        self.dense = nn.Sequential(nn.SiLU(), nn.Flatten(), hidden, nn.SiLU(), nn.Linear(64, 1))

    def forward(self, z: Tensor) -> Tensor:
        """z (B, \\*shape) -> (B, 1)."""
        y = self.first(z.reshape(-1, *self.shape))
        local = self.local(silu(y)).sum((2, 3)) / math.sqrt(math.prod(self.shape[1:]))
        y = self.down(y)
        for block in self.blocks:
            y = y + block(y)
        return self.dense(y) + local


class FlatNet(nn.Module):
    """The dense energy network (variant C) at t = 0, on the flattened layer."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.net = MLPEnergy(shape, width=256)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, \\*shape) -> (B, 1)."""
        return self.net(z, z.new_zeros(len(z)))


NETWORKS: dict[str, Callable[[Sequence[int]], nn.Module]] = {"mlp": FlatNet, "conv": MapNet}


class Critic(nn.Module):
    """d(z), the sum over layers of a network each."""

    def __init__(self, shapes: Iterable[Sequence[int]], network: str) -> None:
        super().__init__()
        self.nets = nn.ModuleList(NETWORKS[network](shape) for shape in shapes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """One (B, \\*shape) per layer -> (B,)."""
        parts = [net(part) for net, part in zip(self.nets, z, strict=True)]
        return torch.cat(parts, dim=1).sum(1)
