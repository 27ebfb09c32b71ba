"""The demo's priors: the preset for the digits, each afresh on one core."""

from __future__ import annotations

import shutil
from pathlib import Path

from ebm_prior.commands.shared.trainings import Training


class Job(Training):
    """One prior to train."""

    def __init__(self, checkpoint: Path, seed: int, out: Path, iterations: int) -> None:
        flags = {
            "preset": "digits",
            "checkpoint": checkpoint,
            "seed": seed,
            "iterations": iterations,
            "grid_every": 0,
            "device": "cpu",
        }
        super().__init__(out, flags, threads=1)
        self.checkpoint, self.seed = checkpoint, seed

    def start(self) -> None:
        """Begin afresh; what an earlier demo left in the folder goes."""
        shutil.rmtree(self.out, ignore_errors=True)
        super().start()
