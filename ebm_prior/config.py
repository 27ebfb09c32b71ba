"""What defines a prior beside its weights and its backbone; checked, and plain JSON in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ebm_prior.latents import Layout
from ebm_prior.schedule import LONGEST, STEP_RULES

NETWORKS = ("residual", "conv", "mlp")
ENERGY_SCALES = ("step", "none")


@dataclass(frozen=True)
class PriorConfig:
    """Everything that defines a prior, beside its weights and its backbone.

    The defaults are the published CIFAR-10 settings (contract, settings.md).

    Attributes:
        shapes: latent shapes, top first.
        network: `residual` (variant A), `conv` (B) or `mlp` (C); `depth` is for `mlp` only.
        max_T: N, diffusion steps.
        num_steps: K, Langevin steps per diffusion index.
        b2: the number behind the step size, see `Schedule.step_size`.
        energy_scale: `step`: F = f / e2(t), as released; `none`: F = f, for small latents.
        step_rule: `cumulative`, as released, or `plain`, for small latents.
        last_step_kernel: keep the kernel term at t = N-1, as in the paper's Eq. 9.
        preset: the name these settings come from, for the record.
    """

    shapes: tuple[tuple[int, ...], ...]
    network: str = "residual"
    width: int = 128
    depth: int = 2
    spectral_norm: bool = True
    max_T: int = 3
    num_steps: int = 50
    b2: float = 3e-5
    energy_scale: str = "step"
    step_rule: str = "cumulative"
    last_step_kernel: bool = False
    preset: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", Layout(self.shapes).shapes)
        for name, choices in (
            ("network", NETWORKS),
            ("energy_scale", ENERGY_SCALES),
            ("step_rule", STEP_RULES),
        ):
            self._require(name, self.__dict__[name] in choices, f"one of {', '.join(choices)}")
        for name, low, high in (
            ("width", 1, 2**14),
            ("depth", 0, 256),
            ("max_T", 1, LONGEST),
            ("num_steps", 1, 10**6),
        ):
            value = self.__dict__[name]
            self._require(
                name,
                type(value) is int and low <= value <= high,
                f"a whole number from {low} to {high}",
            )
        for name in ("spectral_norm", "last_step_kernel"):
            self._require(name, type(self.__dict__[name]) is bool, "true or false")
        self._require(
            "b2",
            type(self.b2) in (int, float) and math.isfinite(self.b2) and self.b2 > 0,
            "a positive number",
        )
        self._require(
            "preset", self.preset is None or isinstance(self.preset, str), "a name or null"
        )

    def _require(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            got = self.__dict__[name]
            raise ValueError(f"prior setting {name} is {got!r:.100}, expected {expected}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self) | {"shapes": [list(shape) for shape in self.shapes]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PriorConfig:
        """The inverse of `to_dict`, for values from a file: unknown names and types refused."""
        if not isinstance(values, Mapping):
            raise ValueError(f"prior settings are {values!r:.100}, expected an object of settings")
        known = {field.name for field in fields(cls)}
        unknown = sorted(str(name) for name in values if name not in known)
        if unknown:
            raise ValueError(
                f"unknown prior settings {', '.join(unknown)!s:.200}; this version knows"
                f" {', '.join(sorted(known))}: was the file written by a newer one?"
            )
        if "shapes" not in values:
            raise ValueError("prior settings lack shapes: the latent shapes, top first")
        return cls(**values)
