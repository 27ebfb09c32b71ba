"""The evaluation itself: every row with every seed, then report, table and pictures."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from ebm_prior.commands.evaluate.rows import MOST_SAMPLES, all_rows
from ebm_prior.commands.shared import figures
from ebm_prior.commands.shared import rows as shared
from ebm_prior.commands.shared.kept import Kept
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.panels import save_panels
from ebm_prior.commands.shared.rows import Row
from ebm_prior.commands.shared.samples import SHOWN
from ebm_prior.commands.shared.session import Job
from ebm_prior.commands.shared.subset import Images


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
        runs = [
            shared.measured(
                replace(job, seed=seed), row, ruler, num, kept, temperature=args.temperature
            )
            for seed in args.seeds
        ]
        if job.here.is_main:
            found[row.name] = shared.summary(
                row, args.seeds, [run for run in runs if run is not None]
            )
            pictures[row.name] = runs[0].pictures  # type: ignore[union-attr]
    if not job.here.is_main:
        return
    protocol = {
        **ruler.protocol,
        "distance": f"{ruler.name}: {ruler.title}",
        "samples_of_each_row": num,
        "reconstruction": "of each training image at most once, so there may be fewer",
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
        captions["training images"] = images[:SHOWN]
    save_panels(job.out / "comparison.png", captions)
    figures.bars(
        job.out / "rows.png",
        {row.label: shared.with_range(found[row.name], ruler.name) for row in rows},
        ylabel=f"{ruler.title} (lower is better)",
        title=f"{job.dataset}: {num} images of each row, {len(args.seeds)} seed(s)",
    )
    print(told(rows, found, ruler))
    print(f"\nwrote {job.out}/report.json, comparison.png, rows.png")


def _images(job: Job) -> tuple[Images | None, Tensor | None]:
    """Training images with labels; none where only statistics are given."""
    if job.args.data is None and job.args.fid_dir is not None and job.dataset != "digits":
        print("note: no --data: no fitted Gaussian, no reconstructions", file=sys.stderr)
        return None, None
    return job.chosen(train=True)


def told(rows: list[Row], found: dict[str, dict[str, Any]], ruler: Ruler) -> str:
    """The report as a table; the ratio is that of the distances, to the Gaussian prior's."""
    first = found[rows[0].name]
    names = [
        name
        for name, value in first.items()
        if isinstance(value, float) and name not in ("images_per_second", ruler.name)
    ]
    lines = [["", ruler.name, "ratio", *names, "images/s"]]
    for row in rows:
        numbers = found[row.name]
        lines.append(
            [
                row.label,
                shared.told(numbers, ruler.name),
                f"{numbers[ruler.name] / first[ruler.name]:.2f}",
                *(f"{numbers[name]:.4g}" for name in names),
                f"{numbers['images_per_second']:.3g}",
            ]
        )
    table = [shared.aligned(lines), f"{ruler.name}: {ruler.title}, lower is better."]
    for row in rows:
        sizes = found[row.name].get("effective_sample_size")
        if sizes:
            of = found[row.name]["made_of"]["config"]["proposals"]
            each = ", ".join(f"{size:.1f}" for size in sizes) + " (layers from the top)"
            table.append(f"{row.label}: effective sample size of {of} proposals: {each}")
    return "\n".join(table)
