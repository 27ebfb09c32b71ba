"""The ablation itself: quality and seconds of each cell; the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ebm_prior.commands.ablate import chains as made
from ebm_prior.commands.ablate import shown, timing
from ebm_prior.commands.ablate.cells import PAPER, Cell, linearity
from ebm_prior.commands.ablate.chains import Chains
from ebm_prior.commands.shared import rows
from ebm_prior.commands.shared.kept import Kept
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.rows import Row
from ebm_prior.commands.shared.samples import Sampled
from ebm_prior.commands.shared.session import Job


def ablate(job: Job, cells: Sequence[Cell], prior_file: str | None) -> None:
    """Train and measure all cells; write `report.json` and the figures, print the table.

    Args:
        prior_file: instead of training sample this prior, with each of `--num_steps`.
    """
    args = job.args
    # Before the training: it refuses what is missing.
    ruler = Ruler.of(job, inception=args.inception, features=args.features, fid_dir=args.fid_dir)
    if prior_file is None:
        chains = made.trained(job, cells)
    else:
        chains = made.with_other_steps(job, prior_file, args.num_steps)
    report = measured(job, ruler, chains)
    add_seconds(job, report, chains)
    job.report(report, protocol(job, ruler, diagnostic=prior_file is not None))
    shown.draw(job, ruler, report, list(chains))
    print(shown.told(report, ruler, list(chains)))
    print(f"\nwrote {job.out}/report.json, quality.png, seconds.png")


def measured(job: Job, ruler: Ruler, chains: Chains) -> dict[str, Any]:
    """Quality of the Gaussian prior, and of every cell with and without its model."""
    kept = Kept(job.out, job.here, read=job.args.resume == "auto")

    def over_seeds(row_of: dict[int, Row]) -> dict[str, Any]:
        runs: list[Sampled] = []
        for seed, row in row_of.items():
            found = rows.measured(replace(job, seed=seed), row, ruler, job.args.num_samples, kept)
            assert found is not None  # there is one process
            runs.append(found)
        return rows.summary(next(iter(row_of.values())), list(row_of), runs)

    backbone = next(iter(next(iter(chains.values())).values())).prior.backbone
    gaussian = dict.fromkeys(job.args.seeds, rows.gaussian_row(job, backbone))
    report: dict[str, Any] = {"gaussian": over_seeds(gaussian), "cells": {}}
    for cell, group in chains.items():
        model, control = (
            over_seeds({s: chain.row(cell, zero_energy=zero) for s, chain in group.items()})
            for zero in (False, True)
        )
        numbers: dict[str, Any] = {
            "max_T": cell.max_T,
            "num_steps": cell.num_steps,
            "steps": cell.steps,
        }
        diverged = {str(s): chain.diverged for s, chain in group.items() if chain.diverged}
        if diverged:
            numbers["diverged"] = diverged
        report["cells"][str(cell)] = {**numbers, **model, "no_model_chain": control}
    return report


def add_seconds(job: Job, report: dict[str, Any], chains: Chains) -> None:
    """Time the first seed's prior of every cell, beside each other; how linear the seconds are."""
    args = job.args
    firsts = {cell: next(iter(group.values())) for cell, group in chains.items()}
    times = timing.interleaved(
        {cell: (chain.prior, chain.drawing) for cell, chain in firsts.items()},
        args.time_images,
        min(job.batch_size, args.time_images),
        args.repeats,
        job.generator("time"),
    )
    medians = timing.medians(times)
    for cell, values in times.items():
        row = report["cells"][str(cell)]
        row |= {"seconds": medians[cell], "seconds_of_each_repeat": values}
        if cell in PAPER:
            row["paper"] = dict(zip(("fid", "seconds"), PAPER[cell], strict=True))
    report["linearity"] = linearity([cell.steps for cell in medians], list(medians.values()))


def protocol(job: Job, ruler: Ruler, *, diagnostic: bool) -> dict[str, Any]:
    """How the numbers came about."""
    args = job.args
    size = min(job.batch_size, args.time_images)
    return {
        **ruler.protocol,
        "distance": f"{ruler.name}: {ruler.title}",
        "samples_of_each_cell_and_seed": args.num_samples,
        "seeds": args.seeds,
        "seconds": f"to draw and decode {args.time_images} images in blocks of {size} with the"
        f" first seed's prior; median of {args.repeats} repeats, the cells in turn, after a"
        " warm-up",
        "training": "none: one prior sampled with other numbers of Langevin steps than it was"
        " trained with, a diagnostic"
        if diagnostic
        else "each cell with its own numbers of steps, the last iterate",
    }
