"""Energy-based diffusion priors for hierarchical VAEs (Cui and Han, ICML 2024).

    vae = nvae.load("checkpoint.pt")
    prior = ebm_prior.load("prior.safetensors", vae)
    images = prior.sample(64, temperature=0.7, seed=0)

The names below are imported on first use: `import ebm_prior` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ebm_prior._version import __version__

if TYPE_CHECKING:
    from ebm_prior.attach import attach
    from ebm_prior.backbones.base import Backbone
    from ebm_prior.checkpoint import load
    from ebm_prior.config import PriorConfig
    from ebm_prior.frozen import fast
    from ebm_prior.latents import Layout
    from ebm_prior.prior import EBMPrior
    from ebm_prior.steps import Steps

__all__ = [
    "Backbone",
    "EBMPrior",
    "Layout",
    "PriorConfig",
    "Steps",
    "__version__",
    "attach",
    "fast",
    "load",
]

_HOME = {
    "Backbone": "backbones.base",
    "EBMPrior": "prior",
    "Layout": "latents",
    "PriorConfig": "config",
    "attach": "attach",
    "fast": "frozen",
    "load": "checkpoint",
    "Steps": "steps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    # Importing the submodule `attach` has just bound that name to the module: bind the function.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
