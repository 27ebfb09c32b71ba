"""Modes `reconstruct` and `encode`: images of one's own in, pairs or latents out."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvae import images, runtime
from nvae.evaluation import blocks, source
from nvae.evaluation.job import Job
from nvae.model import LayerRecord
from nvae.seeds import seeded


class Pass(NamedTuple):
    """What the model makes of a block of images, drawn from its posterior."""

    x: Tensor  # (B, C, H, W), on the device
    logits: Tensor
    layers: list[LayerRecord]


@torch.no_grad()
def through(job: Job, images_in: source.Source, block: blocks.Block) -> Pass:
    """Encode a block and walk down; the noise belongs to the block."""
    model, device = job.model, job.here.device
    x = block.of(images_in).to(device)
    layers: list[LayerRecord] = []
    generator = seeded(device, job.settings.seed, block.number)
    choose = model.posterior_choice(model.encode(x), generator=generator, record=layers)
    logits = model.walk(len(x), choose)
    assert logits is not None
    return Pass(x, logits, layers)


def reconstructions(job: Job, images_in: source.Source, block: blocks.Block) -> tuple[Tensor, ...]:
    """A block's images and their reconstructions, each (count, C, H, W) on the CPU."""
    made = through(job, images_in, block)
    generator = seeded(job.here.device, job.settings.seed, block.number, 1)  # of the pixels
    return made.x.cpu(), job.images(made.logits, generator)


def reconstruct(job: Job) -> None:
    """Write pairs: `reconstructions.png` for the eye, PNG files and npz for programs."""
    settings, found = job.settings, _source(job)
    total = min(settings.num_samples, len(found))
    digits = max(5, len(str(total - 1)))
    for block in blocks.mine(total, settings.block_size, job.here, "reconstructions"):
        x, again = reconstructions(job, found, block)
        if settings.format in ("npz", "both"):
            name = f"gpu_{job.here.rank}_reconstructions_{block.index}.npz"
            pairs = {"originals": x.numpy(), "reconstructions": again.numpy()}
            _save(job, name, block, pairs)
        if settings.format in ("png", "both"):
            for number, (original, image) in enumerate(zip(x, again, strict=True), block.first):
                stem = job.folder / "png" / f"{number:0{digits}}"
                images.save_png(f"{stem}_original.png", original)
                images.save_png(f"{stem}_reconstruction.png", image)
        if block.first == 0 and settings.grid:
            tiles = torch.stack([x, again], 1)[: settings.grid].flatten(0, 1)
            columns = 2 * math.ceil((len(tiles) / 4) ** 0.5)  # about square, pairs kept together
            caption = f"{found.name}\nin pairs: the image, its reconstruction"
            path = job.folder / "reconstructions.png"
            images.save_grid(path, tiles, columns, caption=caption)
    if job.here.is_main:
        print(f"{total} reconstructions of {found.name} in {job.folder}")


def encode(job: Job) -> None:
    r"""Write latents: `u` (N, D) and per layer `z_<i>` (N, C, H, W), the top layer first.

    .. math:: u_i = (z_i - \mu_i) / \sigma_i

    with z_i from the posterior after the flows, and the prior's moments at temperature 1; u holds
    the layers one after the other, each flattened C, H, W.
    """
    settings, found = job.settings, _source(job)
    total = min(settings.num_samples, len(found))
    for block in blocks.mine(total, settings.block_size, job.here, "latents"):
        layers = through(job, found, block).layers
        u = torch.cat([layer.prior.standardise(layer.z).flatten(1) for layer in layers], 1)
        arrays = {f"z_{i}": layer.z.cpu().numpy() for i, layer in enumerate(layers)}
        name = f"gpu_{job.here.rank}_latents_{block.index}.npz"
        _save(job, name, block, {"u": u.cpu().numpy(), **arrays})
    if job.here.is_main:
        print(f"latents of {total} images of {found.name} in {job.folder}")


def _save(job: Job, name: str, block: blocks.Block, arrays: dict[str, Any]) -> None:
    arrays["index"] = np.arange(block.first, block.first + block.count)
    with runtime.written_whole(job.folder / name) as temporary:
        np.savez(temporary, **arrays)


def _source(job: Job) -> source.Source:
    settings = job.settings
    return source.load(settings.data, job.model.config, train=settings.eval_on_train)
