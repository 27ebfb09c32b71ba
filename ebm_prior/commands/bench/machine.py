"""What the numbers were measured on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

from ebm_prior.commands.bench.roofline import Rates


def facts(device: torch.device, threads: int, rates: Rates) -> dict[str, Any]:
    """Names, versions and switches, and the rates measured on it."""
    found: dict[str, Any] = {
        "device": device.type,
        "name": processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "measured_rates": rates.to_dict(),
    }
    if device.type == "cpu":
        return {**found, "threads": threads}
    return {
        **found,
        "name": torch.cuda.get_device_name(device),
        "memory_gb": torch.cuda.get_device_properties(device).total_memory / 1e9,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32_convolutions": torch.backends.cudnn.allow_tf32,
        "tf32_products": torch.backends.cuda.matmul.allow_tf32,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
    }


def processor() -> str:
    """The CPU's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
