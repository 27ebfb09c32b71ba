"""How far a VAE's aggregate posterior is from its prior, as a table."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from ebm_prior import hole
from ebm_prior.backbones.files import Opened
from ebm_prior.commands.doctor.checks import OK, PROBLEM, Check, Checks
from ebm_prior.seeds import seeded

MAX_IMAGES = 2000
HELD = 5  # one image in so many is held out
DRAWS, ENOUGH = 8, 8000  # posterior draws of an image at most; of all images together
MEMORY = 2**28  # numbers in these draws


def measured(args: argparse.Namespace, backbone: Opened, results: dict[str, Any]) -> Checks:
    """Train the discriminators and print what they find."""
    from nvae import data

    config, device = backbone.config, backbone.device
    name = args.dataset or config.dataset
    if args.data is None and name != "digits":
        yield Check(PROBLEM, "hole", f"give --data, the folder that holds the images of {name}")
        return
    found = data.load(name, args.data, True, config=config)
    order = torch.randperm(len(found), generator=seeded("cpu", args.seed, 2))
    images = torch.stack([found[int(i)] for i in order[: args.max_images or MAX_IMAGES]])
    held, train = images[::HELD], images[torch.arange(len(images)) % HELD != 0]
    draws = max(
        1, min(DRAWS, ENOUGH // len(train), MEMORY // (train.shape[0] * backbone.layout.dim))
    )

    def infer(x: Tensor, *key: int) -> Tensor:
        blocks = (
            backbone.infer(block.to(device), seeded(device, args.seed, *key, first))
            for first, block in enumerate(x.split(args.batch_size))
        )
        return torch.cat(list(blocks))

    u, u_held = torch.stack([infer(train, 3, i) for i in range(draws)]), infer(held, 4)
    of_u = hole.statistics(backbone.layout, u.flatten(0, 1))
    for what, values in zip(("std", "mean"), zip(*of_u, strict=True), strict=True):
        yield Check(OK, f"posterior u {what}", _few(values))
    gaps: list[hole.Gap] = []
    text = f"{len(train)} images, {draws} draws each; {len(held)} images held out; nats are a"
    yield Check(OK, "hole", f"{text} lower bound on KL(posterior, prior) per image")
    for gap in hole.survey(
        backbone, u, u_held, steps=args.hole_steps, generator=seeded(device, args.seed, 5)
    ):
        gaps.append(gap)
        more = "> " if gap.saturated else ""
        text = f"{gap.network:<5}{more}{gap.nats:.2f} ± {gap.standard_error:.2f} nats, accuracy"
        yield Check(OK, f"  {gap.compared}", f"{text} {gap.accuracy:.2f}, {gap.seconds:.0f} s")
    told = hole.advice(gaps)
    yield Check(OK, "hole", told)
    results["hole"] = {
        "images": len(train),
        "held_out": len(held),
        "draws": draws,
        "u": [layer._asdict() for layer in of_u],
        "gaps": hole.report(gaps),
        "advice": told,
    }


def _few(values: tuple[float, ...]) -> str:
    """Of every layer, or of many the range."""
    if len(values) <= 8:
        return ", ".join(f"{value:.3f}" for value in values) + " (top layer first)"
    return f"{min(values):.3f} to {max(values):.3f} over {len(values)} layers"
