"""What a cell samples with: a prior trained for it, or one prior with other numbers of steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from ebm_prior.base import Prior
from ebm_prior.commands.ablate.cells import Cell
from ebm_prior.commands.shared.rows import Row, drawn_by
from ebm_prior.commands.shared.session import Job
from ebm_prior.commands.shared.trainings import Training, train
from ebm_prior.presets import resolved
from nvae.digest import sha256


class Chain(NamedTuple):
    """A prior, and what its `sample_u` is given beside."""

    prior: Prior
    file: str
    drawing: dict[str, Any]
    diverged: str | None = None  # what its training said, if only its last good state is left

    def row(self, cell: Cell, *, zero_energy: bool = False) -> Row:
        """The cell's row of a report, or that of the chain without its model."""
        name = "no_model_chain" if zero_energy else "ebm"
        config = self.prior.config
        facts: dict[str, Any] = {
            "max_T": cell.max_T,
            "num_steps": cell.num_steps,
            "b2": config.b2,
            "step_rule": config.step_rule,
            "last_step_kernel": config.last_step_kernel,
        }
        if not zero_energy:
            facts |= {"prior": self.file, "sha256": sha256(self.file), **self.drawing}
        draw = drawn_by(self.prior, **self.drawing, zero_energy=zero_energy)
        label = f"T = {cell.max_T}, K = {cell.num_steps}"
        return Row(f"{name}-{cell}", label, draw, self.prior.backbone, name, facts=facts)


#: Of every cell, the chain of each seed.
Chains = dict[Cell, dict[int, Chain]]


def trained(job: Job, cells: Sequence[Cell]) -> Chains:
    """Train a prior for each cell and seed, or go on where that stopped.

    Raises:
        ValueError: a training that failed, with its last words.
    """
    args = job.args
    runs = {cell: {seed: _training(job, cell, seed) for seed in args.seeds} for cell in cells}
    every = [training for group in runs.values() for training in group.values()]
    steps = resolved(args.preset, {"iterations": args.iterations})["iterations"]
    for done in train(every, args.jobs, steps):
        print(done.diverged or f"trained {done.prior}", file=sys.stderr)
    return {
        cell: {
            seed: Chain(job.open_prior(training.prior), str(training.prior), {}, training.diverged)
            for seed, training in group.items()
        }
        for cell, group in runs.items()
    }


def _training(job: Job, cell: Cell, seed: int) -> Training:
    args = job.args
    flags = {
        "preset": args.preset,
        "checkpoint": args.checkpoint,
        "max_T": cell.max_T,
        "num_steps": cell.num_steps,
        "seed": seed,
        "resume": "auto",
        "grid_every": 0,
        "device": args.device,
        "data": args.data,
        "dataset": args.dataset,
        "iterations": args.iterations,
    }
    return Training(
        job.out / "runs" / f"{cell}-seed-{seed}",
        {name: value for name, value in flags.items() if value is not None},
        args.train_flags,
        threads=1 if args.jobs > 1 else None,
        may_diverge=True,
    )


def with_other_steps(job: Job, file: str, num_steps: Sequence[int]) -> Chains:
    """One prior, sampled with other numbers of Langevin steps than it was trained with.

    Raises:
        ValueError: a prior without a chain of diffusion steps.
    """
    prior = job.open_prior(file)
    if prior.config.kind != "diffusion":
        raise ValueError(f"--prior {file} is a {prior.config.kind} prior; expected diffusion")
    return {
        Cell(prior.config.max_T, k): dict.fromkeys(
            job.args.seeds, Chain(prior, file, {"num_steps": k})
        )
        for k in sorted(set(num_steps))
    }
