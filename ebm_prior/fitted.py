"""The fitted Gaussian: the cheapest prior that closes part of the hole, a control for the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone
from ebm_prior.base import Prior
from ebm_prior.config import PriorConfig
from ebm_prior.coupling import sum_of
from ebm_prior.latents import Layout

EPSILON = 1e-6  # the least variance beside the low-rank part
BLOCK = 4096  # coordinates taken to double precision at once


class FittedGaussian:
    r"""A Gaussian with the mean and the full covariance of the aggregate posterior's u.

    It costs seconds and knows second moments only, across all layers. An energy-based prior has
    learned something when it does better.

    Args:
        u: (N, D) posterior draws in u-space, N > D: fewer give a covariance without full rank.

    Raises:
        ValueError: too few draws, a wrong shape, or values that are not finite.
    """

    def __init__(self, u: Tensor) -> None:
        self.mean, self.cholesky = full(u)
        self.dtype, self.device = u.dtype, u.device

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw u, (num, D): mean plus Cholesky factor times standard normal noise."""
        noise = torch.randn(
            num, len(self.mean), generator=generator, device=self.device, dtype=torch.float64
        )
        return (self.mean + noise @ self.cholesky.T).to(self.dtype)


class Covariance(nn.Module):
    """Mean (D,), factor W (D, R) and diagonal d (D,) of N(mean, W W^T + diag(d)).

    Rank 0 has no diagonal: W (D, D) is the Cholesky factor. N(0, I) until fitted or loaded.
    """

    mean: Tensor
    factor: Tensor
    diagonal: Tensor | None

    def __init__(self, dim: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("factor", torch.zeros(dim, rank) if rank else torch.eye(dim))
        self.register_buffer("diagonal", torch.ones(dim) if rank else None)


class FittedPrior(Prior):
    """A Gaussian in u-space fitted to the aggregate posterior, not trained.

    `config.rank` 0 keeps the full covariance; r > 0 keeps r directions beside a diagonal, for
    latents too many for the other, see `low_rank`.

    Attributes:
        gaussian: what was fitted; a file holds it.
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__(backbone, config)
        self.gaussian = self.networks(config)
        self.eval()

    @classmethod
    def networks(cls, config: PriorConfig) -> Covariance:
        return Covariance(Layout(config.shapes).dim, config.rank)

    @classmethod
    def check_learned(cls, config: PriorConfig, learned: Mapping[str, Tensor]) -> None:
        """A covariance: else samples were not numbers, without a word."""
        factor = learned["factor"]
        if config.rank:
            if config.rank >= len(factor):
                raise ValueError(f"rank {config.rank} of {len(factor)} coordinates: not a low one")
            variances, name = learned["diagonal"], "variances beside the factor"
        else:
            variances, name = factor.diagonal(), "values on the Cholesky factor's diagonal"
            if factor.triu(1).any():
                raise ValueError("the Cholesky factor is not lower triangular")
        if not (variances > 0).all():
            raise ValueError(f"{int((variances <= 0).sum())} {name} are not positive")

    @property
    def learned(self) -> nn.Module:
        return self.gaussian

    @classmethod
    def fit(cls, backbone: Backbone, config: PriorConfig, u: Tensor) -> FittedPrior:
        """The prior with the moments of posterior draws u, (N, D), on their device.

        Raises:
            ValueError: too few draws, a wrong shape, or values that are not finite.
        """
        if u.ndim != 2 or u.shape[1] != backbone.layout.dim:
            raise ValueError(
                f"u has shape {tuple(u.shape)}, expected (N, {backbone.layout.dim}): posterior"
                " draws of this backbone"
            )
        fitted = low_rank(u, config.rank) if config.rank else full(u)
        prior = cls(backbone, config).to(u)
        names = prior.gaussian.state_dict()  # in the order of what was fitted
        prior.gaussian.load_state_dict(dict(zip(names, fitted, strict=True)))
        return prior

    @torch.no_grad()
    def sample_u(
        self,
        num: int,
        *,
        generator: torch.Generator | None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw u, (num, D); the callback gets (1, noise) and (0, u)."""
        mean, factor, diagonal = self.gaussian.mean, self.gaussian.factor, self.gaussian.diagonal
        noise = langevin.standard_normal(mean.new_empty(num, len(mean)), generator)
        if diagonal is None:
            u = mean + noise @ factor.T
        else:
            few = langevin.standard_normal(mean.new_empty(num, factor.shape[1]), generator)
            u = mean + few @ factor.T + diagonal.sqrt() * noise
        if callback is not None:
            callback(1, noise)
            callback(0, u)
        return u

    def energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B,): log N(u; 0, I) - log N(u; fit); there is no diffusion, t is not looked at."""
        factor, diagonal = self.gaussian.factor.double(), self.gaussian.diagonal
        off = (u.double() - self.gaussian.mean.double()).T
        if diagonal is None:
            white = torch.linalg.solve_triangular(factor, off, upper=False)
            mahalanobis, half_log_det = white.square().sum(0), factor.diagonal().log().sum()
        else:  # Woodbury's identity: only r x r is inverted
            root = diagonal.double().sqrt().unsqueeze(1)
            white, factor = off / root, factor / root
            eye = torch.eye(factor.shape[1]).to(factor)
            inner = torch.linalg.cholesky(eye + factor.T @ factor)
            explained = torch.linalg.solve_triangular(inner, factor.T @ white, upper=False)
            mahalanobis = white.square().sum(0) - explained.square().sum(0)
            half_log_det = root.log().sum() + inner.diagonal().log().sum()
        return (0.5 * (mahalanobis - u.double().square().sum(1)) + half_log_det).to(u.dtype)


def full(u: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (D,) and Cholesky factor (D, D) of the covariance of u, (N, D), in double precision."""
    if u.ndim != 2 or len(u) <= u.shape[1]:
        raise ValueError(
            f"u has shape {tuple(u.shape)}, expected (N, D) with N > D: the covariance of D"
            " coordinates needs more than D draws; take more, or a low rank"
        )
    _check_finite(u)
    double = u.double()
    return double.mean(0), torch.linalg.cholesky(double.T.cov())


