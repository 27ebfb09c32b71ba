"""The fast path: a prior whose chains run on frozen, folded copies; the plain one is its oracle.

    prior = ebm_prior.fast(ebm_prior.load("prior.safetensors", vae))
    prior = ebm_prior.fast(prior, ebm_prior.Steps(precision="bf16", recompute=True))

What comes back satisfies the same interfaces, so nothing that uses a prior knows on which path it
runs; the commands choose. The learned weights are shared: trained further, or loaded anew, the
fast prior follows.
"""

from __future__ import annotations

from typing import TypeVar

from ebm_prior import langevin
from ebm_prior.base import Prior
from ebm_prior.energy import EnergyNets
from ebm_prior.frozen.graph import Replayed
from ebm_prior.frozen.wide import WideEnergies, suits
from ebm_prior.prior import EBMPrior
from ebm_prior.steps import NAMES, Steps

__all__ = ["NAMES", "Steps", "fast"]

Same = TypeVar("Same", bound=Prior)


def fast(prior: Same, steps: Steps | None = None) -> Same:
    """The same prior with its chains on the fast path; the given one stays as it is.

    A backbone with a method `folded(steps)` gives its frozen copy, any other is used as it is. The
    energies of equal shape are evaluated as one network.

    Args:
        steps: which optimisations; by default all that are exact.

    Raises:
        ValueError: no prior.
    """
    if not isinstance(prior, Prior):
        raise ValueError(
            f"fast got {type(prior).__name__} {str(prior)!r:.60}, expected a prior: what"
            " ebm_prior.load gives, or one in training"
        )
    steps = steps or Steps()
    folded = getattr(prior.backbone, "folded", None)
    backbone = folded(steps) if steps.tower and folded is not None else prior.backbone
    found = prior.on(backbone)
    if not isinstance(found, EBMPrior):
        return found
    if isinstance(found.sampler, Replayed):
        found.sampler = langevin.run
    nets = found.energies
    if (steps.once or steps.group or steps.merge) and isinstance(nets, EnergyNets) and suits(nets):
        found.energies = WideEnergies(nets, found.layout.shapes, steps)
    # What stays in its place while weights change, and holds no wait of the host, is captured.
    stays = backbone is not prior.backbone and isinstance(found.energies, WideEnergies)
    if steps.graph and stays and found.sampler is langevin.run:
        found.sampler = Replayed()
    return found
