"""The fitted Gaussian: the cheapest prior that closes part of the hole, a control for the rest."""

from __future__ import annotations

import torch
from torch import Tensor


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
        if u.ndim != 2 or len(u) <= u.shape[1]:
            raise ValueError(
                f"u has shape {tuple(u.shape)}, expected (N, D) with N > D: the covariance of D"
                " coordinates needs more than D draws"
            )
        if not torch.isfinite(u).all():
            raise ValueError("u holds values that are not finite; check the backbone's posterior")
        double = u.double()
        self.mean = double.mean(0)
        self.cholesky = torch.linalg.cholesky(double.T.cov())
        self.dtype, self.device = u.dtype, u.device

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw u, (num, D): mean plus Cholesky factor times standard normal noise."""
        noise = torch.randn(
            num, len(self.mean), generator=generator, device=self.device, dtype=torch.float64
        )
        return (self.mean + noise @ self.cholesky.T).to(self.dtype)
