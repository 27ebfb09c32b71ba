r"""Sampling with labels, and composing attributes layer by layer (paper, Section 3.3, Figs. 4, 5).

A prior with attributes is steered at its last diffusion steps: there the labelled F[y] stands in
the place of its log-sum-exp (contract, conditional.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ebm_prior.base import Prior, in_mode, plain_numbers
from ebm_prior.prior import EBMPrior
from ebm_prior.schedule import Schedule

WIDE = 2 / 3  # noise that leaves the class open: N = 3 has .69 at state 1


def label_steps_for(schedule: Schedule) -> int:
    r"""How many of the last diffusion steps should see the label, at least.

    The fewest n for which u_n, where the label begins to act, is noisy enough for the class to be
    still open: \bar\sigma_n >= 2/3; 1 for N = 1 to 3, 2 for 4 and 5, 3 for 6 and 7. With fewer,
    u_n has chosen by itself: a label at t = 0 alone gives an exact oracle with N = 6 an agreement
    of .76, two steps .993 and three .998 (tests/ebm_prior/test_coupling.py has the toy). That is
    for chains that mix: short ones gain from more. The digits' (N = 3, K = 8) reach .66, .85 and
    .86 with 1, 2 and 3.
    """
    return next(n for n in range(1, schedule.max_T + 1) if schedule.sigma_bar[n] >= WIDE)


def steerable(prior: Prior | None) -> EBMPrior:
    """The prior, if it knows labels.

    Raises:
        ValueError: it does not; the message says how to train one that does.
    """
    if not isinstance(prior, EBMPrior) or not prior.config.attributes:
        raise ValueError(
            "this prior was trained without labels, so it cannot be steered; train one with"
            " `ebm_prior train --attribute NAME:LAYERS`, for example --attribute class:0,1"
        )
    return prior


def attribute_number(prior: EBMPrior, name: str) -> int:
    """The column of an attribute in the labels.

    Raises:
        ValueError: the prior has no attributes, or none of that name.
    """
    names = [attribute.name for attribute in steerable(prior).config.attributes]
    if name not in names:
        raise ValueError(f"attribute {name!r}: this prior knows {', '.join(names)}")
    return names.index(name)


def sample_classes(
    prior: EBMPrior,
    labels: Tensor,
    *,
    generator: torch.Generator,
    guidance: float = 1.0,
    label_steps: int | None = None,
) -> Tensor:
    """u_0, (B, D), one per row of `labels`, (B, attributes), -1 where anything will do."""
    return prior.sample_u(
        len(labels),
        generator=generator,
        labels=labels,
        guidance=guidance,
        label_steps=label_steps,
    )


class Stage(NamedTuple):
    """One stage of a composition."""

    u: Tensor  # u_0, (B, D)
    labels: Tensor  # (B, attributes), what was asked so far, -1 elsewhere
    held: Tensor  # (D,) bool, what the stage before had fixed


def compose(
    prior: EBMPrior,
    num: int,
    stages: Sequence[tuple[str, int]],
    *,
    generator: torch.Generator,
    guidance: float = 1.0,
    label_steps: int | None = None,
) -> list[Stage]:
    """Ask for one attribute after the other, top to bottom, keeping what is above (Fig. 4).

    The chain runs once, down to the state where labels begin to act (u_1 with label_steps = 1).
    From there the first stage runs to u_0 with all layers free. Each further one holds all layers
    down to the last attribute's at that stage's values, state by state, and restarts the others
    from the same state with the same noise: what differs comes from the labels alone.

    Args:
        num: B, samples.
        stages: (attribute, class), each attribute's layers below those of the one before.
        label_steps: labels act at t below this, if not the configured number.

    Raises:
        ValueError: unknown attributes or classes, or layers not in order.
    """
    asked = in_order(prior, stages)
    layout, device = prior.layout, prior.device
    first = prior.label_steps(label_steps)
    labels = torch.full((num, len(prior.config.attributes)), -1, device=device)
    held = torch.zeros(layout.dim, dtype=torch.bool, device=device)
    found: list[Stage] = []
    with in_mode(prior.energies, training=False), plain_numbers(device.type):
        start = prior.sample_u(num, generator=generator, stop=first)
        replay = generator.get_state()
        path = dict.fromkeys(range(first), start)  # t -> u_t of the stage before
        for number, value in asked:
            generator.set_state(replay)
            labels = labels.clone()
            labels[:, number] = value
            now = {first: start}
            for t in reversed(range(first)):
                now[t] = prior.reverse(
                    t,
                    now[t + 1],
                    init=torch.where(held, path[t], now[t + 1]),
                    mask=held,
                    generator=generator,
                    labels=labels,
                    guidance=guidance,
                )
            prior.check_finite(0, now[0])
            found.append(Stage(now[0], labels, held))
            path = now
            held = layout.mask(range(max(prior.config.attributes[number].layers) + 1), device)
    return found


def in_order(prior: EBMPrior, stages: Sequence[tuple[str, int]]) -> list[tuple[int, int]]:
    """The stages of a composition as (column of the labels, class).

    Raises:
        ValueError: unknown attributes or classes, or layers not in order.
    """
    asked, above = [], ""
    fixed = -1  # the lowest layer that the stages so far fix
    for name, value in stages:
        number = attribute_number(prior, name)
        attribute = prior.config.attributes[number]
        attribute.check_class(value)
        if min(attribute.layers) <= fixed:
            layers = ", ".join(map(str, attribute.layers))
            raise ValueError(
                f"attribute {name!r} is coupled to layers {layers}, but {above!r} before it fixes"
                f" layers 0 to {fixed}: compose attributes from top to bottom, each once"
            )
        asked.append((number, value))
        fixed, above = max(attribute.layers), name
    if not asked:
        raise ValueError("nothing to compose: name at least one attribute and its class")
    return asked


# --- measures -----------------------------------------------------------------------------------


def confusion(asked: Tensor, found: Tensor, classes: int) -> Tensor:
    """(classes, classes) counts, rows what was asked for, columns what a classifier saw."""
    flat = asked.cpu() * classes + found.cpu()
    return torch.bincount(flat, minlength=classes**2).reshape(classes, classes)


def agreement(counts: Tensor) -> float:
    """The share on the diagonal of a confusion matrix."""
    return round(int(counts.diagonal().sum()) / int(counts.sum()), 4)


def survival(before: Tensor, after: Tensor, value: int) -> float | None:
    """Of the samples seen as `value` when it was asked for, (B,), the share still seen so.

    None where there were none.
    """
    had = before == value
    return round(float((after[had] == value).double().mean()), 4) if had.any() else None
