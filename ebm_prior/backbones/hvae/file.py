"""An HVAE's file: one `.safetensors`, read safely and checked against its own configuration.

Metadata: `format`, `kind` ("hvae"), `config` (JSON), `training` (JSON, for the record), `step`,
`version`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ebm_prior._version import __version__
from ebm_prior.backbones.hvae.backbone import HVAEBackbone
from ebm_prior.backbones.hvae.config import HVAEConfig
from ebm_prior.backbones.hvae.model import HVAE
from ebm_prior.files import one_line, written_whole

FORMAT, KIND = "1", "hvae"
PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class HVAEFile:
    """What the file of an HVAE holds, checked: finite tensors, as the configuration says."""

    config: HVAEConfig
    tensors: dict[str, Tensor]
    training: dict[str, Any]
    step: int
    version: str


def save(
    path: PathLike, model: HVAE, *, step: int = 0, training: Mapping[str, Any] | None = None
) -> None:
    """Write the network; the file appears whole or not at all.

    Args:
        training: how it was trained, for the record.
    """
    metadata = {
        "format": FORMAT,
        "kind": KIND,
        "config": json.dumps(model.config.to_dict()),
        "training": json.dumps(dict(training or {})),
        "step": str(step),
        "version": __version__,
    }
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def read(path: PathLike) -> HVAEFile:
    """Read and check a file.

    Raises:
        ValueError: one line: what is wrong, what was expected, what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected one written by `ebm_prior train_hvae`")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            kind, number = metadata.get("kind", "none"), metadata.get("format", "none")
            if kind != KIND or number != FORMAT:
                raise ValueError(
                    f"{path}: kind {kind[:40]}, format {number[:40]}; expected an HVAE's file,"
                    f" kind {KIND}, format {FORMAT}, as written by `ebm_prior train_hvae`"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole .safetensors file ({one_line(error)}); copy it again"
        ) from None
    try:
        config = HVAEConfig.from_dict(json.loads(metadata["config"]))
        training, step = json.loads(metadata["training"]), int(metadata["step"])
    except KeyError as error:
        raise ValueError(f"{path}: its metadata lacks {error}; write it with save()") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: unreadable metadata: {one_line(error)}") from None
    _check_tensors(str(path), config, tensors)
    return HVAEFile(config, tensors, training, step, metadata.get("version", "unknown"))


def load(path: PathLike, device: str | torch.device = "cpu") -> HVAEBackbone:
    """The frozen backbone of a file, on `device`."""
    file = read(path)
    with torch.device("meta"):
        model = HVAE(file.config)
    model.load_state_dict(file.tensors, assign=True)
    return HVAEBackbone(model.to(device))


def _check_tensors(name: str, config: HVAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """Names, shapes and values, against a network without memory: a claimed width is free."""
    # Even without memory, building a module takes time: no more of them than the file has tensors.
    cells = 2 * len(config.widths) * config.cells
    if 4 * cells > len(tensors):
        raise ValueError(
            f"{name}: {len(tensors)} tensors for at least {cells} cells; the file is not whole"
        )
    with torch.device("meta"):
        expected = HVAE(config).state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys())
    if wrong:
        raise ValueError(
            f"{name}: {len(wrong)} tensors are missing or unknown, for example {wrong[0][:80]};"
            " the file's config and tensors disagree"
        )
    for key, value in tensors.items():
        if value.shape != expected[key].shape or value.dtype != torch.float32:
            raise ValueError(
                f"{name}: {key} is {value.dtype} of shape {tuple(value.shape)}, expected"
                f" torch.float32 of shape {tuple(expected[key].shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(
                f"{name}: {key} holds NaN or infinite values, expected finite ones; go back to an"
                " earlier file"
            )
