"""What a training run tells: a progress bar, `metrics.jsonl`, TensorBoard scalars and pictures.

The first process tells, the others are silent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ebm_prior.files import written_whole

METRICS = "metrics.jsonl"


class RunLog:
    """Open at `step`: later lines of an earlier, interrupted run are dropped.

    Args:
        folder: the run; None makes everything silent.
        bar: show a progress bar.
    """

    def __init__(self, folder: Path | None, *, step: int, steps: int, bar: bool = True) -> None:
        self._metrics: Any = None
        self._board = self._bar = None
        if folder is None:
            return
        _keep_until(folder / METRICS, step)
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")
        self._board = _board(folder, step)
        self._bar = _bar(step, steps) if bar else None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture: np.ndarray | None) -> None:
        """An image (H, W, 3) of bytes."""
        if self._board is not None and picture is not None:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def advance(self, values: Mapping[str, str]) -> None:
        """One step on, with what stands at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()

    def say(self, text: str) -> None:
        """A line on stderr that does not break the bar."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self._metrics is not None:
            print(text, file=sys.stderr)

    def close(self) -> None:
        for opened in (self._bar, self._board, self._metrics):
            if opened is not None:
                opened.close()


def _keep_until(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that is not whole."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    with written_whole(path) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _board(folder: Path, step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        print(
            f"tensorboardX is missing (pip install tensorboardX): numbers go to {METRICS} alone",
            file=sys.stderr,
        )
        return None
    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)


def _bar(step: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    often = 0.1 if sys.stderr.isatty() else 30  # seconds: a file keeps every state of the bar
    return tqdm(
        total=steps,
        initial=step,
        desc="training",
        unit="it",
        dynamic_ncols=True,
        mininterval=often,
        miniters=1,
    )
