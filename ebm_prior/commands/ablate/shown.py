"""The ablation for people: figures and the table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ebm_prior.commands.ablate.cells import LINEAR, PAPER, Cell
from ebm_prior.commands.shared import figures, rows
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.session import Job


def draw(job: Job, ruler: Ruler, report: dict[str, Any], cells: Sequence[Cell]) -> None:
    """`quality.png`, a bar per cell, and `seconds.png`, seconds over T K with both fits."""
    args, found = job.args, report["cells"]
    bars = {"Gaussian prior": rows.with_range(report["gaussian"], ruler.name)}
    for cell in cells:
        row = found[str(cell)]
        bars[row["label"]] = rows.with_range(row, ruler.name)
    figures.bars(
        job.out / "quality.png",
        bars,
        ylabel=f"{ruler.title} (lower is better)",
        title=f"{job.dataset}: {args.num_samples} images of each, {len(args.seeds)} seed(s)",
    )
    x = np.array([cell.steps for cell in cells], dtype=float)
    curves = {"measured": np.array([found[str(cell)]["seconds"] for cell in cells])}
    for name, fit in report["linearity"].items():
        if isinstance(fit, dict):
            label = f"fit {name.replace('_', ' ')}, off by {fit['max_deviation']:.0%} at most"
            curves[label] = fit["intercept_seconds"] + fit["seconds_per_step"] * x
    figures.lines(
        job.out / "seconds.png",
        x,
        curves,
        xlabel="T K, Langevin steps of a draw",
        ylabel=f"seconds for {args.time_images} images",
        title=f"{job.dataset}: time to sample, on {job.here.device}",
    )


def told(report: dict[str, Any], ruler: Ruler, cells: Sequence[Cell]) -> str:
    """The report as a table, beside the paper's numbers where it has the cell."""
    name, base = ruler.name, report["gaussian"][ruler.name]
    heads = ["T x K", name, "of Gaussian", "f = 0", "u_std", "seconds", "per T K", "off c T K"]
    if any(cell in PAPER for cell in cells):
        heads += ["paper FID", "paper s"]
    lines = [heads, ["Gaussian", rows.told(report["gaussian"], name), "1.00"]]
    fit = report["linearity"]
    deviations = fit["through_the_origin"]["deviations"]
    for cell, off in zip(cells, deviations, strict=True):
        row = report["cells"][str(cell)]
        lines.append(
            [
                str(cell) + ("*" if "diverged" in row else ""),
                rows.told(row, name),
                f"{row[name] / base:.2f}",
                f"{row['no_model_chain'][name]:.4g}",
                f"{row['u_std']:.3f}",
                f"{row['seconds']:.3g}",
                f"{row['seconds'] / cell.steps:.3g}",
                f"{off:+.0%}",
                *(str(value) for value in PAPER.get(cell, ())),
            ]
        )
    lines = [line + [""] * (len(heads) - len(line)) for line in lines]
    verdict = "linear" if fit["within_20_percent"] else "not linear"
    text = (
        f"{name}: {ruler.title}, lower is better. Seconds are {verdict} in T K within"
        f" {LINEAR:.0%}: c T K is off by {fit['through_the_origin']['max_deviation']:.0%} at most"
    )
    if "with_intercept" in fit:
        text += f", a + b T K by {fit['with_intercept']['max_deviation']:.0%}"
    if any("diverged" in row for row in report["cells"].values()):
        text += ". * diverged in training: its last good state"
    return f"{rows.aligned(lines)}\n{text}."