def low_rank(u: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    r"""Mean (D,), factor W (D, r) and diagonal d (D,) of a covariance of few directions.

    .. math:: W = V \,\text{diag}(\lambda_j - s^2)^{1/2}, \qquad
        d_i = \max(\text{var}_i - |W_i|^2, \epsilon), \qquad
        s^2 = (\textstyle\sum_i \text{var}_i - \sum_j \lambda_j) / (D - r)

    with V the r leading principal directions: probabilistic PCA, but with every coordinate's own
    variance. V comes from the first half of the draws, lambda_j, the variances along it, and s^2
    from the second: of fewer draws than coordinates PCA makes directions of variance up to
    (1 + sqrt(D/N))^2 out of white noise. Measured anew these have none beyond s^2.

    Args:
        u: (N, D) posterior draws in u-space; several draws of an image stand together, so that
            the halves are of different images.
        rank: r, less than D and N/2.
    """
    half = len(u) // 2
    if u.ndim != 2 or not rank < min(half, u.shape[1]):
        raise ValueError(
            f"u has shape {tuple(u.shape)}, expected (N, D) with N/2 and D above the rank {rank}:"
            " take more draws or a lower rank (0 = full covariance)"
        )
    _check_finite(u)
    v = principal_directions(u[:half], rank)
    pairs = zip(u[half:].split(BLOCK, dim=1), v.split(BLOCK), strict=True)
    along = sum_of([block.double() @ part for block, part in pairs]).var(0)
    _mean, variance = _mean_and_variance(u[half:])
    rest = (variance.sum() - along.sum()) / (len(v) - rank)
    mean, variance = _mean_and_variance(u)
    factor = v * (along - rest).clamp_min(0).sqrt()
    return mean, factor, (variance - factor.square().sum(1)).clamp_min(EPSILON)


def principal_directions(u: Tensor, rank: int) -> Tensor:
    """(D, r), orthonormal, double: exact, through the smaller of covariance and Gram matrix."""
    x = u - u.mean(0)
    if x.shape[1] <= len(x):
        x = x.double()
        return torch.linalg.eigh(x.T @ x).eigenvectors[:, -rank:]
    gram = x.new_zeros(len(x), len(x), dtype=torch.float64)
    for block in x.split(BLOCK, dim=1):
        gram.addmm_(block.double(), block.double().T)
    values, vectors = torch.linalg.eigh(gram)
    # Draws of fewer than r directions leave the further ones without a length: near zero.
    lengths = values[-rank:].clamp_min(1e-12 * float(values[-1]) + EPSILON**2).sqrt()
    blocks = (block.double().T @ vectors[:, -rank:] for block in x.split(BLOCK, dim=1))
    return torch.cat(list(blocks)) / lengths


def _mean_and_variance(u: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) each, double, a block of coordinates at a time."""
    blocks = [(b.mean(0), b.var(0)) for b in map(Tensor.double, u.split(BLOCK, dim=1))]
    mean, variance = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return mean, variance


def _check_finite(u: Tensor) -> None:
    if not torch.isfinite(u).all():
        raise ValueError("u holds values that are not finite; check the backbone's posterior")
