"""What a run tells: a progress bar, `log.txt`, `metrics.jsonl`, TensorBoard scalars and pictures.

The first process tells, the others are silent. Tags and axes are upstream's (contract 6.4).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from nvae.runtime import written_whole

METRICS = "metrics.jsonl"


class Log:
    """Open at `step`: later lines of an earlier, interrupted run are dropped.

    Args:
        folder: the run; None makes everything silent.
    """

    def __init__(self, folder: Path | None, *, step: int, steps: int) -> None:
        self._metrics: Any = None
        self._text: Any = None
        self._board = self._bar = None
        self.tells = folder is not None
        if folder is None:
            return
        from tqdm import tqdm

        _keep_until(folder / METRICS, step)
        self._metrics = open(folder / METRICS, "a", encoding="utf-8")
        self._text = open(folder / "log.txt", "a", encoding="utf-8")
        self._board = _board(folder, step)
        self._bar = tqdm(total=steps, initial=step, desc="training", dynamic_ncols=True)

    def scalars(self, step: int, values: Mapping[str, float], *, at: int | None = None) -> None:
        """Values of a step; TensorBoard shows them at `at`, where that is given (epochs)."""
        if self._metrics is None:
            return
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step if at is None else at)

    def picture(self, at: int, name: str, image: Tensor) -> None:
        """An image (C, H, W) in [0, 1]."""
        if self._board is not None:
            self._board.add_image(name, image.clamp(0, 1).cpu().numpy(), at)

    def advance(self, **values: str) -> None:
        """One step on, with what stands at the end of the bar."""
        if self._bar is not None:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update()

    def say(self, line: str) -> None:
        """A line on stderr that does not break the bar, and in `log.txt`."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
            self._text.write(line + "\n")
            self._text.flush()

    def close(self) -> None:
        for opened in (self._bar, self._board, self._metrics, self._text):
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
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
