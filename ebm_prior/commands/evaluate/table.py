"""The evaluation itself: every row with every seed, then report, table and pictures."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from ebm_prior.commands.evaluate.kept import Kept
from ebm_prior.commands.evaluate.rows import MOST_SAMPLES, Row, all_rows
from ebm_prior.commands.shared import figures
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.panels import save_panels
from ebm_prior.commands.shared.samples import Sampled, sampled
from ebm_prior.commands.shared.session import Job
from nvae.digest import sha256


def evaluate(job: Job) -> None:
    """Measure all rows; write `report.json`, `comparison.png` and `rows.png`, print the table."""
    args = job.args
    images, labels = _images(job)
    rows = all_rows(job, images)  # first: it refuses priors of other backbones
    ruler = Ruler.of(
        job,
        images,
        labels,
        inception=args.inception,
        features=args.features,
        fid_dir=args.fid_dir,
    )
    num = args.num_samples or min(MOST_SAMPLES, MOST_SAMPLES if images is None else len(images))
    kept = Kept(job.out, job.here, read=args.resume == "auto")
    found: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Tensor] = {}
    for row in rows:
        runs = [measured(replace(job, seed=seed), row, ruler, num, kept) for seed in args.seeds]
        if job.here.is_main:
            found[row.name] = summary(row, args.seeds, [run for run in runs if run is not None])
            pictures[row.name] = runs[0].pictures  # type: ignore[union-attr]
    if not job.here.is_main:
        return
    protocol = {
        **ruler.protocol,
        "distance": f"{ruler.name}: {ruler.title}",
        "samples_of_each_row": num,
        "seeds": args.seeds,
        "image": f"one draw of the decoder, temperature {args.temperature:g}",
        "order_of_rows": [row.name for row in rows],
    }
    job.report(found, protocol)
    words = "FID" if ruler.name == "fid" else "FD"
    captions = {
        f"{row.label}, {words} {found[row.name][ruler.name]:.4g}": pictures[row.name]
        for row in rows
    }
    if images is not None:
        captions["training images"] = images
    save_panels(job.out / "comparison.png", captions)
    figures.bars(
        job.out / "rows.png",
        {row.label: _with_range(found[row.name], ruler.name) for row in rows},
        ylabel=f"{ruler.title} (lower is better)",
        title=f"{job.dataset}: {num} images of each row, {len(args.seeds)} seed(s)",
    )
    print(told(rows, found, ruler))
    print(f"\nwrote {job.out}/report.json, comparison.png, rows.png")


def _images(job: Job) -> tuple[Tensor | None, Tensor | None]:
    """Training images with labels; none where only statistics are given."""
    if job.args.data is None and job.args.fid_dir is not None and job.dataset != "digits":
        print("note: no --data: no fitted Gaussian, no reconstructions", file=sys.stderr)
        return None, None
    return job.images(train=True)


def measured(job: Job, row: Row, ruler: Ruler, num: int, kept: Kept) -> Sampled | None:
    """A row with the job's seed, drawn or found; on the first process."""
    num = min(num, row.most or num)
    identity = {
        "row": row.key,
        "facts": row.facts,
        "seed": job.seed,
        "num_samples": num,
        "temperature": job.args.temperature,
        "batch_size": job.batch_size,
        "backbone": job.backbone.fingerprint(),
        "bn_statistics": _statistics_of(job, row),
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
        temperature=job.args.temperature,
        prior=row.prior,
    )
    if found is not None:
        kept.put(name, identity, found)
    return found


def _statistics_of(job: Job, row: Row) -> str | None:
    """The prior's file that the row's BatchNorm statistics come from; None: the checkpoint's."""
    own = getattr(row.backbone, "bn_statistics", None)
    return sha256(row.facts.get("prior", job.args.prior[0])) if own else None


def summary(row: Row, seeds: list[int], runs: list[Sampled]) -> dict[str, Any]:
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
        numbers_alone = [name for name, value in every[0].items() if not isinstance(value, list)]
        result["range"] = {
            name: [min(n[name] for n in every), max(n[name] for n in every)]
            for name in numbers_alone
        }
        result["per_seed"] = [{"seed": s, **n} for s, n in zip(seeds, every, strict=True)]
    return {**result, "made_of": row.facts}


def _with_range(row: dict[str, Any], name: str) -> tuple[float, float, float]:
    low, high = row.get("range", {}).get(name, (row[name], row[name]))
    return row[name], low, high


def told(rows: list[Row], found: dict[str, dict[str, Any]], ruler: Ruler) -> str:
    """The report as a table; the ratio is that of the distances, to the Gaussian prior's."""
    first = found[rows[0].name]
    names = [
        name
        for name, value in first.items()
        if isinstance(value, float) and name not in ("images_per_second", ruler.name)
    ]
    heads = ["", ruler.name, "ratio", *names, "images/s"]
    lines = [heads]
    for row in rows:
        numbers = found[row.name]
        value, low, high = _with_range(numbers, ruler.name)
        spread = f" ({low:.4g} to {high:.4g})" if high > low else ""
        lines.append(
            [
                row.label,
                f"{value:.4g}{spread}",
                f"{value / first[ruler.name]:.2f}",
                *(f"{numbers[name]:.4g}" if name in numbers else "" for name in names),
                f"{numbers['images_per_second']:.3g}",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    table = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    table += [f"{ruler.name}: {ruler.title}, lower is better."]
    for row in rows:
        sizes = found[row.name].get("effective_sample_size")
        if sizes:
            of = found[row.name]["made_of"]["config"]["proposals"]
            each = ", ".join(f"{size:.1f}" for size in sizes) + " (layers from the top)"
            table.append(f"{row.label}: effective sample size of {of} proposals: {each}")
    return "\n".join(table)
