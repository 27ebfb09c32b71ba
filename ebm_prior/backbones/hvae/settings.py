"""How an HVAE is trained, apart from the network and its data. No torch here."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

# What may change between a run and its continuation without making another run of it.
FREE = ("log_every", "save_every", "grid_every", "grid_size", "max_minutes")


@dataclass(frozen=True)
class HVAESettings:
    """The defaults are the contract's (settings.md, "HVAE backbone"), for a GPU, but for the clip.

    Attributes:
        iterations: steps; the schedules of the learning rate and of the KL end with them.
        lr, lr_end: Adam's learning rate falls from one to the other on a half cosine.
        weight_decay: decoupled, as in AdamW; 0: Adam.
        kl_weight: of the KL once warm; below 1 the posteriors say more and the prior fits less.
        warmup: fraction of the steps in which the weight of the KL rises from 0.
        free_bits: nats of KL, per channel of a layer and averaged over the batch, that are free.
        grad_clip, grad_skip: largest norm of the gradient of the loss in nats per image value;
            above the second one the update is skipped. inf: off. The contract clips at 100, which
            hardly ever acts: on the small network the middle layer then fell to 0.3 nats, with 1
            it kept 100.
        ema: decay of the averaged weights that are saved and shown, after n steps at most
            (n + 1) / (n + 10); 0: off.
        flips: flip images at random.
        amp: `bf16`: network in bfloat16, latents, KL and pixels in float32; or `off`.
        max_minutes: stop after this many; 0: never.
    """

    iterations: int
    lr: float = 1e-3
    lr_end: float = 1e-5
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    kl_weight: float = 1.0
    warmup: float = 0.1
    free_bits: float = 0.02
    grad_clip: float = 1.0
    grad_skip: float = 400.0
    ema: float = 0.999
    flips: bool = False
    amp: str = "off"
    seed: int = 0
    log_every: int = 10
    save_every: int = 500
    grid_every: int = 500
    grid_size: int = 32
    max_minutes: float = 0.0

    def __post_init__(self) -> None:
        if self.amp not in ("off", "bf16"):
            raise ValueError(f"amp is {self.amp!r}, expected off or bf16")
        for name, low, high in (
            ("iterations", 1, math.inf),
            ("lr", 0, 1),
            ("lr_end", 0, self.lr),
            ("weight_decay", 0, 1),
            ("beta1", 0, 0.9999),
            ("beta2", 0, 0.999999),
            ("kl_weight", 0, 1000),
            ("warmup", 0, 1),
            ("free_bits", 0, math.inf),
            ("grad_clip", 1e-9, math.inf),
            ("grad_skip", self.grad_clip, math.inf),
            ("ema", 0, 0.999999),
            ("seed", 0, 2**63),
            ("log_every", 1, math.inf),
            ("save_every", 1, math.inf),
            ("grid_every", 0, math.inf),
            ("grid_size", 1, 4096),
            ("max_minutes", 0, math.inf),
        ):
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} is {value}, expected {low:g} to {high:g}")

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        fall = 0.5 * (1 + math.cos(math.pi * step / self.iterations))
        return self.lr_end + (self.lr - self.lr_end) * fall

    def kl_weight_at(self, step: int) -> float:
        """Weight of the KL in a step, counted from 0."""
        warm = self.warmup * self.iterations
        return self.kl_weight * min(1.0, (step + 1) / warm if warm else 1.0)

    def facts(self) -> dict[str, Any]:
        """The settings that make another run of it when they change."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}
