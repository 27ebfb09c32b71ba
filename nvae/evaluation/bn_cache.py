"""Re-estimated batch-norm statistics, kept in a file: the same question has the same answer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from nvae import batchnorm
from nvae.model import AutoEncoder
from nvae.runtime import written_whole
from nvae.seeds import seeded

BLOCK = 2**32 - 1  # re-estimation draws as if it were this block of samples


def readjust(
    model: AutoEncoder,
    folder: Path,
    *,
    checkpoint_sha256: str,
    temperature: float,
    seed: int,
    iterations: int,
    batch_size: int,
    is_main: bool = True,
) -> str:
    """Re-estimate the batch-norm statistics, or take them from the file of an earlier time.

    The file is named by a digest of everything the statistics depend on, which it also holds in
    full: the checkpoint (its whole file), temperature, seed, iterations, batch size, and the kind
    of device, whose random numbers differ. The main process writes it.

    Returns:
        `estimated` or `cached`.
    """
    device = model.prior_ftr0.device
    question = {
        "checkpoint_sha256": checkpoint_sha256,
        "temperature": repr(float(temperature)),
        "seed": str(seed),
        "iterations": str(iterations),
        "batch_size": str(batch_size),
        "device": device.type,
    }
    name = f"bn_{checkpoint_sha256[:12]}_t{temperature:g}_s{seed}_i{iterations}x{batch_size}"
    path = folder / f"{name}_{device.type}.safetensors"
    known = _read(path, question)
    own = _statistics(model)
    if known is not None and _shapes(known) == _shapes(own):
        with torch.no_grad():
            for key, buffer in own.items():
                buffer.copy_(known[key])  # in place: what was attached to the model sees it
        return "cached"
    batchnorm.readjust(
        model,
        iterations=iterations,
        batch_size=batch_size,
        temperature=temperature,
        generator=seeded(device, seed, BLOCK),
        progress=is_main,
    )
    if is_main:
        from safetensors.torch import save_file

        with written_whole(path) as temporary:
            save_file({k: v.cpu() for k, v in own.items()}, temporary, question)
    return "estimated"


def _statistics(model: AutoEncoder) -> dict[str, Tensor]:
    """The live buffers by their names in the state dict."""
    return {
        f"{layer}.{name}": buffer
        for layer, module in model.batch_norms()
        for name, buffer in module.named_buffers()
    }


def _shapes(tensors: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in tensors.items()}


def _read(path: Path, question: dict[str, str]) -> dict[str, Tensor] | None:
    """The file's statistics if it is whole and answers this question; a bad one is made anew."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            if file.metadata() != question:
                return None
            return {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, json.JSONDecodeError):
        return None
