"""The flags of the fast path, and a prior put on it. No torch until a prior is given."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Protocol, TypeVar

from ebm_prior.steps import PRECISIONS, Steps

if TYPE_CHECKING:
    import torch

    from ebm_prior.base import Prior

Same = TypeVar("Same", bound="Prior")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`--precision`, `--recompute` and `--plain`."""
    group = parser.add_argument_group("speed and memory of the chains")
    group.add_argument(
        "--precision",
        choices=("auto", *PRECISIONS),
        default="auto",
        help="of the VAE's cells inside the chain; auto: bf16 on CUDA, else float32 (%(default)s)",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        help="a fifth to an eighth of the memory, for half as much work again",
    )
    group.add_argument(
        "--plain", action="store_true", help="the plain, slow chain that the fast one is held to"
    )


def check(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other.

    Raises:
        ValueError: which.
    """
    if args.plain and (args.recompute or args.precision == "bf16"):
        raise ValueError("--plain goes without --recompute and --precision bf16: leave one out")


class Asked(Protocol):
    """The flags, as a namespace or a resolved command line has them."""

    @property
    def precision(self) -> str: ...

    @property
    def recompute(self) -> bool: ...

    @property
    def plain(self) -> bool: ...


def steps_of(asked: Asked | argparse.Namespace, device: torch.device) -> Steps | None:
    """What the flags ask for on a device; None is the plain path."""
    if asked.plain:
        return None
    precision = asked.precision
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "float32"
    return Steps(recompute=asked.recompute, precision=precision)


def precision_of(asked: Asked | argparse.Namespace, device: torch.device) -> str:
    """What chains are computed in, part of what makes two runs the same."""
    steps = steps_of(asked, device)
    return "float32" if steps is None else steps.precision


def on_path(prior: Same, steps: Steps | None) -> Same:
    """The prior on the fast path, or as it is."""
    from ebm_prior.frozen import fast

    return prior if steps is None else fast(prior, steps)


def told(steps: Steps | None) -> str:
    """The path in a report."""
    if steps is None:
        return "plain"
    return f"fast, {steps.precision}{', recomputed' if steps.recompute else ''}"
