"""What a hierarchical VAE must offer to get an energy-based prior: four methods and a layout."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ebm_prior.latents import Layout
from ebm_prior.steps import Steps


class Backbone(Protocol):
    """A frozen hierarchical VAE. Randomness comes from the generator, nothing is trained.

    `T`, the map u -> z, is the top-down recursion z_i = mean_i + temperature * std_i * u_i, with
    mean and std of layer i functions of all layers above (paper, Section 3.1).
    """

    layout: Layout

    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """x in [0, 1], (B, C, H, W) -> u (B, D): a posterior draw, standardised, in one pass."""
        ...

    def to_z(self, u: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """T: u (B, D) -> z, top first; differentiable in u."""
        ...

    def to_u(self, z: list[Tensor]) -> Tensor:
        """T^-1 at temperature 1: u_i = (z_i - mean_i) / std_i, (B, D)."""
        ...

    def decode(
        self, u: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """One draw of the image given u, (B, C, H, W) in [0, 1]; T runs at `temperature`."""
        ...


class BackboneWithNoise(Backbone, Protocol):
    """An optional method, for scores whose random numbers belong to each image (`ood.py`)."""

    def infer_with(self, x: Tensor, eps: list[Tensor]) -> Tensor:
        """`infer` with its noise given: normal (B, \\*shape), one per layer, top first."""
        ...


class BackboneWithCopy(Backbone, Protocol):
    """Two optional methods, for a backbone that has a frozen copy to run T on (`frozen.fast`)."""

    def folded(self, steps: Steps) -> Backbone:
        """The same backbone whose `to_z`, to rounding the same, is quicker in chains."""
        ...

    def refresh(self) -> None:
        """Look whether the copy is still of the weights as they are; called before each draw."""
        ...


class Moments(NamedTuple):
    """The prior of one layer, given the layers above it."""

    mean: Tensor  # like z_i
    std: Tensor  # like z_i, at temperature 1
    h: Tensor | None  # the decoder state before z_i is added; None where there is none (top)


class BackboneWithMoments(Backbone, Protocol):
    """A further optional method, for priors and scores that need the layers' own moments."""

    def moments(self, z: list[Tensor]) -> list[Moments]:
        """Per layer, top first: mean, deviation and state, computed from the given z."""
        ...
