"""What defines a small hierarchical VAE beside its weights: plain JSON in files. No torch here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

LIKELIHOODS = ("logistic", "mixture", "gaussian")


@dataclass(frozen=True)
class HVAEConfig:
    """The network (contract, settings.md, "HVAE backbone").

    Attributes:
        dataset: the name of the images' data set.
        image_shape: (C, H, W).
        latents: (C, H, W) per layer, top first; each side once, twice or four times the one above.
        widths: features at each layer's resolution, top first.
        image_width: features at the image's resolution; 0: none, pixels are folded into channels.
        cells: residual cells of a stage.
        groups: of GroupNorm in the cells; 0: no normalisation.
        likelihood: of a pixel's value: `logistic`: discretised, its scale predicted, one
            component; `mixture`: of 5 such components; `gaussian`: one learned deviation for all.
        levels: values a pixel can take.
    """

    dataset: str
    image_shape: tuple[int, int, int]
    latents: tuple[tuple[int, int, int], ...]
    widths: tuple[int, ...]
    image_width: int = 96
    cells: int = 2
    groups: int = 8
    likelihood: str = "logistic"
    levels: int = 256

    def __post_init__(self) -> None:
        self._require("dataset", isinstance(self.dataset, str), "a name")
        for name in ("image_shape", "latents", "widths"):
            value = getattr(self, name)
            self._require(name, isinstance(value, list | tuple) and 0 < len(value) <= 64, "a list")
        shapes = (self.image_shape, *self.latents)
        for shape in shapes:
            right = isinstance(shape, list | tuple) and len(shape) == 3 and _whole(shape, 1, 4096)
            self._require("latents", right and shape[1] == shape[2], "square shapes (C, H, W)")
        object.__setattr__(self, "image_shape", tuple(self.image_shape))
        object.__setattr__(self, "latents", tuple(tuple(shape) for shape in self.latents))
        object.__setattr__(self, "widths", tuple(self.widths))
        channels = self.image_shape[0]
        self._require("image_shape", channels in (1, 3), "1 or 3 channels")
        for above, below in zip(self.sides, [*self.sides[1:], self.image_shape[1]], strict=True):
            self._require(
                "latents",
                below in (above, 2 * above, 4 * above),
                f"sides that stay, double or quadruple from layer to layer and to the image's"
                f" {self.image_shape[1]}",
            )
        self._require(
            "widths",
            len(self.widths) == len(self.latents) and _whole(self.widths, 1, 4096),
            "one whole number from 1 to 4096 per layer",
        )
        for name, low, high in (
            ("image_width", 0, 4096),
            ("cells", 0, 32),
            ("groups", 0, 4096),
            ("levels", 2, 2**16),
        ):
            value = getattr(self, name)
            self._require(name, _whole([value], low, high), f"a whole number from {low} to {high}")
        if self.groups:
            divides = all(width % self.groups == 0 for width in (*self.widths, self.image_width))
            self._require("groups", divides, "a divisor of all widths, or 0")
        self._require(
            "likelihood", self.likelihood in LIKELIHOODS, f"one of {', '.join(LIKELIHOODS)}"
        )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise ValueError(
                f"HVAE setting {name} is {getattr(self, name)!r:.100}, expected {expected}"
            )

    @property
    def sides(self) -> list[int]:
        """The resolution of each layer, top first."""
        return [side for _, _, side in self.latents]

    @property
    def image_dims(self) -> int:
        """Values of an image."""
        return math.prod(self.image_shape)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> HVAEConfig:
        """The inverse of `to_dict`, for values from a file: unknown names and types refused."""
        if not isinstance(values, Mapping):
            raise ValueError(f"HVAE settings are {values!r:.100}, expected an object of settings")
        known = {field.name for field in fields(cls)}
        if values.keys() != known:
            raise ValueError(
                f"HVAE settings are {', '.join(map(str, values))!s:.200}; this version knows"
                f" {', '.join(sorted(known))}: was the file written by another one?"
            )
        return cls(**values)


def _whole(values: Any, low: int, high: int) -> bool:
    return all(type(value) is int and low <= value <= high for value in values)


@dataclass(frozen=True)
class Size:
    """A network for any image: channels and resolutions of the layers, top first."""

    about: str
    channels: tuple[int, ...]
    shrink: tuple[int, ...]  # the image's side over the layer's
    network: dict[str, Any]

    def config(
        self, dataset: str, image_shape: tuple[int, int, int], levels: int, likelihood: str
    ) -> HVAEConfig:
        """The network for these images.

        Raises:
            ValueError: their side cannot be halved often enough.
        """
        side = image_shape[1]
        if side % self.shrink[0]:
            raise ValueError(
                f"images of {dataset} have side {side}, expected a multiple of {self.shrink[0]};"
                " choose another --size"
            )
        return HVAEConfig(
            dataset,
            image_shape,
            tuple(
                (c, side // s, side // s) for c, s in zip(self.channels, self.shrink, strict=True)
            ),
            likelihood=likelihood,
            levels=levels,
            **self.network,
        )


SIZES = {
    "full": Size(
        "latents 32x8x8, 32x8x8, 32x16x16 of 32x32 images; for a GPU",
        (32, 32, 32),
        (4, 4, 2),
        {"widths": (192, 192, 128), "image_width": 96},
    ),
    "small": Size(
        "latents 16x4x4, 16x8x8, 8x16x16 of 32x32 images; minutes on a CPU",
        (16, 16, 8),
        (8, 4, 2),
        {"widths": (96, 96, 48), "image_width": 0, "groups": 0},
    ),
    "tiny": Size(
        "latents 4x2x2, 4x2x2, 4x4x4 of 8x8 digits; a minute",
        (4, 4, 4),
        (4, 4, 2),
        {"widths": (32, 32, 24), "image_width": 0, "cells": 1, "groups": 0},
    ),
}
