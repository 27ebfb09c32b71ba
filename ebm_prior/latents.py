"""The two views of a hierarchy's latents: one tensor `u` (B, D) and a list of layers `z`.

u-space is uni-scale (every coordinate is standard normal under the VAE's own prior), so a chain
in it need not know that layers exist; z-space is multi-scale, so it is a list, top layer first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

LARGEST = 2**31 - 1  # coordinates; also keeps the products of a hostile file's shapes harmless


@dataclass(frozen=True)
class Layout:
    """The latent shapes of a backbone, per sample, top layer (the paper's layer L) first.

    Args:
        shapes: one `(C, H, W)` or `(d,)` per layer; lists, as JSON gives them, are accepted.
    """

    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", _checked(self.shapes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Coordinates of each layer."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def dim(self) -> int:
        """D, the coordinates of all layers."""
        return sum(self.sizes)

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.shapes)

    def split(self, u: Tensor) -> list[Tensor]:
        """(B, D) -> one (B, \\*shape) per layer.

        One `torch.split`, whose backward is one `cat`: a slice per layer would make autograd add
        up L zero-padded tensors of D coordinates.
        """
        if u.ndim != 2 or u.shape[1] != self.dim:
            raise ValueError(
                f"u has shape {tuple(u.shape)}, expected (B, {self.dim}): every layer flattened,"
                " joined top first (Layout.join)"
            )
        parts = torch.split(u, list(self.sizes), dim=1)
        return [part.reshape(-1, *shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def join(self, z: Sequence[Tensor]) -> Tensor:
        """One (B, \\*shape) per layer -> (B, D); the inverse of `split`."""
        got = [tuple(part.shape[1:]) for part in z]
        if got != list(self.shapes):
            raise ValueError(
                f"layers have shapes {got}, expected {list(self.shapes)} after the batch axis,"
                " top layer first"
            )
        return torch.cat([part.flatten(1) for part in z], dim=1)

    def mask(self, layers: Iterable[int], device: torch.device | str | None = None) -> Tensor:
        """(D,) bool, True at every coordinate of the named layers (0 = top, -1 = bottom).

        A chain holds the True coordinates fixed; `~mask` holds all the others.
        """
        chosen = list(layers)
        for layer in chosen:
            if not -self.num_layers <= layer < self.num_layers:
                raise ValueError(
                    f"layer {layer} does not exist: this hierarchy has layers 0 (top) to"
                    f" {self.num_layers - 1} (bottom)"
                )
        named = {layer % self.num_layers for layer in chosen}
        flags = [i in named for i in range(self.num_layers)]
        return torch.tensor(flags).repeat_interleave(torch.tensor(self.sizes)).to(device)


def _checked(shapes: object) -> tuple[tuple[int, ...], ...]:
    """Shapes from anywhere, a file included, as tuples of positive whole numbers."""

    def is_shape(shape: object) -> bool:
        return (
            isinstance(shape, list | tuple)
            and 1 <= len(shape) <= 3
            and all(type(n) is int and 0 < n <= LARGEST for n in shape)
        )

    if not isinstance(shapes, list | tuple) or not shapes or not all(map(is_shape, shapes)):
        raise ValueError(
            f"latent shapes are {shapes!r:.200}, expected one (C, H, W) or (d,) of positive whole"
            " numbers per layer, top first"
        )
    if sum(math.prod(shape) for shape in shapes) > LARGEST:
        raise ValueError(f"latent shapes {shapes!r:.200} have more than {LARGEST} coordinates")
    return tuple(tuple(shape) for shape in shapes)
