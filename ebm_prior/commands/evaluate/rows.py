"""The rows of the report: what each one draws."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ebm_prior.base import Prior
from ebm_prior.commands.evaluate import LARGEST_FIT
from ebm_prior.commands.shared import sampler
from ebm_prior.commands.shared.rows import Row, drawn_by, gaussian_row
from ebm_prior.commands.shared.session import Job
from ebm_prior.commands.shared.subset import Images, draws_of, posterior
from ebm_prior.config import PriorConfig
from ebm_prior.fitted import FittedPrior
from ebm_prior.seeds import seeded
from nvae.digest import sha256

MOST_SAMPLES = 50_000
FIT_DRAWS = 4  # posterior draws per image for the fitted Gaussian, where images are few
FEW = 10_000
RANK = 512  # of the covariance, where latents are too many for a full one

# Kind of prior -> name and label of its row.
KINDS = {
    "diffusion": ("ebm", "EBM prior"),
    "joint": ("joint", "joint EBM prior"),
    "ncp": ("ncp", "NCP prior"),
    "fitted": ("fitted", "fitted Gaussian"),
}


def all_rows(job: Job, images: Images | None) -> list[Row]:
    """Gaussian, controls, the priors given, reconstructions; everything is opened and checked.

    Rows without a prior of their own use the BatchNorm statistics of the first prior.

    Args:
        images: training images, for reconstructions and the fitted Gaussian.
    """
    args = job.args
    priors = [job.open_prior(path) for path in args.prior]
    drawing = [_chain(job, prior) for prior in priors]
    first = priors[0] if priors else None
    backbone = first.backbone if first else job.backbone
    rows = [gaussian_row(job, backbone)]
    if args.controls is not False:
        rows += _chains(priors, drawing)
        given = any(prior.config.kind == "fitted" for prior in priors)
        dim = backbone.layout.dim
        if images is not None and not given and (args.controls or _fits(images, dim)):
            rows.append(_fitted(replace(job, prior=first), images))
    for path, prior, chain in zip(args.prior, priors, drawing, strict=True):
        name, label = KINDS[prior.config.kind]
        facts = {"prior": str(path), "sha256": sha256(path), "config": prior.config.to_dict()}
        facts |= {**chain, **sampler.described(prior)}
        draw = drawn_by(prior, **chain)
        rows.append(Row(name, label, draw, prior.backbone, name, prior, facts))
    if args.reconstruction and images is not None:
        rows.append(_reconstructions(images, job.here.device, backbone))
    return _told_apart(rows)


def _chain(job: Job, prior: Prior) -> dict[str, Any]:
    """Give a diffusion prior the sampler and the steps that were asked for; others have none."""
    if prior.config.kind != "diffusion":
        return {}
    return sampler.choose(prior, job.args.sampler, job.args.num_steps, job.batch_size)


def _chains(priors: Sequence[Prior], drawing: Sequence[dict[str, Any]]) -> list[Row]:
    """The chain of every diffusion prior with f = 0; chains of equal settings are one row."""
    rows: dict[str, Row] = {}
    for prior, chain in zip(priors, drawing, strict=True):
        if prior.config.kind != "diffusion":
            continue
        names = ("max_T", "num_steps", "b2", "step_rule", "last_step_kernel")
        facts = {name: getattr(prior.config, name) for name in names}
        facts |= {**chain, **sampler.described(prior)}
        draw = drawn_by(prior, **chain, zero_energy=True)
        name = "no_model_chain"
        row = Row(name, "chain, f = 0", draw, prior.backbone, name, facts=facts)
        rows.setdefault(json.dumps(facts), row)
    return list(rows.values())


def _repeats(images: Images) -> int:
    return FIT_DRAWS if len(images) <= FEW else 1


def _fits(images: Images, dim: int) -> bool:
    """Whether a full covariance is soon had."""
    return dim <= LARGEST_FIT and _repeats(images) * len(images) > dim


def _fitted(job: Job, images: Images) -> Row:
    """The Gaussian fitted on the spot: the cheapest prior that knows the aggregate posterior."""
    backbone = job.backbone_in_use
    which = draws_of(len(images), _repeats(images), backbone.layout.dim)[:MOST_SAMPLES]
    rank = 0 if backbone.layout.dim <= LARGEST_FIT else RANK
    config = PriorConfig(shapes=backbone.layout.shapes, kind="fitted", rank=rank)
    found: list[Prior] = []

    def infer(first: int, count: int) -> Tensor:
        generator = job.generator("infer", "fit", first)
        return posterior(backbone, images, which[first : first + count], generator)

    def fit() -> None:
        if not found:
            u = job.blocks(len(which), "posterior", infer).to(job.here.device)
            found.append(FittedPrior.fit(backbone, config, u))

    def draw(first: int, count: int, generator: torch.Generator) -> Tensor:
        return found[0].sample_u(count, generator=generator)

    facts = {
        "covariance_rank": rank or "full",
        "posterior_draws": len(which),
        "seed_of_fit": job.seed,
    }
    return Row("fitted", "fitted Gaussian", draw, backbone, "fitted", facts=facts, prepare=fit)


def _reconstructions(images: Images, device: torch.device, backbone: Any) -> Row:
    order = torch.randperm(len(images), generator=seeded("cpu", len(images)))

    def draw(first: int, count: int, generator: torch.Generator) -> Tensor:
        x = images[order[first : first + count]].to(device)
        return backbone.infer(x, generator)

    facts = {"reconstructed": "training images, one posterior draw each"}
    name = "reconstruction"
    return Row(name, "reconstructions", draw, backbone, name, facts=facts, most=len(images))


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """The second row of a name becomes name_2."""
    seen: dict[str, int] = {}
    result = []
    for row in rows:
        number = seen[row.name] = seen.get(row.name, 0) + 1
        if number > 1:
            row = replace(row, name=f"{row.name}_{number}", label=f"{row.label} {number}")
        result.append(row)
    return result
