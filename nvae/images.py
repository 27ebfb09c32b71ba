"""Pictures for people: 8-bit PNG files and labelled grids, for the commands of both packages."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nvae import runtime

PADDING = 2  # white pixels between tiles
MARGIN = 6  # and between labels and tiles
TILE = 48  # smaller images are enlarged to about this many pixels
TINY = 16  # up to here smoothly, or the eye sees squares before it sees digits


def to_uint8(images: Tensor) -> Tensor:
    """Round images in [0, 1] to 8 bits: level = round(255 x). Any shape; uint8 passes through.

    A Gaussian decoder's mean may leave [0, 1] a little and is clamped; a tensor that was never in
    that range is refused.

    Raises:
        ValueError: NaN, infinity, integers of another width, or values on a scale of 0..255.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(
            f"images have dtype {images.dtype}; expected floats in [0, 1], or uint8 levels"
        )
    images = images.detach().float()
    if not torch.isfinite(images).all():
        bad = int((~torch.isfinite(images)).sum())
        raise ValueError(f"images hold {bad} values that are NaN or infinite; expected [0, 1]")
    if images.numel() and float(images.abs().max()) > 16:
        low, high = float(images.min()), float(images.max())
        raise ValueError(
            f"images range from {low:g} to {high:g}; expected [0, 1] (divide 8-bit levels by 255)"
        )
    return images.clamp(0, 1).mul(255).round().to(torch.uint8)


def to_pil(image: Tensor) -> Image.Image:
    """One image (C, H, W), 1 channel (grey) or 3 (RGB), as a PIL image."""
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ValueError(
            f"an image has shape {tuple(image.shape)}; expected (1, H, W) or (3, H, W)"
        )
    array = to_uint8(image).cpu().numpy()
    return Image.fromarray(array[0] if len(array) == 1 else array.transpose(1, 2, 0).copy())


def save_png(path: str | os.PathLike[str], image: Tensor) -> None:
    """Write one image (C, H, W) in [0, 1] as an 8-bit PNG; missing folders are made.

    There may be 50000 of them, so, unlike other results, they are not each flushed to disk.
    """
    picture = to_pil(image)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    picture.save(path, format="PNG")


def grid(
    images: Tensor,
    columns: int | None = None,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    caption: str = "",
    scale: int | None = None,
) -> Image.Image:
    """Lay images (N, C, H, W) out row by row on white, with labels beside and above, a caption.

    Args:
        columns: images in a row; by default about as many as there are rows.
        caption: text above everything; line breaks are kept.
        scale: whole-number enlargement, smooth for images of at most 16 pixels; by default small
            images are enlarged until they can be seen.

    Raises:
        ValueError: no images, a shape that is not (N, 1 or 3, H, W), or a wrong number of labels.
    """
    if images.ndim != 4 or not len(images):
        raise ValueError(
            f"a grid of shape {tuple(images.shape)}; expected (N, C, H, W) with N of at least 1"
        )
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    for name, labels, count in (("row", row_labels, rows), ("column", column_labels, columns)):
        if labels and len(labels) != count:
            raise ValueError(f"{len(labels)} {name} labels for {count} {name}s; expected {count}")
    scale = scale or max(1, round(TILE / max(images.shape[-2:])))
    tiles = [to_pil(image) for image in images]
    tiny = max(images.shape[-2:]) <= TINY
    resampling = Image.Resampling.BICUBIC if tiny else Image.Resampling.NEAREST
    height, width = images.shape[-2] * scale, images.shape[-1] * scale
    step_y, step_x = height + PADDING, width + PADDING

    font = ImageFont.load_default()
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def size(text: str) -> tuple[int, int]:
        _, _, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font)
        return math.ceil(right), math.ceil(bottom)

    caption_size = size(caption) if caption else (0, -MARGIN)
    header = max((size(text)[1] for text in column_labels), default=0) if column_labels else 0
    left = MARGIN + max((size(text)[0] + MARGIN for text in row_labels or ()), default=0)
    top = 2 * MARGIN + caption_size[1] + (header + MARGIN if header else 0)
    canvas = Image.new(
        "RGB",
        (
            max(left + columns * step_x - PADDING, MARGIN + caption_size[0]) + MARGIN,
            top + rows * step_y - PADDING + MARGIN,
        ),
        "white",
    )
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((MARGIN, MARGIN), caption, fill="black", font=font)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        enlarged = tile.resize((width, height), resampling)
        canvas.paste(enlarged, (left + column * step_x, top + row * step_y))
    for row, text in enumerate(row_labels or ()):
        y = top + row * step_y + (height - size(text)[1]) // 2
        draw.multiline_text((MARGIN, y), text, fill="black", font=font)
    for column, text in enumerate(column_labels or ()):
        x = left + column * step_x + max(0, width - size(text)[0]) // 2
        draw.multiline_text((x, top - MARGIN - header), text, fill="black", font=font)
    return canvas


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    columns: int | None = None,
    *,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    caption: str = "",
    scale: int | None = None,
) -> Image.Image:
    """Write `grid(...)` as PNG and return it (for TensorBoard: `to_array`)."""
    picture = grid(
        images,
        columns,
        row_labels=row_labels,
        column_labels=column_labels,
        caption=caption,
        scale=scale,
    )
    with runtime.written_whole(path) as temporary:
        picture.save(temporary, format="PNG")
    return picture


def to_array(picture: Image.Image) -> np.ndarray:
    """A PIL picture as uint8 (H, W, 3), the form TensorBoard takes with `dataformats="HWC"`."""
    return np.asarray(picture.convert("RGB"))
