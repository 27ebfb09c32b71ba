"""Cells of the ablation, the paper's numbers for them, and how time grows with their size."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

LINEAR = 0.2  # the deviation up to which seconds count as linear in T K


class Cell(NamedTuple):
    """A number of diffusion steps (the paper's T) and of Langevin steps in each (K)."""

    max_T: int
    num_steps: int

    @property
    def steps(self) -> int:
        """Langevin steps in all."""
        return self.max_T * self.num_steps

    def __str__(self) -> str:
        return f"{self.max_T}x{self.num_steps}"


#: Table 3: FID on CIFAR-10 and seconds (of a number of images and on a device it does not state).
PAPER = {
    Cell(3, 30): (9.98, 75.17),
    Cell(3, 50): (8.93, 94.23),
    Cell(3, 100): (8.13, 166.34),
    Cell(6, 50): (8.13, 193.45),
}


def chosen(
    cells: Sequence[str] | None, max_T: Sequence[int] | None, num_steps: Sequence[int] | None
) -> list[Cell]:
    """Cells by name, or a grid, or the paper's; without repetition, the small ones first.

    Raises:
        ValueError: cells and a grid, half a grid, or no cell by its form.
    """
    if cells and (max_T or num_steps):
        raise ValueError("--cells names cells, --max_T with --num_steps a grid; give one of them")
    if bool(max_T) != bool(num_steps):
        raise ValueError("--max_T and --num_steps are a grid together; give both")
    if max_T and num_steps:
        found = [Cell(*pair) for pair in itertools.product(max_T, num_steps)]
    else:
        found = [_parsed(text) for text in cells] if cells else list(PAPER)
    for cell in found:
        if min(cell) < 1:
            raise ValueError(f"cell {cell}: expected at least 1x1")
    return sorted(set(found), key=lambda cell: (cell.steps, cell))


def _parsed(text: str) -> Cell:
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdigit() for part in parts):
        raise ValueError(f"cell {text!r}: expected TxK, e.g. 3x50: 3 diffusion, 50 Langevin steps")
    return Cell(*map(int, parts))


def linearity(steps: Sequence[int], seconds: Sequence[float]) -> dict[str, Any]:
    r"""How well seconds are c T K, and a + b T K.

    Both fits minimise the squares of the relative deviations, :math:`fit / seconds - 1`, so that
    short cells count as much as long ones. a holds what every draw costs beside its chain.

    Args:
        steps: T K of each cell.
    """
    n, s = np.asarray(steps, float), np.asarray(seconds, float)
    result: dict[str, Any] = {}
    columns = {"through_the_origin": [n / s]}
    if len(set(steps)) > 1:
        columns["with_intercept"] = [n / s, 1 / s]
    for name, column in columns.items():
        matrix = np.stack(column, axis=1)
        found = np.linalg.lstsq(matrix, np.ones(len(s)), rcond=None)[0]
        off = matrix @ found - 1
        result[name] = {
            "seconds_per_step": float(found[0]),
            "intercept_seconds": float(found[1]) if len(found) > 1 else 0.0,
            "deviations": off.tolist(),
            "max_deviation": float(np.abs(off).max()),
        }
    result["within_20_percent"] = result["through_the_origin"]["max_deviation"] <= LINEAR
    return result
