"""What the demo measures: five kinds of samples against the real digits, in two feature spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.fitted import FittedGaussian
from ebm_prior.prior import EBMPrior

FIT_DRAWS = 4  # posterior draws per training image for the fitted Gaussian's covariance

# Kind of sample -> what it is called in table and picture; in the picture two stand side by side.
KINDS = {
    "gaussian": "Gaussian prior",
    "ebm": "EBM prior",
    "no_model_chain": "chain, f = 0",
    "fitted_gaussian": "fitted Gaussian",
    "reconstruction": "reconstructions",
}


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
