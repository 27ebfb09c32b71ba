"""When is a training run lost? The limits within which it must stay, and their watch.

Unrestrained energies blow up within a few dozen steps of looking well, and never come back.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ebm_prior.config import PriorConfig
from ebm_prior.latents import Layout
from ebm_prior.schedule import Schedule

MEMORY = 10  # steps the running means look back

# Working runs keep the mean of f(u-) - f(u+) within 0.1 (digits) or 1.5 (small CIFAR-10 models);
# those that passed about 5 were at -115 twenty steps later.
DIFFERENCE = 5.0
# K times the step size from which chains forget where they began by their own steps.
MIXING = 0.5
# Negatives have deviation 1.00 to 1.11 in working runs; 4.8, 13, 184 in lost ones. In units of the
# data's own, should that be above 1: an encoder that does not fit its prior makes it so.
U_STD = 2.0
# A layer's loss, in magnitude: where the reference stops.
LOSS = 1e15


@dataclass(frozen=True)
class Limits:
    """What the running means must not pass."""

    difference: float = DIFFERENCE
    u_std: float = U_STD
    loss: float = LOSS

    @classmethod
    def of(cls, config: PriorConfig) -> Limits:
        """The limits for a prior.

        Where the chain's own steps move u little, f carries the motion: K steps of s grad f / 2
        that move each of D coordinates by one standard deviation raise f by 2 D / (K s), which is
        taken as the limit. With `energy_scale` step, f has been multiplied by s.
        """
        if config.kind == "ncp":  # a classifier's logits are to differ; there is no chain
            return cls(difference=math.inf)
        schedule = Schedule(config.max_T)
        step = float(schedule.step_size(config.b2, config.step_rule).max())
        reach = config.num_steps * (step if config.energy_scale == "none" else 1.0)
        if config.energy_scale == "none" and reach >= MIXING:
            return cls()
        return cls(difference=max(DIFFERENCE, 2 * Layout(config.shapes).dim / reach))


@dataclass(frozen=True)
class Measured:
    """One step over all processes: means, but the largest magnitude of any layer's loss."""

    loss: float
    difference: float
    u_std: float
    data_std: float  # of the posterior draws, before noise
    gradient: float
    worst_layer: float


class Guard:
    """Running means of what a step measured, and the number of times they left the limits."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.difference, self.u_std, self.data_std = 0.0, 1.0, 1.0
        self.seen = self.halvings = 0

    def judge(self, step: Measured) -> str | None:
        """Take a step into the means; why it must not be applied, or None.

        The reason comes before the update, as in the reference.
        """
        if not all(map(math.isfinite, asdict(step).values())):
            return "loss or gradient is not finite"
        if step.worst_layer > self.limits.loss:
            return f"a layer's loss is {step.worst_layer:.3g}, limit {self.limits.loss:.3g}"
        self.seen += 1
        share = 1 / min(self.seen, MEMORY)
        self.difference += share * (step.difference - self.difference)
        self.u_std += share * (step.u_std - self.u_std)
        self.data_std += share * (step.data_std - self.data_std)
        if abs(self.difference) > self.limits.difference:
            return (
                f"mean f(u-) - f(u+) is {self.difference:.3g}, limit +-{self.limits.difference:g}"
            )
        if self._spread > self.limits.u_std:
            return (
                f"the deviation of u- is {self.u_std:.3g}, limit {self.limits.u_std:g} times the"
                f" data's {self.data_std:.3g}"
            )
        return None

    @property
    def _spread(self) -> float:
        return self.u_std / max(1.0, self.data_std)

    @property
    def well(self) -> bool:
        """Far enough from the limits for the present state to be worth going back to."""
        limit = self.limits
        inside = (abs(self.difference) / limit.difference, (self._spread - 1) / (limit.u_std - 1))
        return max(inside) < 0.5

    def went_back(self) -> None:
        """Forget the means: they are of the steps that were undone."""
        self.halvings += 1
        self.difference, self.u_std, self.data_std, self.seen = 0.0, 1.0, 1.0, 0

    def state_dict(self) -> dict[str, Any]:
        names = ("difference", "u_std", "data_std", "seen", "halvings")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
