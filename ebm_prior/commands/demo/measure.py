"""What the demo measures: five kinds of samples against the real digits, in two feature spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_prior.commands.demo.features import DigitClassifier, PixelComponents
from ebm_prior.fitted import FittedGaussian
from ebm_prior.prior import EBMPrior
from nvae.metrics import frechet_distance

CONFIDENT = 0.95  # the classifier's probability from which an image counts as legible
FIT_DRAWS = 4  # posterior draws per training image for the fitted Gaussian's covariance

# Kind of sample -> what it is called in table and picture; in the picture two stand side by side.
KINDS = {
    "gaussian": "Gaussian prior",
    "ebm": "EBM prior",
    "no_model_chain": "chain, f = 0",
    "fitted_gaussian": "fitted Gaussian",
    "reconstruction": "reconstructions",
}


@dataclass(frozen=True)
class Ruler:
    """The feature spaces and the reference digits in them."""

    classifier: DigitClassifier
    components: PixelComponents
    reference: Tensor

    def measure(self, images: Tensor) -> dict[str, float]:
        """Fréchet distance to the reference in both spaces, and the share of legible images."""
        spaces: dict[str, Callable[[Tensor], Tensor]] = {
            "frechet": self.classifier.features,
            "frechet_pixels": self.components.features,
        }
        row = {
            name: frechet_distance(features(self.reference), features(images))
            for name, features in spaces.items()
        }
        probabilities = self.classifier(images).softmax(1)
        row["confident"] = float((probabilities.amax(1) > CONFIDENT).float().mean())
        return row


@torch.no_grad()
def draw(prior: EBMPrior, images: Tensor, num: int, seed: int) -> dict[str, Tensor]:
    """Draw `num` images of every kind, each kind with noise of its own.

    Args:
        images: training images: what reconstructions start from and the fitted Gaussian is
            fitted to.
        num: at most the number of training images: each is reconstructed once.
    """
    backbone = prior.backbone
    if num > len(images):
        raise ValueError(f"{num} samples of each kind, but only {len(images)} training images")

    def noise(kind: str) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * seed + list(KINDS).index(kind))

    def aggregate(generator: torch.Generator, x: Tensor) -> Tensor:
        return torch.cat([backbone.infer(part, generator=generator) for part in x.split(500)])

    def u_of(kind: str, generator: torch.Generator) -> Tensor:
        if kind == "gaussian":
            return torch.randn(num, prior.layout.dim, generator=generator)
        if kind == "no_model_chain":
            return prior.sample_u(num, generator=generator, zero_energy=True)
        if kind == "ebm":
            return prior.sample_u(num, generator=generator)
        if kind == "fitted_gaussian":
            draws = aggregate(generator, images.repeat(FIT_DRAWS, 1, 1, 1))
            return FittedGaussian(draws).sample(num, generator)
        return aggregate(generator, images[:num])

    samples = {}
    for kind in KINDS:
        generator = noise(kind)
        u = u_of(kind, generator)
        samples[kind] = torch.cat(
            [backbone.decode(part, generator=generator) for part in u.split(500)]
        )
    return samples


def table(ruler: Ruler, samples: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Measure every kind: ``{"frechet": {kind: value}, "frechet_pixels": ..., ...}``."""
    rows = {kind: ruler.measure(images) for kind, images in samples.items()}
    return {
        quantity: {kind: row[quantity] for kind, row in rows.items()}
        for quantity in ("frechet", "frechet_pixels", "confident")
    }
