"""The pictures of recorded chains: strips of decoded states, and curves of their numbers."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ebm_prior import hierarchy, transitions
from ebm_prior.commands.shared import figures
from ebm_prior.files import written_whole
from ebm_prior.latents import Layout
from ebm_prior.transitions import Row
from nvae import images

Shown = dict[tuple[int, int], Tensor]  # (t, step) -> the first images
LAYER_CURVES = 3  # groups of layers in a figure


def strip(path: Path, shown: Shown, num_steps: int, trained: int) -> None:
    """A row per image, a column per recorded step; the upper block is the first t, from noise."""
    levels = sorted({t for t, _ in shown}, reverse=True)
    steps = sorted({step for _, step in shown})
    rows, labels = [], []
    for t in levels:
        block = torch.stack([shown[t, step] for step in steps], dim=1)
        rows.append(block.flatten(0, 1))
        labels += [f"t = {t}" if i == 0 else "" for i in range(len(block))]
    blocks = "from noise" if len(levels) == 1 else f"from noise; below t = {levels[-1]}"
    images.save_grid(
        path,
        torch.cat(rows),
        columns=len(steps),
        row_labels=labels,
        column_labels=[str(step) for step in steps],
        caption=f"{num_steps} Langevin steps per diffusion index (trained with {trained}).\n"
        f"Above t = {levels[0]}, {blocks}. Columns: steps made",
    )


def curves(path: Path, rows: Sequence[Row], layout: Layout, title: str) -> None:
    """The logged numbers over the steps of the first and of the last t, four figures in one."""
    levels = sorted({rows[0].t, rows[-1].t}, reverse=True)
    steps = [row.step for row in rows if row.t == levels[0]]
    groups = hierarchy.groups(layout, LAYER_CURVES)

    def by_level(name: str) -> dict[str, list[float]]:
        return {f"t = {t}": [getattr(row, name) for row in rows if row.t == t] for t in levels}

    def by_layers(name: str) -> dict[str, list[float]]:
        return {
            f"t = {t}, {hierarchy.name_of(group)}": [
                sum(getattr(row, name)[i] for i in group) / len(group)
                for row in rows
                if row.t == t
            ]
            for t in levels
            for group in groups
        }

    low, high = transitions.U_SQUARE
    parts = {
        "|u|^2 / d": (by_layers("u_square"), {"criterion, low": low, "criterion, high": high}),
        "f per layer": (by_layers("f"), None),
        "share of saturated pixels": (by_level("saturation"), None),
        "norm of the gradient": (by_level("gradient_norm"), None),
    }
    with tempfile.TemporaryDirectory() as folder:
        tiles = []
        for i, (ylabel, (lines, hline)) in enumerate(parts.items()):
            part, xlabel = Path(folder) / f"{i}.png", "Langevin steps"
            figures.lines(
                part, steps, lines, xlabel=xlabel, ylabel=ylabel, title=title, hline=hline
            )
            with Image.open(part) as picture:
                tiles.append(picture.convert("RGB"))
    width, height = tiles[0].size
    canvas = Image.new("RGB", (2 * width, 2 * height), "white")
    for i, tile in enumerate(tiles):
        canvas.paste(tile, (i % 2 * width, i // 2 * height))
    with written_whole(path) as temporary:
        canvas.save(temporary, format="PNG")
