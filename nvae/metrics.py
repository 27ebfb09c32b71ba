"""Distances between sets of images and the Inception Score, from features, through torchmetrics.

Everything is computed on one process from all features in the order of the images, so the number
of processes that made them changes nothing. With the 2048 features of FID's Inception network the
numbers are FID, KID and IS; with any others they carry the name of the features (`key`).
"""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvae.features import FID
from nvae.runtime import written_whole

KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
IS_SPLITS = 10
PROTOCOL = {
    "kid": f"{KID_SUBSETS} subsets of {KID_SUBSET_SIZE} images, or of all where there are fewer",
    "is": f"{IS_SPLITS} parts",
}


def key(metric: str, label: str) -> str:
    """Name of a number in reports: `fid` is said of FID's own 2048 features and of no others."""
    return metric if label == FID else f"{metric}_{label.partition('-')[0]}"


@dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features; `sample` holds some of the features themselves, for KID."""

    mean: Tensor  # (F,) float64
    covariance: Tensor  # (F, F) float64, divided by n - 1
    label: str | None = None  # of the features; None: the file does not say
    sample: Tensor | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, features: Tensor, **more: Any) -> Statistics:
        """From features (N, F), N of at least 2.

        Raises:
            ValueError: too few, not a matrix, or not finite.
        """
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"features of shape {tuple(features.shape)}; expected (N, F), N >= 2")
        if not torch.isfinite(features).all():
            raise ValueError("some features are not finite; look at the images first")
        features = features.double().cpu()
        return cls(features.mean(0), features.T.cov(), **more)


def frechet(reference: Statistics, other: Statistics) -> float:
    r"""Fréchet distance between two Gaussians (contract 6.7), in float64.

    .. math:: |m_1 - m_2|^2 + \mathrm{tr}\,(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

    Raises:
        ValueError: statistics of different features.
    """
    check_same_features(reference, other.label, len(other.mean))
    from torchmetrics.image.fid import FrechetInceptionDistance

    # Never synchronised: what each process has is everybody's already.
    metric = FrechetInceptionDistance(_Given(len(reference.mean)), sync_on_compute=False)
    metric.set_dtype(torch.float64)
    for name, given in (("real", reference), ("fake", other)):
        metric.update(given.mean[None], real=name == "real")
        # The metric keeps sums. Any count gives back the same moments; 2 loses the fewest digits.
        setattr(metric, f"{name}_features_num_samples", torch.tensor(2))
        setattr(metric, f"{name}_features_sum", 2 * given.mean)
        product = given.covariance + 2 * torch.outer(given.mean, given.mean)
        setattr(metric, f"{name}_features_cov_sum", product)
    return float(metric.compute())


def frechet_distance(reference: Tensor, features: Tensor) -> float:
    """Fréchet distance between Gaussians fitted to features (N, F) and (M, F).

    With the features of FID's Inception network this is the FID; with any others call it by their
    name.

    Raises:
        ValueError: shapes do not fit, or a feature is not finite.
    """
    return frechet(Statistics.of(reference), Statistics.of(features))


def kernel_distance(reference: Tensor, features: Tensor, seed: int = 0) -> tuple[float, float]:
    r"""KID: squared MMD with the kernel :math:`(x^T y / F + 1)^3`; mean and deviation.

    Over 100 subsets of 1000 images (of all, if there are fewer), drawn with the seed.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(reference), len(features))
    with _quietly(seed):
        metric = KernelInceptionDistance(
            _Given(reference.shape[1]),
            subsets=KID_SUBSETS,
            subset_size=size,
            sync_on_compute=False,
        )
        metric.update(reference.double(), real=True)
        metric.update(features.double(), real=False)
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, float]:
    r"""IS: :math:`\exp \mathrm{E}\, KL(p(y|x) \| p(y))`, mean and deviation over ten parts."""
    if len(logits) < 2 * IS_SPLITS:
        raise ValueError(f"{len(logits)} images; the Inception Score needs {2 * IS_SPLITS}")
    from torchmetrics.image.inception import InceptionScore

    with _quietly(seed):
        metric = InceptionScore(_Given(logits.shape[1]), splits=IS_SPLITS, sync_on_compute=False)
        metric.update(logits.double())
        mean, deviation = metric.compute()
    return float(mean), float(deviation)


class _Given(nn.Module):
    """Features pass unchanged: torchmetrics asks for a network, ours has run already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


@contextmanager
def _quietly(seed: int) -> Iterator[None]:
    """Give torchmetrics, which shuffles with PyTorch's global generator, numbers of its own."""
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message=".*save all extracted features.*")
        torch.manual_seed(seed)
        yield


def check_same_features(reference: Statistics, label: str | None, count: int) -> None:
    """Refuse to compare different features.

    Raises:
        ValueError: with both kinds.
    """
    differ = reference.label and label and reference.label != label
    if len(reference.mean) != count or differ:
        told = [
            f"{size} features ({name or 'of no name'})"
            for size, name in ((len(reference.mean), reference.label), (count, label))
        ]
        raise ValueError(
            f"the reference statistics are of {told[0]}, the others of {told[1]}; compute both"
            " with the same --features and --inception"
        )


# --- files


def path_of(folder: str | os.PathLike[str], dataset: str, label: str) -> Path:
    """Where the statistics of a data set are: upstream's name, for other features a longer one."""
    return Path(folder) / f"{key(dataset, label)}.npz"


def write(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write `mu` and `sigma` as the field's programs read them, and what else there is beside."""
    more: dict[str, Any] = {}
    if statistics.sample is not None:
        more["sample"] = statistics.sample.float().numpy()
    with written_whole(path) as temporary:
        np.savez(
            temporary,
            mu=statistics.mean.numpy(),
            sigma=statistics.covariance.numpy(),
            features=np.array(statistics.label or ""),
            protocol=np.array(json.dumps(statistics.protocol)),
            **more,
        )


def read(path: str | os.PathLike[str]) -> Statistics:
    """Read statistics: ours, or any npz with `mu` (F,) and `sigma` (F, F).

    Raises:
        ValueError: missing, damaged, or of other shapes.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: there are no such statistics")
    try:
        with np.load(path, allow_pickle=False) as file:
            mean, covariance = (torch.from_numpy(file[k]).double() for k in ("mu", "sigma"))
            label = str(file["features"]) if "features" in file else ""
            protocol = json.loads(str(file["protocol"])) if "protocol" in file else {}
            sample = torch.from_numpy(file["sample"]) if "sample" in file else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no npz of mu and sigma ({error}); write it again") from None
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape:
        raise ValueError(
            f"{path}: mu of shape {tuple(mean.shape)} and sigma of {tuple(covariance.shape)};"
            " expected (F,) and (F, F)"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(f"{path}: some statistics are not finite; write it again")
    if not label and len(mean) == int(FID):
        label = FID  # the field's files do not say, and mean this
    return Statistics(mean, covariance, label or None, sample, protocol)
