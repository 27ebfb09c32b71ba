"""Seconds of several paths, taken in turn in one process.

Taken in turn, a machine that slows down or that others use slows all paths alike. Both clocks are
kept: the process's own time, which others on a shared CPU do not lengthen, and the wall's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

CLOCKS = ("process", "wall")


class Times(NamedTuple):
    """Of one path, a number per round."""

    process: list[float]
    wall: list[float]

    def by(self, clock: str) -> list[float]:
        return self.process if clock == "process" else self.wall


def clock_of(device: torch.device, threads: int) -> str:
    """The clock to quote: threads add up in the process's, and a GPU's work is not in it."""
    return "process" if device.type == "cpu" and threads == 1 else "wall"


def interleaved(
    paths: Mapping[str, Callable[[], object]],
    repeats: int,
    device: torch.device,
    warm_up: int = 1,
    title: str = "timing",
) -> dict[str, Times]:
    """The seconds of every path, `repeats` times in turn, after `warm_up` rounds not counted."""
    found = {name: Times([], []) for name in paths}
    for number in tqdm(range(-warm_up, repeats), desc=title, unit="round", leave=False):
        for name, run in paths.items():
            process, wall = seconds(run, device)
            if number >= 0:
                found[name].process.append(process)
                found[name].wall.append(wall)
    return found


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Process and wall seconds of one call; a GPU has finished before and after."""
    _wait(device)
    wall, process = time.perf_counter(), time.process_time()
    run()
    _wait(device)
    return time.process_time() - process, time.perf_counter() - wall


def spread(values: Sequence[float]) -> list[float]:
    """[smallest, largest]."""
    return [min(values), max(values)]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
