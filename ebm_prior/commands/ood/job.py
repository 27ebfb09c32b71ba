"""The command from files to files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_prior.commands.ood import report
from ebm_prior.commands.ood.scoring import Plan, Scores, choose, set_scores
from ebm_prior.commands.ood.sets import OWN, Source, opened
from ebm_prior.commands.shared import session
from ebm_prior.prior import EBMPrior
from nvae import images, runtime
from nvae.data import ImageSet

SHOWN = 8  # images of each set in examples.png


def score_all(args: argparse.Namespace, ks: list[int] | None, sources: list[Source]) -> None:
    """Score every set, and write what came out.

    Args:
        ks: in rising order; None: every k.
    """
    with session.opened(args) as job:
        prior = job.prior
        if not isinstance(prior, EBMPrior):
            kind = "none" if prior is None else prior.config.kind
            raise ValueError(
                f"--prior {args.prior}: kind {kind}; expected a diffusion or joint prior,"
                " whose energies of t = 0 are the scores"
            )
        layers = prior.layout.num_layers
        ks = list(range(layers)) if ks is None else ks
        if ks[-1] >= layers:
            raise ValueError(
                f"--k {ks[-1]}: this hierarchy has {layers} layers; expected numbers from 0 to"
                f" {layers - 1}"
            )
        own, _ = job.images(train=False)
        sets = {OWN: ImageSet(len(own), own.__getitem__, lambda image: image)}
        for source in sources:
            sets[source.name] = opened(source, own, job.backbone.config, args.seed)
        chosen = {name: choose(found, args.max_images, args.seed) for name, found in sets.items()}
        if job.here.is_main:
            show(job.out / "examples.png", sets, chosen, job.dataset)

        state, perturb = args.perturb_state, args.perturb
        if perturb is None:
            perturb = prior.config.kind == "diffusion"  # the joint prior learns on clean u
        plan = Plan(
            tuple(dict.fromkeys(args.scheme)),
            tuple(ks),
            args.draws,
            perturb,
            min(1, prior.config.max_T - 1) if state is None else state,
            args.seed,
        )
        scores = {
            name: set_scores(job, prior, name, found, chosen[name], plan)
            for name, found in sets.items()
        }
        if not job.here.is_main:
            return
        content = report.contents(scores, ks)
        save(job.out / "scores.npz", scores, chosen, ks)
        report.draw(job.out, scores, content, job.dataset)
        protocol = {
            "own": f"held-out images of {job.dataset}, no flips",
            "images": {name: len(numbers) for name, numbers in chosen.items()},
            "positive_class": "foreign",
            "errors": "standard errors over the choice of images, sets taken as independent",
            "perturb": plan.perturb,
            "perturb_state": plan.state,
        }
        job.report(content, protocol)
        print(report.words(content))
        print(f"Report, scores and figures are in {job.out}")


def show(
    path: Path, sets: Mapping[str, ImageSet], chosen: Mapping[str, list[int]], dataset: str
) -> None:
    """`examples.png`: a row of images of every set."""
    columns = min(SHOWN, *map(len, chosen.values()))
    shown = [sets[name][number] for name in sets for number in chosen[name][:columns]]
    images.save_grid(
        path,
        torch.stack(shown),
        columns=columns,
        row_labels=[dataset if name == OWN else name for name in sets],
        caption="The model's own held-out images, and the foreign sets",
    )


def save(
    path: Path, scores: Mapping[str, Scores], chosen: Mapping[str, list[int]], ks: list[int]
) -> None:
    """`scores.npz`: `<set>.<kind>` (n, len(k)), `<set>.index` the numbers of its images, `k`."""
    arrays: dict[str, Any] = {
        f"{name}.{kind}": values
        for name, kinds in scores.items()
        for kind, values in kinds.items()
    }
    arrays |= {f"{name}.index": np.array(numbers) for name, numbers in chosen.items()}
    with runtime.written_whole(path) as temporary:
        np.savez(temporary, k=np.array(ks), **arrays)
