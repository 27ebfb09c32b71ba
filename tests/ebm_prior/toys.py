"""Backbones whose every answer is known, so that no test of the prior needs a trained VAE."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ebm_prior.backbones.base import Moments
from ebm_prior.latents import Layout
from ebm_prior.testbed import EightModes as EightModes
from ebm_prior.testbed import Energies as Energies
from ebm_prior.testbed import energy_distance as energy_distance


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
