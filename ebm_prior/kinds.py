"""The kinds of priors by name, and how one is made of its configuration."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ebm_prior.backbones.base import Backbone
    from ebm_prior.base import Prior
    from ebm_prior.config import PriorConfig

_HOMES = {
    "diffusion": ("prior", "EBMPrior"),
    "joint": ("joint", "JointPrior"),
    "ncp": ("ncp", "NCPPrior"),
    "fitted": ("fitted", "FittedPrior"),
}


def kind(name: str) -> type[Prior]:
    """The class of a kind."""
    module, attribute = _HOMES[name]
    return getattr(import_module(f"ebm_prior.{module}"), attribute)


def build(backbone: Backbone, config: PriorConfig) -> Prior:
    """A fresh prior of the configured kind."""
    return kind(config.kind)(backbone, config)
