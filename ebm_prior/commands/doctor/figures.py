"""What the doctor measured, drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ebm_prior.commands.shared import figures


def draw(out: Path, content: dict[str, Any]) -> None:
    """`chains.png` and `hole.png`, of what there is in a report."""
    if "chains" in content:
        kernels = content["chains"]["by_t"]
        curves = {}
        for kernel in kernels:
            path, verdict = kernel["f_path"], kernel["verdict"].partition(" (")[0]
            curves[f"t = {kernel['t']}: {verdict}"] = [f - path[0] for f in path]
        figures.lines(
            out / "chains.png",
            range(content["chains"]["num_steps"] + 1),
            curves,
            xlabel="Langevin step",
            ylabel="mean F since the start, nats",
            title=f"F along {content['chains']['num_chains']} chains: level where they arrived",
            hline=0.0,
        )
    if "hole" in content:
        bars = {}
        for gap in content["hole"]["gaps"]:
            nats, error = gap["nats"], gap["standard_error"]
            label = f"{gap['compared']}, {gap['network']}"
            bars[label] = (nats, nats - error, nats + error)
        figures.bars(
            out / "hole.png",
            bars,
            ylabel="nats per image (lower bound, held out)",
            title=f"Aggregate posterior against prior: {content['hole']['advice']}",
        )
