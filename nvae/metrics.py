"""The Fréchet distance between two sets of features, through torchmetrics."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Features(nn.Module):
    """Feature vectors pass unchanged: torchmetrics asks for a network, ours has run already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(reference: Tensor, features: Tensor) -> float:
    r"""Fréchet distance between Gaussians fitted to two sets of features (contract 6.7).

    .. math:: |m_1 - m_2|^2 + \mathrm{tr}\,(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    with unbiased covariances, in float64. With the 2048 features of the FID Inception network this
    is the FID; with any other features call it by their name.

    Args:
        reference: (N, F), N >= 2.
        features: (M, F), M >= 2.

    Raises:
        ValueError: shapes do not fit, or a feature is not finite.
    """
    for name, value in (("reference", reference), ("features", features)):
        if value.ndim != 2 or len(value) < 2 or value.shape[1] != reference.shape[-1]:
            raise ValueError(
                f"{name}: got shape {tuple(value.shape)}, expected (N, F) with N >= 2 and the same"
                f" F as the reference {tuple(reference.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"{name}: some features are not finite; look at the images first")
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Features(reference.shape[1])).set_dtype(
        torch.float64
    )
    metric.update(reference.double().cpu(), real=True)
    metric.update(features.double().cpu(), real=False)
    return float(metric.compute())
