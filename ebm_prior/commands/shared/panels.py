"""Pictures of several sets of images: a captioned grid of each, two beside each other."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ebm_prior.files import written_whole
from nvae import images

TINY, ENLARGED = 16, 5  # pixels up to which images are enlarged smoothly, and how much
ROWS, COLUMNS = 6, 10


def save_panels(
    path: str | os.PathLike[str],
    panels: Mapping[str, Tensor],
    rows: int = ROWS,
    columns: int = COLUMNS,
) -> None:
    """Write caption -> images (N, C, H, W) as one PNG; of each the first, none picked by hand."""
    grids = []
    for caption, x in panels.items():
        x, scale = x[: rows * columns], None
        if max(x.shape[-2:]) <= TINY:
            # So few pixels are enlarged smoothly, or the eye sees squares before it sees digits.
            x = F.interpolate(x, scale_factor=ENLARGED, mode="bicubic").clamp(0, 1)
            scale = 1
        grids.append(images.grid(x, columns, caption=caption, scale=scale))
    width, height = (max(grid.size[i] for grid in grids) for i in (0, 1))
    canvas = Image.new("RGB", (2 * width, -(-len(grids) // 2) * height), "white")
    for i, grid in enumerate(grids):
        canvas.paste(grid, (i % 2 * width, i // 2 * height))
    with written_whole(path) as temporary:
        canvas.save(temporary, format="PNG")
