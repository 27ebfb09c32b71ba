"""How well a score tells two sets of images apart; the foreign set is the positive class.

AUROC with ties half (scipy), average precision and the false alarms at 80% of detections
(torchmetrics); standard errors of AUROCs and of their differences after DeLong, DeLong and
Clarke-Pearson (1988).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

DETECTED = 0.8  # the share of foreign images that `fpr80` is to find


class Detection(NamedTuple):
    """Scores larger for foreign images: 1, 1, 0 is perfect; the AUROC of a coin is 1/2."""

    auroc: float
    auprc: float
    fpr80: float


def detection(own: np.ndarray, foreign: np.ndarray) -> Detection:
    """Metrics of the scores (n,) of own images and (m,) of foreign ones."""
    import torch
    from scipy.stats import mannwhitneyu
    from torchmetrics.functional.classification import binary_average_precision, binary_roc

    both = torch.from_numpy(np.concatenate([own, foreign]))
    if not (len(own) and len(foreign) and both.isfinite().all()):
        raise ValueError(
            f"{len(own)} scores of own images and {len(foreign)} of foreign ones, expected at"
            " least one of each and finite numbers: look at the prior with `ebm_prior doctor`"
        )
    # Ranks in [0, 1], ties kept: torchmetrics squashes what lies outside, and loses order.
    _, rank = both.unique(return_inverse=True)
    rank = rank.double() / max(1, int(rank.max()))
    is_foreign = (torch.arange(len(both)) >= len(own)).long()
    fpr, tpr, _ = binary_roc(rank, is_foreign)
    above = mannwhitneyu(foreign, own, method="asymptotic").statistic
    return Detection(
        float(above) / (len(own) * len(foreign)),
        float(binary_average_precision(rank, is_foreign)),
        float(fpr[tpr >= DETECTED].min()),
    )


@dataclass(frozen=True)
class Placements:
    """Where each score lies in the other set; the mean of either array is the AUROC.

    Attributes:
        own: (n,), per own image the share of foreign scores above it, ties half.
        foreign: (m,), per foreign image the share of own scores below it, ties half.
    """

    own: np.ndarray
    foreign: np.ndarray

    @classmethod
    def of(cls, own: np.ndarray, foreign: np.ndarray) -> Placements:
        from scipy.stats import rankdata

        ranks = rankdata(np.concatenate([own, foreign]))
        below_own = (ranks[: len(own)] - rankdata(own)) / len(foreign)
        below_foreign = (ranks[len(own) :] - rankdata(foreign)) / len(own)
        return cls(1 - below_own, below_foreign)

    def __sub__(self, other: Placements) -> Placements:
        """Of the difference of two AUROCs on the same images."""
        return Placements(self.own - other.own, self.foreign - other.foreign)


def mean_auroc(sets: Sequence[Placements]) -> tuple[float, float]:
    """Mean AUROC (or difference) of foreign sets against the same own images, and its error.

    The error is that of other images from the same sources, the sets taken as independent.
    """
    foreign = [placed.foreign for placed in sets]
    own = np.mean([placed.own for placed in sets], axis=0)
    variance = _of_mean(own) + sum(map(_of_mean, foreign)) / len(sets) ** 2
    return float(np.mean([part.mean() for part in foreign])), float(np.sqrt(variance))


def _of_mean(values: np.ndarray) -> float:
    return float(values.var(ddof=1)) / len(values) if len(values) > 1 else float("inf")
