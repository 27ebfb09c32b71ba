"""The name of a backbone: a prior's energies mean nothing on another one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ebm_prior.backbones.base import Backbone

# Old files lack the alias, and re-estimation changes the buffers: neither is the backbone's name.
NOT_FINGERPRINTED = {"weight_normalized", "running_mean", "running_var", "num_batches_tracked"}


def fingerprint(state_dict: Mapping[str, Tensor]) -> str:
    """Name a backbone: sha256 over its parameters' names, shapes and float32 bytes, sorted."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        if name.rpartition(".")[2] in NOT_FINGERPRINTED:
            continue
        value = state_dict[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name} {tuple(value.shape)}\n".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def backbone_fingerprint(backbone: Backbone) -> str:
    """Its own `fingerprint()` if it has one, else that of its `state_dict()`, else "none"."""
    own = getattr(backbone, "fingerprint", None)
    if own is not None:
        return str(own())
    return fingerprint(backbone.state_dict()) if isinstance(backbone, nn.Module) else "none"


def check_fingerprint(name: str, trained_on: str, given: str) -> None:
    """Refuse a prior of another backbone: its energies mean nothing there.

    Raises:
        ValueError: with both fingerprints.
    """
    if trained_on != given:
        raise ValueError(
            f"{name} was trained on the backbone {trained_on}, got the backbone {given};"
            " give it the checkpoint it was trained on, or train a prior for this one"
        )
