"""Discriminators d(z) for the hole between posterior and prior: a light network per layer, summed.

The networks are two kinds of energies at t = 0: dense, or convolutional where a layer is a map.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ebm_prior.energy import MapEnergy, MLPEnergy

#: Which energy network, by its name in a prior's configuration, and how wide.
NETWORKS: dict[str, tuple[type[nn.Module], int]] = {
    "mlp": (MLPEnergy, 256),
    "map": (MapEnergy, 64),
}


class Critic(nn.Module):
    """d(z), the sum over layers of a network each."""

    def __init__(self, shapes: Iterable[Sequence[int]], network: str) -> None:
        super().__init__()
        kind, width = NETWORKS[network]
        self.nets = nn.ModuleList(kind(shape, width) for shape in shapes)

    def forward(self, z: Sequence[Tensor]) -> Tensor:
        """One (B, \\*shape) per layer -> (B,)."""
        t = torch.zeros(len(z[0]), device=z[0].device)
        parts = [net(part, t) for net, part in zip(self.nets, z, strict=True)]
        return torch.cat(parts, dim=1).sum(1)
