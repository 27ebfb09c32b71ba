"""How a prior is trained, apart from the prior itself and its data. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

LR_SCHEDULES = ("epoch", "linear", "cosine")
# What may change between a run and its continuation without making another run of it.
FREE = ("guard", "max_halvings", "log_every", "save_every", "grid_every", "grid_size")


@dataclass(frozen=True)
class TrainSettings:
    """How a prior is trained. The defaults are the published CIFAR-10 settings.

    Attributes:
        iterations: steps; a step that the guard undoes counts.
        optimizer: `adam`: PyTorch's; `apex_adam`: apex's fused one, the same to rounding.
        lr_schedule: `epoch`: lr * lr_decay ** epoch; `linear` and `cosine`: from lr down to
            lr * lr_decay.
        weight_decay: coupled, added to the gradient.
        ema: decay of the averaged weights that are saved and sampled; 0 is off, as published.
        grad_clip: largest norm of the gradient; 0 is off.
        squared_penalty: weight of f(u-)^2 + f(u+)^2 in the loss.
        label_weight: weight of the labels' cross-entropy in the loss, where there are labels.
        guard_difference: limit of |mean f(u-) - f(u+)|; None chooses one for the prior.
        guard_u_std: limit of the deviation of the negatives, in units of the data's if above 1.
        guard_every: steps between states to go back to.
        max_halvings: times the learning rate is halved before training gives up.
        save_every: steps between saves; grid_every: between pictures of grid_size samples.
    """

    iterations: int
    optimizer: str = "adam"
    lr: float = 4e-5
    beta1: float = 0.99
    beta2: float = 0.999
    weight_decay: float = 3e-5
    lr_schedule: str = "epoch"
    lr_decay: float = 0.9
    ema: float = 0.0
    grad_clip: float = 0.0
    squared_penalty: float = 0.0
    label_weight: float = 1.0
    seed: int = 0
    guard_difference: float | None = None
    guard_u_std: float = 2.0
    guard_every: int = 50
    max_halvings: int = 5
    log_every: int = 10
    save_every: int = 500
    grid_every: int = 500
    grid_size: int = 16

    def __post_init__(self) -> None:
        if self.optimizer not in ("adam", "apex_adam"):
            raise ValueError(f"optimizer is {self.optimizer!r}, expected adam or apex_adam")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"lr_schedule is {self.lr_schedule!r}, expected one of {', '.join(LR_SCHEDULES)}"
            )
        for name, low, high in (
            ("iterations", 1, math.inf),
            ("lr", 0, math.inf),
            ("beta1", 0, 1),
            ("beta2", 0, 1),
            ("weight_decay", 0, math.inf),
            ("lr_decay", 0, 1),
            ("ema", 0, 1),
            ("grad_clip", 0, math.inf),
            ("squared_penalty", 0, math.inf),
            ("label_weight", 0, math.inf),
            ("seed", 0, 2**63),
            ("guard_difference", 1e-9, math.inf),
            ("guard_u_std", 1.01, math.inf),
            ("guard_every", 1, math.inf),
            ("max_halvings", 0, 1000),
            ("log_every", 1, math.inf),
            ("save_every", 1, math.inf),
            ("grid_every", 0, math.inf),
            ("grid_size", 1, 4096),
        ):
            value = getattr(self, name)
            if value is None and name == "guard_difference":
                continue
            open_end = name in ("beta1", "beta2", "ema")
            if not (low <= value <= high) or (open_end and value == high):
                raise ValueError(
                    f"{name} is {value}, expected {low:g} to {high:g}"
                    + (", the end excluded" if open_end else "")
                )

    def lr_at(self, step: int, batches_per_epoch: int) -> float:
        """Learning rate of a step, counted from 0."""
        if self.lr_schedule == "epoch":
            return self.lr * self.lr_decay ** (step // batches_per_epoch)
        done = step / max(1, self.iterations - 1)
        if self.lr_schedule == "cosine":
            done = 0.5 * (1 - math.cos(math.pi * done))
        return self.lr * (1 - (1 - self.lr_decay) * done)

    def facts(self) -> dict[str, Any]:
        """The settings that make another run of it when they change."""
        kept = {f.name: getattr(self, f.name) for f in fields(self)}
        free = {name for name in kept if name.startswith(FREE)}
        if self.lr_schedule == "epoch":
            free.add("iterations")  # longer or shorter, the steps are the same
        return {name: value for name, value in kept.items() if name not in free}
