"""Mode `sample`: images as npz, PNG files and a labelled grid."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from nvae import images, runtime
from nvae.evaluation import blocks
from nvae.evaluation.job import Job


def run(job: Job) -> None:
    """Write `num_samples` images, in blocks that are dealt out to the processes."""
    settings, here = job.settings, job.here
    for block in blocks.mine(settings.num_samples, settings.block_size, here, "samples"):
        _write(job, block, job.draw(block))
    if here.is_main:
        print(f"{settings.num_samples} images in {job.folder}")


def _write(job: Job, block: blocks.Block, batch: Tensor) -> None:
    settings = job.settings
    if settings.format in ("npz", "both"):
        # Upstream's name has the local rank; with several machines only the rank is unique.
        name = f"gpu_{job.here.rank}_samples_{block.index}.npz"
        with runtime.written_whole(job.folder / name) as temporary:
            np.savez(temporary, samples=batch.numpy())
    if settings.format in ("png", "both"):
        digits = max(5, len(str(settings.num_samples - 1)))
        for number, image in enumerate(batch, start=block.first):
            images.save_png(job.folder / "png" / f"{number:0{digits}}.png", image)
    if block.first == 0 and settings.grid:
        prior = job.protocol["prior"]
        caption = f"{job.model.config.dataset}, {prior}\n"
        caption += f"temperature {settings.temp:g}, seed {settings.seed}"
        images.save_grid(job.folder / "grid.png", batch[: settings.grid], caption=caption)
