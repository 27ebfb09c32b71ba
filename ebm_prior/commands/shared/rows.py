"""Rows of a report: sets of images that are drawn and measured, and kept when finished."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ebm_prior.base import Prior
from ebm_prior.commands.shared import speed
from ebm_prior.commands.shared.kept import Kept
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.samples import Draw, Sampled, sampled
from ebm_prior.commands.shared.session import Job


@dataclass(frozen=True)
class Row:
    """A set of images to draw.

    Attributes:
        key: of the random numbers: rows of one kind share their noise.
        facts: what defines the row, for the report.
        most: images there are; None: as many as wanted.
        prepare: called by all processes before the first draw.
    """

    name: str
    label: str
    draw: Draw
    backbone: Any
    key: str
    prior: Prior | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    most: int | None = None
    prepare: Callable[[], None] | None = None


def drawn_by(prior: Prior, **drawing: Any) -> Draw:
    """Draws of a prior; `drawing` are further arguments of its `sample_u`."""

    def draw(first: int, count: int, generator: torch.Generator) -> Tensor:
        return prior.sample_u(count, generator=generator, **drawing)

    return draw


def gaussian_row(job: Job, backbone: Any) -> Row:
    """The VAE's own prior."""
    dim, device = backbone.layout.dim, job.here.device

    def draw(first: int, count: int, generator: torch.Generator) -> Tensor:
        return torch.randn(count, dim, generator=generator, device=device)

    return Row("gaussian", "Gaussian prior", draw, backbone, "gaussian")


def measured(
    job: Job, row: Row, ruler: Ruler, num: int, kept: Kept, temperature: float = 1.0
) -> Sampled | None:
    """A row with the job's seed, drawn or found again; on the first process."""
    num = min(num, row.most or num)
    identity = {
        "row": row.key,
        "facts": row.facts,
        "seed": job.seed,
        "num_samples": num,
        "temperature": temperature,
        "batch_size": job.batch_size,
        "backbone": job.backbone.fingerprint(),
        "precision": speed.precision_of(job.steps),
        "bn_statistics": _digest(getattr(row.backbone, "bn_statistics", None)),
        "data": [job.dataset, job.args.data, job.args.max_images],
        "ruler": ruler.protocol,
    }
    identity = json.loads(json.dumps(identity, default=str))
    name = f"{row.name}-seed-{job.seed}"
    if kept.holds(name, identity):
        if job.here.is_main:
            print(f"{name}: found in {kept.folder}", file=sys.stderr)
        return kept.get(name, identity)
    if row.prepare is not None:
        row.prepare()
    found = sampled(
        job,
        ruler,
        row.draw,
        num,
        backbone=row.backbone,
        key=row.key,
        temperature=temperature,
        prior=row.prior,
    )
    if found is not None:
        kept.put(name, identity, found)
    return found


def _digest(statistics: Mapping[str, Tensor] | None) -> str | None:
    """A name for BatchNorm statistics that are not the checkpoint's."""
    if not statistics:
        return None
    found = hashlib.sha256()
    for name in sorted(statistics):
        found.update(name.encode() + statistics[name].cpu().numpy().tobytes())
    return found.hexdigest()


def summary(row: Row, seeds: Sequence[int], runs: Sequence[Sampled]) -> dict[str, Any]:
    """A row of the report: means over seeds, and with several seeds ranges and each seed's own."""
    every = [run.numbers for run in runs]
    result: dict[str, Any] = {"label": row.label}
    for name, value in every[0].items():
        values = [numbers[name] for numbers in every]
        if isinstance(value, list):
            result[name] = [sum(column) / len(values) for column in zip(*values, strict=True)]
        else:
            result[name] = sum(values) / len(values)
    if len(runs) > 1:
        single = [name for name, value in every[0].items() if not isinstance(value, list)]
        result["range"] = {
            name: [min(n[name] for n in every), max(n[name] for n in every)] for name in single
        }
        result["per_seed"] = [{"seed": s, **n} for s, n in zip(seeds, every, strict=True)]
    return {**result, "made_of": row.facts}


def with_range(row: Mapping[str, Any], name: str) -> tuple[float, float, float]:
    """A number of a row's summary, with its lowest and highest over seeds."""
    low, high = row.get("range", {}).get(name, (row[name], row[name]))
    return row[name], low, high


def told(row: Mapping[str, Any], name: str) -> str:
    """The number for a table, with its range if there is one."""
    value, low, high = with_range(row, name)
    return f"{value:.4g}" + (f" ({low:.4g} to {high:.4g})" if high > low else "")


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """A table of text: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = (
        [cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "\n".join(
        "  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]).rstrip() for cells in rows
    )
