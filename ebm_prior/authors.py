"""Import of the authors' energy networks: a dictionary of `netE{i}` and `opt{i}` per layer.

The layout of their file is the contract's (networks.md); nothing in it is run.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebm_prior.backbones.base import Backbone
from ebm_prior.base import Prior
from ebm_prior.checkpoint import PathLike, assemble, check_layout, check_tensors
from ebm_prior.config import PriorConfig
from ebm_prior.files import one_line

BOMB = 100  # times its size that a file may unpack to; one of weights is stored as it is


def import_authors(
    path: PathLike, backbone: Backbone, settings: Mapping[str, Any] | None = None
) -> Prior:
    """Import energy networks of the authors' release, a dictionary of `netE{i}` and `opt{i}`.

    Which network, its width, spectral normalisation and latent shapes are read off the keys
    (the file holds no configuration); `opt{i}` is left behind.

    Args:
        settings: what the keys cannot say: `max_T`, `num_steps`, `b2`, `preset`, ... of
            `PriorConfig`.
    """
    path = Path(path)
    networks = _authors_networks(path)
    kinds = [_Kind.of(f"{path}, netE{i}", network) for i, network in enumerate(networks)]
    if len({(k.network, k.width, k.spectral_norm) for k in kinds}) > 1:
        raise ValueError(f"{path}: its layers differ in kind or width: {kinds}; expected one kind")
    config = PriorConfig(
        **{
            **dict(settings or {}),
            "shapes": tuple(k.shape for k in kinds),
            "network": kinds[0].network,
            "width": kinds[0].width,
            "spectral_norm": kinds[0].spectral_norm,
        }
    )
    energies = {f"netE{i}.{key}": v for i, net in enumerate(networks) for key, v in net.items()}
    check_layout(str(path), config, backbone)
    check_tensors(str(path), config, energies)
    return assemble(backbone, config, energies)


@dataclass(frozen=True)
class _Kind:
    """What the keys of one of the authors' networks say about it (side h is square there)."""

    network: str
    width: int
    spectral_norm: bool
    shape: tuple[int, int, int]

    @staticmethod
    def of(name: str, network: Mapping[str, Tensor]) -> _Kind:
        def count(pattern: str) -> int:
            found = (re.match(pattern, key) for key in network)
            return len({match.group(1) for match in found if match})

        def kernel(layer: str) -> Tensor:
            value = network.get(f"{layer}.weight_orig", network.get(f"{layer}.weight"))
            if value is None or value.ndim != 4:
                raise ValueError(f"{name}: expected a convolution {layer}; not a netE file?")
            return value

        spectral_norm = "out.1.weight_orig" in network
        if any(key.startswith("conv_start.") for key in network):
            width, channels = kernel("conv_start").shape[:2]
            blocks = count(r"res_blocks\.(\d+)\.")
            return _Kind("residual", width, spectral_norm, (channels, *_square(4 << blocks)))
        first = "conv2d.conv1" if count(r"conv2d\.conv(1)\.") else "downsample"
        stages = count(r"conv2d\.conv(\d+)\.")
        width, channels = kernel("downsample").shape[0], kernel(first).shape[1]
        return _Kind("conv", width, spectral_norm, (channels, *_square(8 << stages)))


def _authors_networks(path: Path) -> list[dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the authors' netE{{i}} checkpoint")
    try:
        _refuse_bomb(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole PyTorch file of plain tensors ({one_line(error)});"
            " copy it again; files that run code when read are not accepted"
        ) from None
    keys = sorted(content, key=str) if isinstance(content, dict) else []
    layers = sum(bool(re.fullmatch(r"netE\d+", str(key))) for key in keys)
    wanted = [f"netE{i}" for i in range(layers)]
    if not layers or not all(isinstance(content.get(key), dict) for key in wanted):
        raise ValueError(
            f"{path}: holds {', '.join(map(str, keys[:8])) or type(content).__name__}, expected"
            " state dicts netE0, netE1, ... without a gap; is it the authors' energy checkpoint?"
        )
    networks = [
        {str(key).removeprefix("module."): value for key, value in content[name].items()}
        for name in wanted
    ]
    for name, network in zip(wanted, networks, strict=True):
        if not all(isinstance(value, Tensor) for value in network.values()):
            raise ValueError(f"{path}, {name}: holds things that are not tensors")
    return networks


def _refuse_bomb(path: Path) -> None:
    """PyTorch unpacks compressed entries, of which a few kB may hold gigabytes; weights do not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        if unpacked > BOMB * path.stat().st_size:
            raise ValueError(f"it unpacks to {unpacked:,} bytes, more than {BOMB} times its size")


def _square(side: int) -> tuple[int, int]:
    return side, side
