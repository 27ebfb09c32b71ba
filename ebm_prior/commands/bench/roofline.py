r"""What a step would take if every launch ran at the machine's rates, against what it takes.

.. math:: s = \sum_i \max(o_i / \text{rate}, \; b_i / \text{bandwidth})

with o_i the operations and b_i the bytes of launch i, of the launches that a path does make: one
that launches less, or moves less, has a smaller s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ebm_prior.commands.bench.counting import Work
from ebm_prior.commands.bench.timing import CLOCKS, seconds

LAUNCH = 5e-6  # seconds that the host needs for an eager launch on CUDA


@dataclass(frozen=True)
class Rates:
    """Operations per second in float32 and bfloat16, bytes per second read plus written."""

    float32: float
    bf16: float
    bandwidth: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "tflops_float32": self.float32 / 1e12,
            "tflops_bf16": self.bf16 / 1e12,
            "gb_per_s": self.bandwidth / 1e9,
            "source": self.source,
        }


_ASSUMED = "assumed: 250 (TF32) and 500 (bf16) TFLOP/s achieved, 85% of the memory's bandwidth"
#: By a word of the device's name.
STATED = {
    "H200": Rates(250e12, 500e12, 0.85 * 4.3e12, f"{_ASSUMED} of 4.3 TB/s"),
    "H100": Rates(250e12, 500e12, 0.85 * 3.35e12, f"{_ASSUMED} of 3.35 TB/s"),
}


def stated(device: torch.device) -> Rates | None:
    """The rates assumed for a GPU of this name, if any are."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rates for word, rates in STATED.items() if word in name), None)


def measured(device: torch.device, clock: str, size: int | None = None) -> Rates:
    """The best of a few square matrix products and of a few large copies.

    Args:
        clock: one of `CLOCKS`.
        size: of the matrices' sides; the copy is of 64 such matrices in float32.
    """
    size = size or (8192 if device.type == "cuda" else 1024)
    with torch.no_grad():
        found = {}
        for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
            a = torch.randn(size, size, device=device).to(dtype)
            product = a @ a
            found[name] = 2 * size**3 / _best(partial(torch.mm, a, a, out=product), device, clock)
        source = torch.empty(16 * size * size, device=device).fill_(1.0)
        target = torch.empty_like(source)
        best = _best(partial(target.copy_, source), device, clock)
    words = f"measured here: products of {size} x {size} matrices, copies of {source.nbytes} bytes"
    return Rates(found["float32"], found["bf16"], 2 * source.nbytes / best, words)


def _best(run: Callable[[], object], device: torch.device, clock: str) -> float:
    """Seconds of the fastest of five calls after one."""
    return min([seconds(run, device)[CLOCKS.index(clock)] for _ in range(6)][1:])


def against(work: Iterable[Work], rates: Rates, taken: float, device: str) -> dict[str, float]:
    """Estimated seconds of a step by count, and their share of the `taken` ones."""
    work = list(work)
    compute = [w.flops / (rates.bf16 if w.half else rates.float32) for w in work]
    memory = [w.moved / rates.bandwidth for w in work]
    estimated = sum(map(max, compute, memory))
    found = {
        "estimated_s": estimated,
        "share": estimated / taken,
        "compute_s": sum(compute),
        "memory_s": sum(memory),
    }
    return found | ({"launch_s": LAUNCH * len(work)} if device == "cuda" else {})
