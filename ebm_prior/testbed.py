"""A small world whose every answer is known: eight modes, their exact energies, a distance.

Two layers of two coordinates in which the aggregate posterior is a mixture of eight Gaussians.
With the energies of `EightModes.oracle` every conditional of the diffusion prior is the true
reverse conditional, so whatever the samples lack, the sampler lacks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.backbones.base import Moments
from ebm_prior.config import PriorConfig
from ebm_prior.energy import Columns
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import Schedule, at

#: (z, t) -> (B, L), the f_i of every layer.
Function = Callable[[list[Tensor], Tensor], Tensor]


class EightModes:
    r"""Two layers of 2; in u, eight equal Gaussians of deviation 0.3.

    .. math:: z_2 = u_2, \qquad z_1 = 0.6\, \mathrm{flip}(z_2) + \tfrac12 (1 + \mathrm{sigmoid}
        (z_2))\, u_1
    """

    layout = Layout(((2,), (2,)))

    def __init__(self) -> None:
        angle = (torch.arange(4) * 90 + 45).deg2rad().double()
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
        top = 1.1 * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.means = torch.cat(
            [torch.cat([top, 0.9 * s * torch.stack([sign**0, sign], 1)], 1) for s in (1.0, -1.0)]
        )

    def to_z(self, u: Tensor, temperature: float = 1.0) -> list[Tensor]:
        top, low = self.layout.split(temperature * u)
        return [top, 0.6 * top.flip(1) + (0.5 + 0.5 * top.sigmoid()) * low]

    def to_u(self, z: list[Tensor]) -> Tensor:
        top, low = z
        return self.layout.join([top, (low - 0.6 * top.flip(1)) / (0.5 + 0.5 * top.sigmoid())])

    def moments(self, z: list[Tensor]) -> list[Moments]:
        top, _ = z
        low = Moments(0.6 * top.flip(1), 0.5 + 0.5 * top.sigmoid(), top)
        return [Moments(torch.zeros_like(top), torch.ones_like(top), None), low]

    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NotImplementedError("the eight modes have no images: draw")

    def decode(
        self, u: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        raise NotImplementedError("the eight modes have no images: to_z")

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """Exact draws of u, (n, 4)."""
        modes = torch.randint(8, (n,), generator=generator)
        return self.means[modes] + 0.3 * torch.randn(n, 4, generator=generator).double()

    def oracle(self, schedule: Schedule, classes: int = 1) -> Function:
        """F*[y](z, t) = log q_t(u, y) + |u|^2/2 + const, given to the bottom layer.

        Mode m is of class m % classes: 4 are the corners, 1 is the log-sum-exp over all.
        """

        def f(z: list[Tensor], t: Tensor) -> Tensor:
            u = self.to_u(z)
            a = at(schedule.alpha_bar, t, u)
            v = 0.09 * a**2 + 1 - a**2
            off = (u.unsqueeze(1) - a.unsqueeze(2) * self.means).square().sum(2) / (2 * v)
            log_q = torch.logsumexp(-off.unflatten(1, (-1, classes)), dim=1) - 2 * v.log()
            total = log_q + 0.5 * u.square().sum(1, keepdim=True)
            return torch.cat([torch.zeros_like(total[:, :1]), total], dim=1)

        return f


class Energies(nn.Module):
    """Energies given by a function, in the networks' place; they count their evaluations."""

    def __init__(self, function: Function, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))  # tells device and precision
        self.calls = 0

    def at(self, t: Tensor) -> Columns:
        return Columns(self, t)

    def pair(self, z: list[Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        first, second = (self([part.chunk(2)[i] for part in z], t) for i in (0, 1))
        return first, second

    def forward(self, z: list[Tensor], t: Tensor) -> Tensor:
        self.calls += 1
        return self.function(z, t) + 0 * self.weight + 0 * z[0].flatten(1)[:, :1]


def oracle_prior(max_T: int = 3, b2: float = 0.1, **changes: Any) -> EBMPrior:
    """The prior of the eight modes with their exact energies, in float64; plain step rule."""
    settings: dict[str, Any] = {"network": "mlp", "width": 4, "energy_scale": "none"}
    settings |= {"step_rule": "plain", "max_T": max_T, "b2": b2, **changes}
    modes = EightModes()
    prior = EBMPrior(modes, PriorConfig(modes.layout.shapes, **settings))
    prior.energies = Energies(modes.oracle(prior.schedule)).eval()
    return prior


def energy_distance(x: Tensor, y: Tensor) -> float:
    """2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased, of draws (n, D) and (m, D)."""

    def within(a: Tensor) -> Tensor:
        return torch.pdist(a).mean()

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))
