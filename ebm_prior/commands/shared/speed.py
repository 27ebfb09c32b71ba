"""The flags of the fast path, and a prior put on it. No torch until a prior is given."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from ebm_prior.steps import PRECISIONS, Steps, precision_on

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
        help="of an NVAE's cells inside the chain; auto: bf16 on CUDA, else float32 (%(default)s)",
    )
    group.add_argument(
        "--recompute",
        action="store_true",
        help="keep a fifth to an eighth as much of an NVAE for the way back, for half as much work"
        " again",
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


NO_CHAIN = ("fitted", "ncp")  # kinds whose draws are no chain over all layers


def steps_of(
    asked: Asked | argparse.Namespace, device: torch.device, backbone: Any
) -> Steps | None:
    """What the flags ask for on a device and a VAE; None is the plain path.

    Raises:
        ValueError: bf16 or recomputation of a VAE that has no frozen walk, which only NVAE has.
    """
    if asked.plain:
        return None
    if not hasattr(backbone, "folded"):
        for flag, given in (
            ("precision bf16", asked.precision == "bf16"),
            ("recompute", asked.recompute),
        ):
            if given:
                raise ValueError(
                    f"--{flag} is of the frozen walk of an NVAE, this VAE has none (only its"
                    " energies have a fast path); leave it out"
                )
        return Steps()
    precision = precision_on(device.type, asked.precision)
    return Steps(recompute=asked.recompute, precision=precision)


def precision_of(steps: Steps | None) -> str:
    """What chains are computed in, part of what makes two runs the same."""
    return "float32" if steps is None else steps.precision


def check_kind(kind: str, asked: Asked | argparse.Namespace) -> None:
    """Refuse flags that a kind of prior has no use for.

    Raises:
        ValueError: which.
    """
    given = asked.plain or asked.recompute or asked.precision != "auto"
    if kind in NO_CHAIN and given:
        raise ValueError(
            f"--plain, --recompute and --precision are of chains, this prior is of kind {kind};"
            " leave them out"
        )


def on_path(prior: Same, steps: Steps | None) -> Same:
    """The prior on the fast path, or as it is."""
    from ebm_prior.frozen import fast

    return prior if steps is None or prior.config.kind in NO_CHAIN else fast(prior, steps)


def told(steps: Steps | None, backbone: Any, kind: str = "diffusion") -> str:
    """The path in a report."""
    if kind in NO_CHAIN:
        return "none: no chain over all layers"
    if steps is None:
        return "plain"
    what = "fast" if hasattr(backbone, "folded") else "fast energies"
    return f"{what}, {steps.precision}{', recomputed' if steps.recompute else ''}"
