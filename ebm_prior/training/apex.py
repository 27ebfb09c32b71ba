"""NVIDIA's apex, if it is there: its fused Adam, and the reason when it cannot be used.

Optional and never needed: `--optimizer apex_adam` computes what `adam` does, to rounding. Apex is
built from source, so there are three ways to have it and not have it: not at all, without its
kernels, or the package that the Python index has under the same name, which is something else.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KERNELS = "amp_C"  # the compiled module that apex's optimisers call
BUILD = "build it for this PyTorch with its CUDA extensions (github.com/NVIDIA/apex)"


def why_not(device: torch.device | None = None) -> str | None:
    """Why apex's fused Adam cannot be used, None if it can.

    Args:
        device: where the parameters are; None does not ask.
    """
    try:
        spec = find_spec("apex")
    except (ImportError, ValueError):  # ValueError: something without a spec took the name
        spec = None
    if spec is None:
        return f"apex is not installed; {BUILD}"
    # Looked up without being imported: a stranger's code should not run.
    folders = spec.submodule_search_locations
    if folders is None or PathFinder.find_spec("apex.optimizers", folders) is None:
        place = spec.origin or ", ".join(folders or ())
        return (
            f"{place} is not NVIDIA's apex (`pip install apex` gets another package of that name);"
            f" pip uninstall apex, then {BUILD}"
        )
    for name, attribute in (("apex.optimizers", "FusedAdam"), (KERNELS, "multi_tensor_adam")):
        try:
            found = hasattr(importlib.import_module(name), attribute)
        except Exception as error:  # a build for another PyTorch fails in any way
            reason = " ".join(str(error).split())[:150]
            return f"apex is half built: import {name}: {type(error).__name__}: {reason}; {BUILD}"
        if not found:
            return f"apex is half built: {name} has no {attribute}; {BUILD}"
    if device is not None and device.type != "cuda":
        return f"its kernels are for CUDA, the run is on {device}"
    return None


def check(device: torch.device) -> None:
    """Refuse a run that asks for what is not there.

    Raises:
        ValueError: with the reason.
    """
    reason = why_not(device)
    if reason is not None:
        raise ValueError(
            f"--optimizer apex_adam: {reason}; or use --optimizer adam, the same to rounding"
        )


def adam(
    parameters: Iterable[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> torch.optim.Optimizer:
    """Apex's Adam in the form of PyTorch's: weight decay is added to the gradient, not decoupled.

    Raises:
        ValueError: it cannot be used.
    """
    parameters = list(parameters)
    check(parameters[0].device)
    FusedAdam: Any = importlib.import_module("apex.optimizers").FusedAdam
    return FusedAdam(parameters, lr=lr, betas=betas, weight_decay=weight_decay, adam_w_mode=False)
