r"""What a Langevin chain passes through, and whether a long one goes astray (paper, Figs. 6, 7).

`trace` runs the sampler and looks at some of its states without touching its random numbers.
`verdict` is the criterion "no oversaturation" for chains far longer than those of training
(contract, procedures.md, section 3).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior.base import frozen
from ebm_prior.prior import EBMPrior

LONG_STEPS, LONG_EVERY = 300, 30  # per diffusion index; 11 frames with the start
DARK, BRIGHT = 0.02, 0.98  # pixels beyond are saturated

U_SQUARE = (0.8, 1.25)  # where |u|^2 / d of a layer must stay
SATURATION_CHANGE = 0.05  # absolute
FRECHET_RATIO = 1.5  # after the long chains against after those of training


class Frame(NamedTuple):
    """One recorded state and its numbers, each the mean over the batch."""

    t: int
    step: int  # Langevin steps made at this t; 0: the state it starts from
    u: Tensor  # (B, D)
    f: Tensor  # (L,), each layer's log density ratio, in nats
    u_square: Tensor  # (L,), |u|^2 / d: 1 under the Gaussian prior
    gradient_norm: Tensor  # (), of the conditional log density


def recorded_steps(num_steps: int, every: int) -> list[int]:
    """0, every, 2 every, ... and the last step."""
    if every < 1 or num_steps < 1:
        raise ValueError(f"every {every} of {num_steps} steps: expected at least 1 of each")
    return sorted({*range(0, num_steps + 1, every), num_steps})


def trace(
    prior: EBMPrior,
    num: int,
    *,
    generator: torch.Generator,
    num_steps: int | None = None,
    every: int,
    levels: Collection[int] | None = None,
    look: Callable[[Frame], None],
) -> Tensor:
    """`prior.sample_u(num, ...)`, bit for bit, with `look` called at every recorded state.

    The numbers of a frame are computed at its own state and nothing is drawn for them.

    Args:
        num_steps: K; by default as trained.
        every: Langevin steps between frames; the last state of a t is recorded in any case.
        levels: the diffusion indices to record; by default N-1, the first, and 0, the last.
        look: gets the frames in the order of the chain.
    """
    last = prior.config.max_T - 1
    levels = {last, 0} if levels is None else set(levels)
    steps = set(recorded_steps(prior.config.num_steps if num_steps is None else num_steps, every))
    start: dict[int, Tensor] = {}  # u_{t+1}, which begins the chain at t and conditions it

    def record(t: int, step: int, u: Tensor) -> None:
        if t in levels and step in steps:
            look(frame(prior, t, step, u, start[t]))

    def begins(k: int, u: Tensor) -> None:
        if k:
            start[k - 1] = u
            record(k - 1, 0, u)

    return prior.sample_u(
        num,
        generator=generator,
        num_steps=num_steps,
        callback=begins,
        on_step=lambda t, k, state, info: record(t, k + 1, state.u),
    )


def frame(prior: EBMPrior, t: int, step: int, u: Tensor, u_next: Tensor) -> Frame:
    """The numbers of the state u, (B, D), of the chain at t that began at `u_next`."""
    u = u.detach()
    with torch.no_grad():
        f = -prior.layer_energy(u, t).mean(0)
        square = [part.flatten(1).square().mean() for part in prior.layout.split(u)]
    point = u.clone().requires_grad_()
    with torch.enable_grad(), frozen(prior.energies):
        log_density = prior.log_density(t, u_next)(point).sum()
        (gradient,) = torch.autograd.grad(log_density, point)
    return Frame(t, step, u, f, torch.stack(square), gradient.norm(dim=1).mean())


def saturation(images: Tensor) -> float:
    """The share of pixels of images (B, C, H, W) in [0, 1] that are nearly black or white."""
    return float(((images < DARK) | (images > BRIGHT)).float().mean())


# --- the criterion


@dataclass(frozen=True)
class Row:
    """One recorded step of all chains together: what a report and a plot show of it."""

    t: int
    step: int
    f: tuple[float, ...]  # per layer, top first, as the next
    u_square: tuple[float, ...]
    gradient_norm: float
    saturation: float


def row(frame: Frame, images: Tensor) -> Row:
    """The numbers of a frame, and of the images decoded from it."""
    return Row(
        frame.t,
        frame.step,
        tuple(frame.f.tolist()),
        tuple(frame.u_square.tolist()),
        float(frame.gradient_norm),
        saturation(images),
    )


def pooled(parts: Sequence[tuple[int, Row]]) -> Row:
    """The row of several blocks of chains, (number of chains, their row) each."""
    total = sum(count for count, _ in parts)

    def mean(values: Sequence[float]) -> float:
        return sum(n * v for (n, _), v in zip(parts, values, strict=True)) / total

    rows = [row for _, row in parts]
    return Row(
        rows[0].t,
        rows[0].step,
        tuple(mean(values) for values in zip(*(row.f for row in rows), strict=True)),
        tuple(mean(values) for values in zip(*(row.u_square for row in rows), strict=True)),
        mean([row.gradient_norm for row in rows]),
        mean([row.saturation for row in rows]),
    )


def verdict(
    rows: Sequence[Row],
    distances: Mapping[str, float] | None = None,
    *,
    below_gaussian: bool = False,
) -> dict[str, dict[str, Any]]:
    """The criterion "no oversaturation", item by item, with the numbers behind each.

    Args:
        rows: of the long chains, in the order of the chain.
        distances: Fréchet distances after the `long` chains, after `short` ones of the trained
            length, and of the `gaussian` prior; without them that item stays open.
        below_gaussian: ask only that the long chains stay below the Gaussian prior, the rule for
            8x8 digits, where the prototype's ratio was 1.2 to 1.7.

    Returns:
        Per item: `passed` (None: open), `required`, and what was found.
    """
    squares = [value for row in rows for value in row.u_square]
    low, high = U_SQUARE
    return {
        "u_square": {
            "passed": all(low <= value <= high for value in squares),
            "required": f"|u|^2/d of every layer in [{low}, {high}] at every recorded step",
            "lowest": min(squares),
            "highest": max(squares),
        },
        "saturation": _saturation(rows),
        "frechet": _frechet(distances, below_gaussian),
    }


def passed(items: Mapping[str, Mapping[str, Any]]) -> bool | None:
    """Of all items: False if one failed, None if none did but one is open."""
    found = [item["passed"] for item in items.values()]
    return False if False in found else None if None in found else True


def _saturation(rows: Sequence[Row]) -> dict[str, Any]:
    changes, open_ = {}, False
    for t in sorted({row.t for row in rows}, reverse=True):
        # From the first recorded step on (30 of 300): the start is the level before.
        values = [row.saturation for row in rows if row.t == t and row.step]
        if len(values) > 1:
            changes[t] = values[-1] - values[0]
        else:
            open_ = True  # one step shows no change
    small = all(abs(change) < SATURATION_CHANGE for change in changes.values())
    return {
        "passed": None if small and open_ else small,
        "required": f"less than {SATURATION_CHANGE} of the pixels from the first recorded step of"
        " each t to its last, two at least",
        "change": {str(t): change for t, change in changes.items()},
    }


def _frechet(distances: Mapping[str, float] | None, below_gaussian: bool) -> dict[str, Any]:
    required = (
        "Fréchet distance after the long chains below the Gaussian prior's"
        if below_gaussian
        else f"Fréchet distance at most {FRECHET_RATIO} x that of the trained length"
    )
    if distances is None:
        return {"passed": None, "required": required}
    short, long, gaussian = (distances[name] for name in ("short", "long", "gaussian"))
    ratio = long / short if short else float("inf")
    good = long < gaussian if below_gaussian else ratio <= FRECHET_RATIO
    return {"passed": good, "required": required, "ratio": ratio, **distances}
