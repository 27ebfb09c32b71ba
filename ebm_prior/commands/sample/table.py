"""Samples on their way to the disk: rows of one big array, and which blocks of them are done."""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ebm_prior import parallel
from nvae import runtime


class Table:
    """`samples.npz`, written in place by all processes: it need not fit into memory.

    Args:
        shape: of the finished array.
        keep: go on with the rows that are there.
    """

    def __init__(
        self, out: Path, shape: tuple[int, ...], here: runtime.Runtime, *, keep: bool = False
    ) -> None:
        self.out, self.raw = out, out / ".samples.npy"
        # The rows, and their copy in the npz.
        needed, free = (1 if keep else 2) * 4 * math.prod(shape), shutil.disk_usage(out).free
        if free < needed:
            raise ValueError(
                f"--out {out}: samples.npz needs {needed / 2**20:.0f} MiB of disk,"
                f" {free / 2**20:.0f} MiB are free; make room or give --format png"
            )
        if here.is_main and not keep:
            np.lib.format.open_memmap(self.raw, "w+", np.float32, shape).flush()
        parallel.wait()
        self.rows = np.lib.format.open_memmap(self.raw, "r+")

    def write(self, first: int, batch: Tensor) -> None:
        """The rows from `first` on; on the disk when this returns."""
        self.rows[first : first + len(batch)] = batch.numpy()
        self.rows.flush()

    def pack(self) -> None:
        """Turn the finished rows into the npz that numpy reads."""
        with runtime.written_whole(self.out / "samples.npz") as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                archive.write(self.raw, "samples.npy")
        self.raw.unlink()


class Blocks:
    """Which blocks are finished: a byte each in a file, and the settings that they belong to.

    Args:
        identity: what the images depend on, plain JSON.
        resume: go on with the blocks of a killed run, if there are any.

    Attributes:
        done: (count,), 1 where a block is finished, by whichever process.
        before: what was done when this run began, the same for all processes.

    Raises:
        ValueError: those blocks were drawn with other settings.
    """

    def __init__(
        self,
        out: Path,
        count: int,
        identity: dict[str, Any],
        here: runtime.Runtime,
        resume: bool,
    ) -> None:
        self.settings, self.bytes = out / ".sampling.json", out / ".sampling.npy"
        self.going_on = resume and self.settings.is_file()
        if self.going_on:
            self.check(identity)
        parallel.wait()  # all have looked before one writes
        if here.is_main and not self.going_on:
            self.forget()
            np.lib.format.open_memmap(self.bytes, "w+", np.uint8, (count,)).flush()
        parallel.wait()
        self.done = np.lib.format.open_memmap(self.bytes, "r+")
        self.before = self.done.copy()
        parallel.wait()  # all have the same in hand before one finishes a block
        self.begin = None if self.going_on or not here.is_main else identity

    def check(self, identity: dict[str, Any]) -> None:
        """Refuse to go on with the blocks of another run."""
        before = json.loads(self.settings.read_text(encoding="utf-8"))
        if changed := sorted(name for name in identity if before.get(name) != identity[name]):
            told = ", ".join(f"{n} {before.get(n)} (now {identity[n]})" for n in changed)
            raise ValueError(
                f"{self.settings.parent} holds part of a run with {told}; give the same settings,"
                " or begin anew without --resume"
            )

    def finish(self, block: int) -> None:
        """Its images are written."""
        if self.begin is not None:
            with runtime.written_whole(self.settings) as temporary:
                temporary.write_text(json.dumps(self.begin), encoding="utf-8")
            self.begin = None
        self.done[block] = 1
        self.done.flush()

    def forget(self) -> None:
        """Everything is finished, or of no use."""
        self.settings.unlink(missing_ok=True)
        self.bytes.unlink(missing_ok=True)
