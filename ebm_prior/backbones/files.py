"""A path in, a backbone out: an NVAE checkpoint or an HVAE's file, told by their content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebm_prior.backbones import nvae
from ebm_prior.backbones.hvae import file as hvae_file
from ebm_prior.backbones.hvae.backbone import HVAEBackbone
from nvae.checkpoint import is_safetensors

Opened = nvae.NVAEBackbone | HVAEBackbone


def open_backbone(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Opened:
    """The frozen backbone of a file, on `device`.

    Raises:
        ValueError: a file of another kind, a damaged one, or none; what to give instead.
    """
    path = Path(path)
    if path.is_file() and is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
        except SafetensorError:
            metadata = {}  # `load` tells what is wrong
        if "fingerprint" in metadata:
            raise ValueError(
                f"{path} is a prior, not a VAE; give it as --prior, and as --checkpoint the VAE"
                " that it was trained on (an NVAE checkpoint.pt or an HVAE's .safetensors)"
            )
        return hvae_file.load(path, device)
    return nvae.load(path, device)


def of_model(model: Any, bn_statistics: Mapping[str, Tensor] | None = None) -> Opened:
    """The frozen backbone of a live model, which is an NVAE's.

    Raises:
        ValueError: it is none.
    """
    return nvae.NVAEBackbone(model, bn_statistics)
