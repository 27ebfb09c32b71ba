"""Backbones whose every answer is known, so that no test of the prior needs a trained VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ebm_prior.backbones.base import Moments
from ebm_prior.energy import Columns
from ebm_prior.latents import Layout
from ebm_prior.schedule import at


class LinearGaussian:
    """z = M u + m with M block lower triangular: a hierarchy whose T is one matrix.

    The top layer is 1.01 u, the others z_i = A_i z_above + b_i + D_i u_i.
    """

    def __init__(self, sizes=(2, 2, 3), seed=0, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        self.layout, self.dtype = Layout(tuple((n,) for n in sizes)), dtype
        dim = sum(sizes)
        coupling, scale = torch.zeros(dim, dim, dtype=dtype), torch.full((dim,), 1.01, dtype=dtype)
        offset = torch.zeros(dim, dtype=dtype)
        for end, n in zip(torch.tensor(sizes).cumsum(0).tolist()[1:], sizes[1:], strict=True):
            rows = slice(end - n, end)
            coupling[rows, : end - n] = torch.randn(n, end - n, generator=g, dtype=dtype) / 2
            offset[rows] = torch.randn(n, generator=g, dtype=dtype)
            scale[rows] = 0.5 + torch.rand(n, generator=g, dtype=dtype)
        inverse = torch.linalg.inv(torch.eye(dim, dtype=dtype) - coupling)
        self.M, self.m = inverse @ scale.diag(), inverse @ offset
        self.log_det = scale.log().sum()
        self.coupling, self.offset, self.scale = coupling, offset, scale

    def to_z(self, u, temperature=1.0):
        return self.layout.split(temperature * u @ self.M.T + self.m)

    def to_u(self, z):
        return torch.linalg.solve(self.M, (self.layout.join(z) - self.m).T).T

    def moments(self, z):
        """The state before z_i is added is all of z above."""
        flat = self.layout.join(z)
        means = self.layout.split(flat @ self.coupling.T + self.offset)
        stds = self.layout.split(self.scale.expand_as(flat))
        above = [None, *(torch.cat(z[:i], dim=1) for i in range(1, len(z)))]
        return [Moments(*parts) for parts in zip(means, stds, above, strict=True)]

    def infer(self, x, generator=None):
        return x

    def decode(self, u, temperature=1.0, generator=None):
        return temperature * u


class ExplicitHierarchy:
    """The three-layer top-down function of the goldens (contract, goldens.md).

    `decode` gives sigmoid of the last state, what the goldens call x.
    """

    def __init__(self, weights):
        self.layout = Layout(((3, 8, 8), (3, 8, 8), (2, 16, 16)))
        self.w = weights

    def walk(self, temperature, choose):
        """`choose(i, mean, std)` gives z_i; returns the last state and all z."""
        w = self.w
        z = [choose(0, 0.0, 1.01 * temperature)]
        h = torch.tanh(F.conv2d(z[0], w["h0_w"], w["h0_b"], padding=1))
        for i in (1, 2):
            if self.layout.shapes[i][1] > h.shape[2]:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
            mean, log_std = F.conv2d(h, w[f"p{i}_w"], w[f"p{i}_b"]).chunk(2, dim=1)
            mean, std = 5 * torch.tanh(mean / 5), torch.exp(5 * torch.tanh(log_std / 5)) + 0.01
            z.append(choose(i, mean, std * temperature))
            both = torch.cat([h, z[i]], dim=1)
            h = h + torch.tanh(F.conv2d(both, w[f"h{i}_w"], w[f"h{i}_b"], padding=1))
        return h, z

    def to_z(self, u, temperature=1.0):
        parts = self.layout.split(u)
        return self.walk(temperature, lambda i, mean, std: mean + std * parts[i])[1]

    def to_u(self, z):
        parts = []

        def given(i, mean, std):
            parts.append((z[i] - mean) / std)
            return z[i]

        self.walk(1.0, given)
        return self.layout.join(parts)

    def decode(self, u, temperature=1.0, generator=None):
        parts = self.layout.split(u)
        h, _ = self.walk(temperature, lambda i, mean, std: mean + std * parts[i])
        return torch.sigmoid(h)

    def infer(self, x, generator=None):
        raise NotImplementedError("the goldens give posterior draws")


class EightModes:
    """Two layers of 2; in u, eight equal Gaussians of deviation 0.3."""

    layout = Layout(((2,), (2,)))

    def __init__(self):
        angle = (torch.arange(4) * 90 + 45).deg2rad().double()
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0]).double()
        top = 1.1 * torch.stack([angle.cos(), angle.sin()], dim=1)
        self.means = torch.cat(
            [torch.cat([top, 0.9 * s * torch.stack([sign**0, sign], 1)], 1) for s in (1.0, -1.0)]
        )

    def to_z(self, u, temperature=1.0):
        top, low = self.layout.split(temperature * u)
        return [top, 0.6 * top.flip(1) + (0.5 + 0.5 * top.sigmoid()) * low]

    def to_u(self, z):
        top, low = z
        return self.layout.join([top, (low - 0.6 * top.flip(1)) / (0.5 + 0.5 * top.sigmoid())])

    def moments(self, z):
        top, _ = z
        low = Moments(0.6 * top.flip(1), 0.5 + 0.5 * top.sigmoid(), top)
        return [Moments(torch.zeros_like(top), torch.ones_like(top), None), low]

    def draw(self, n, generator):
        modes = torch.randint(8, (n,), generator=generator)
        return self.means[modes] + 0.3 * torch.randn(n, 4, generator=generator).double()

    def oracle(self, schedule, classes=1):
        """F*[y](z, t) = log q_t(u, y) + |u|^2/2 + const, given to the bottom layer.

        Mode m is of class m % classes: 4 are the corners, 1 is the log-sum-exp over all.
        """

        def f(z, t):
            u = self.to_u(z)
            a = at(schedule.alpha_bar, t, u)
            v = 0.09 * a**2 + 1 - a**2
            off = (u.unsqueeze(1) - a.unsqueeze(2) * self.means).square().sum(2) / (2 * v)
            log_q = torch.logsumexp(-off.unflatten(1, (-1, classes)), dim=1) - 2 * v.log()
            total = log_q + 0.5 * u.square().sum(1, keepdim=True)
            return torch.cat([torch.zeros_like(total[:, :1]), total], dim=1)

        return f


def energy_distance(x, y):
    """2 E|X-Y| - E|X-X'| - E|Y-Y'|, unbiased."""

    def within(a):
        return torch.pdist(a).mean()

    return float(2 * torch.cdist(x, y).mean() - within(x) - within(y))


class Energies(nn.Module):
    """Energies given by a function (z, t) -> (B, L), in the networks' place."""

    def __init__(self, function, dtype=torch.float64):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.zeros((), dtype=dtype))  # tells device and precision
        self.calls = 0

    def at(self, t):
        return Columns(self, t)

    def pair(self, z, t):
        halves = zip(*(part.chunk(2) for part in z), strict=True)
        first, second = (self(half, t) for half in halves)
        return first, second

    def forward(self, z, t):
        self.calls += 1
        return self.function(z, t) + 0 * self.weight + 0 * z[0].flatten(1)[:, :1]
