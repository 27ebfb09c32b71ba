"""Pictures of several sets of images: a captioned grid of each, two beside each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

from PIL import Image
from torch import Tensor

from ebm_prior.files import written_whole
from nvae import images

ROWS, COLUMNS = 6, 10


def save_panels(
    path: str | os.PathLike[str],
    panels: Mapping[str, Tensor],
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> None:
    """Write caption -> images (N, C, H, W) as one PNG; of each the first, none picked by hand."""
    grids = [
        images.grid(x[: rows * columns], columns, caption=caption) for caption, x in panels.items()
    ]
    width, height = (max(grid.size[i] for grid in grids) for i in (0, 1))
    canvas = Image.new("RGB", (2 * width, -(-len(grids) // 2) * height), "white")
    for i, grid in enumerate(grids):
        canvas.paste(grid, (i % 2 * width, i // 2 * height))
    with written_whole(path) as temporary:
        canvas.save(temporary, format="PNG")
