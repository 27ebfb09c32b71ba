"""Constructed shifts: images of a set made foreign, with what stays the same known exactly.

Each is a function of one image (C, H, W) in [0, 1] and a generator, and returns one like it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

PATCHES = 4  # per side, in `shuffled`
NOISE = 0.3  # standard deviation, in `noise`
CORNERS = 5  # of the path that `strokes` draws


def inverted(image: Tensor, generator: torch.Generator) -> Tensor:
    """Dark and light exchanged."""
    return 1 - image


def rotated(image: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter turn."""
    return image.rot90(1, (1, 2))


def flipped(image: Tensor, generator: torch.Generator) -> Tensor:
    """Upside down."""
    return image.flip(1)


def shuffled(image: Tensor, generator: torch.Generator) -> Tensor:
    """Cut into 4 x 4 patches, which change places: the same pixels, no global form."""
    tiles = image.unflatten(2, (PATCHES, -1)).unflatten(1, (PATCHES, -1))  # C, row, h, column, w
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)
    order = torch.randperm(len(tiles), generator=generator)
    tiles = tiles[order].unflatten(0, (PATCHES, PATCHES))
    return tiles.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)


def noise(image: Tensor, generator: torch.Generator) -> Tensor:
    """Normal noise added to each pixel."""
    drawn = torch.randn(image.shape, generator=generator)
    return (image + NOISE * drawn).clamp(0, 1)


def blurred(image: Tensor, generator: torch.Generator) -> Tensor:
    """Averaged over blocks of an eighth of the side, at least 2 pixels, and smooth in between."""
    small = avg_pool2d(image[None], max(2, image.shape[2] // 8))
    return interpolate(small, image.shape[1:], mode="bilinear", align_corners=False)[0]


def strokes(image: Tensor, generator: torch.Generator) -> Tensor:
    """A random path drawn with a pen, white on black: made like a digit, but none.

    Of the image only the shape is taken. The pen is a tenth of the side wide, at least a pixel.
    """
    _, height, width = image.shape
    size = torch.tensor([height, width])
    corners = (0.1 + 0.8 * torch.rand(CORNERS, 2, generator=generator)) * size
    pixels = torch.cartesian_prod(torch.arange(height), torch.arange(width)) + 0.5
    start, along = corners[:-1, None], (corners[1:] - corners[:-1])[:, None]
    share = ((pixels - start) * along).sum(2) / along.square().sum(2)
    nearest = start + share.clamp(0, 1)[..., None] * along
    distance = (pixels - nearest).norm(dim=2).amin(0)
    pen = max(1.0, width / 10)
    return (pen / 2 + 0.5 - distance).clamp(0, 1).view(1, height, width).expand_as(image).clone()


SHIFTS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    f.__name__: f for f in (inverted, shuffled, strokes, rotated, flipped, noise, blurred)
}
