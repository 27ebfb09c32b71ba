"""What defines a prior beside its weights and its backbone; checked, and plain JSON in files."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ebm_prior.coupling import Attribute, checked
from ebm_prior.latents import Layout
from ebm_prior.schedule import LONGEST, STEP_RULES

NETWORKS = ("residual", "conv", "mlp", "map")
ENERGY_SCALES = ("step", "none")
KINDS = ("diffusion", "joint", "ncp", "fitted")
#: Kinds with a choice of samplers, the default first.
SAMPLERS: dict[str, tuple[str, ...]] = {"joint": ("u", "z"), "ncp": ("sir", "langevin")}
LOGDETS = ("exact", "released")


@dataclass(frozen=True)
class PriorConfig:
    """Everything that defines a prior, beside its weights and its backbone.

    The defaults are the published CIFAR-10 settings (contract, settings.md).

    Attributes:
        shapes: latent shapes, top first.
        network: `residual` (variant A), `conv` (B), `mlp` (C) or `map`; `depth` is for `mlp` only.
        max_T: N, diffusion steps.
        num_steps: K, Langevin steps per diffusion index.
        b2: the number behind the step size, see `Schedule.step_size`.
        energy_scale: `step`: F = f / e2(t), as released; `none`: F = f, for small latents.
        step_rule: `cumulative`, as released, or `plain`, for small latents.
        last_step_kernel: keep the kernel term at t = N-1, as in the paper's Eq. 9.
        preset: the name these settings come from, for the record.
        kind: `diffusion`, the paper's, or a baseline: `joint` (marginal EBM), `ncp`
            (noise-contrastive), `fitted` (Gaussian). What follows belongs to single kinds.
        attributes: `diffusion`: labels at chosen layers (paper, Section 3.3).
        label_steps: a label acts at t below this number.
        per_layer_classes: every coupled layer is a classifier of its own.
        sampler: one of `SAMPLERS`; empty where the kind has no choice.
        joint_logdet: `joint` in u-space: `exact`, or as the predecessor's release computes it.
        contexts: `ncp`: per layer the shape of the decoder's state it sees; None: without.
        proposals: `ncp` with `sir`: proposals per draw.
        rank: `fitted`: of the covariance beside a diagonal; 0: full.
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
    kind: str = "diffusion"
    attributes: tuple[Attribute, ...] = ()
    label_steps: int = 1
    per_layer_classes: bool = False
    sampler: str = ""
    joint_logdet: str = "exact"
    contexts: tuple[tuple[int, ...] | None, ...] | None = None
    proposals: int = 256
    rank: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "shapes", Layout(self.shapes).shapes)
        for name, choices in (
            ("network", NETWORKS),
            ("energy_scale", ENERGY_SCALES),
            ("step_rule", STEP_RULES),
            ("kind", KINDS),
            ("joint_logdet", LOGDETS),
        ):
            self._require(name, self.__dict__[name] in choices, f"one of {', '.join(choices)}")
        samplers = SAMPLERS.get(self.kind, ("",))
        object.__setattr__(self, "sampler", self.sampler or samplers[0])
        expected = f"one of {', '.join(samplers)} for the kind {self.kind}"
        self._require("sampler", self.sampler in samplers, expected)
        for name, low, high in (
            ("width", 1, 2**14),
            ("depth", 0, 256),
            ("max_T", 1, LONGEST),
            ("num_steps", 1, 10**6),
            ("label_steps", 0, LONGEST),
            ("proposals", 2, 2**20),
            ("rank", 0, 2**16),
        ):
            value = self.__dict__[name]
            self._require(
                name,
                type(value) is int and low <= value <= high,
                f"a whole number from {low} to {high}",
            )
        for name in ("spectral_norm", "last_step_kernel", "per_layer_classes"):
            self._require(name, type(self.__dict__[name]) is bool, "true or false")
        self._require(
            "b2",
            type(self.b2) in (int, float) and math.isfinite(self.b2) and self.b2 > 0,
            "a positive number",
        )
        self._require(
            "preset", self.preset is None or isinstance(self.preset, str), "a name or null"
        )
        if self.kind == "joint":
            self._require("max_T", self.max_T == 1, "1: one marginal EBM has no diffusion")
            self._require(
                "last_step_kernel", not self.last_step_kernel, "false: the joint prior has none"
            )
            self._require(
                "joint_logdet",
                self.sampler == "u" or self.joint_logdet == "exact",
                "exact with the sampler 'z', which misses none: leave it, or take the sampler 'u'",
            )
        object.__setattr__(self, "attributes", self._attributes())
        if self.contexts is not None:
            self._require("contexts", self.kind == "ncp", "none for another kind than ncp")
            self._require("contexts", len(self.contexts) == len(self.shapes), "one per layer")
            found = tuple(None if c is None else Layout((c,)).shapes[0] for c in self.contexts)
            object.__setattr__(self, "contexts", found)

    def _attributes(self) -> tuple[Attribute, ...]:
        """As given by a caller, or as JSON gives them."""
        given, names = self.attributes, {field.name for field in fields(Attribute)}
        self._require("attributes", isinstance(given, list | tuple), "a list of attributes")
        found = []
        for entry in given:
            if isinstance(entry, Mapping) and entry.keys() == names:
                entry = Attribute(**entry)
            valid = isinstance(entry, Attribute) and isinstance(entry.name, str)
            self._require("attributes", valid, f"objects with {', '.join(sorted(names))}")
            found.append(entry)
        if found:
            self._require("kind", self.kind == "diffusion", "diffusion, to have attributes")
        return checked(found, len(self.shapes))

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
