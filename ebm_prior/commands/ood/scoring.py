"""The scores of all sets, in blocks of images dealt out to the processes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ebm_prior import ood
from ebm_prior.commands.shared.session import Job
from ebm_prior.prior import EBMPrior
from nvae.data import ImageSet

CONTROL = "control"  # |u|^2 / 2 of the same layers: needs no energies
Scores = dict[str, np.ndarray]  # scheme or control -> (n, len(ks))


@dataclass(frozen=True)
class Plan:
    """What is scored, and with which random numbers."""

    schemes: tuple[str, ...]
    ks: tuple[int, ...]
    draws: int
    perturb: bool
    state: int
    seed: int

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.schemes, CONTROL)


def choose(images: ImageSet, limit: int | None, seed: int) -> list[int]:
    """The numbers of at most `limit` images of a set, random ones where it has more."""
    if limit is None or len(images) <= limit:
        return list(range(len(images)))
    draw = np.random.default_rng(seed)
    return sorted(draw.choice(len(images), limit, replace=False).tolist())


def set_scores(
    job: Job, prior: EBMPrior, name: str, images: ImageSet, chosen: list[int], plan: Plan
) -> Scores:
    """Scores of the chosen images of a set, the same on all processes."""

    def make(first: int, count: int) -> Tensor:
        numbers = chosen[first : first + count]
        x = torch.stack([images[number] for number in numbers]).to(job.here.device)
        return block_scores(prior, x, numbers, plan).double()

    found = job.blocks(len(chosen), name, make).numpy()
    return {kind: found[:, i] for i, kind in enumerate(plan.kinds)}


@torch.no_grad()
def block_scores(prior: EBMPrior, x: Tensor, numbers: list[int], plan: Plan) -> Tensor:
    """Scores of images (B, C, H, W) by their numbers in the set: (B, kinds, len(ks)).

    The mean over the draws.
    """
    ks, total = list(plan.ks), torch.zeros((), device=x.device)
    for draw in range(plan.draws):
        noise = ood.ImageNoise(plan.seed, numbers, draw)
        u = ood.posterior(prior.backbone, x, noise)
        near = ood.perturb(prior, u, 0, noise) if plan.perturb else u
        found = {CONTROL: ood.gaussian_scores(prior.layout, near)[:, ks]}
        if "inference" in plan.schemes:
            found["inference"] = ood.scores(prior, near)[:, ks]
        if "diffusion" in plan.schemes:
            found["diffusion"] = ood.diffusion_scores(prior, u, ks, noise, state=plan.state)
        total = total + torch.stack([found[kind] for kind in plan.kinds], 1)
    return total / plan.draws
