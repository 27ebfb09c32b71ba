"""The optimisations of the fast chain by name; each can be switched off. No torch here."""

from __future__ import annotations

from dataclasses import dataclass, fields

PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class Steps:
    """What `ebm_prior.frozen.fast` does to a prior's chain. All but bf16 are exact to rounding.

    Attributes:
        tower: the top-down walk on frozen stages with a backward pass of their own, which keep
            only what it needs; the next three are of these stages.
        fold: BatchNorm in the neighbouring convolutions where no activation lies between.
        commute: what acts pixel by pixel before an up-sampling instead of behind it.
        recompute: keep each cell's input alone and run its forward pass twice: a fifth to an
            eighth as much is kept, for half as much work again (large NVAEs).
        once: spectral norm and what the energies make of t, evaluated once per chain.
        group: energies of equal shape as one network.
        merge: layers of an energy that get the same input as one.
        graph: on CUDA, the step captured once and replayed.
        precision: `float32`, or `bf16` in the tower's cells; u, z, moments and energies stay
            float32. The gradient is then off by a few tenths of a percent.
    """

    tower: bool = True
    fold: bool = True
    commute: bool = True
    recompute: bool = False
    once: bool = True
    group: bool = True
    merge: bool = True
    graph: bool = True
    precision: str = "float32"

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"precision is {self.precision!r}, expected one of {', '.join(PRECISIONS)}"
            )
        if not self.tower and (self.recompute or self.precision != "float32"):
            raise ValueError("recompute and bf16 are steps of the tower: leave `tower` on")


def precision_on(device: str, asked: str = "auto") -> str:
    """`auto` is bf16 on a device of type `cuda`, else float32."""
    if asked != "auto":
        return asked
    return "bf16" if device == "cuda" else "float32"


#: Those that are on by default, the ones that can be switched off.
NAMES = tuple(field.name for field in fields(Steps) if field.default is True)
