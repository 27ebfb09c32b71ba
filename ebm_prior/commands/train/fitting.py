"""`ebm_prior train --prior fitted`: a Gaussian fitted to the aggregate posterior, in seconds."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior import checkpoint
from ebm_prior.commands.train.flags import Run, prior_config
from ebm_prior.fitted import FittedPrior
from ebm_prior.seeds import seeded

if TYPE_CHECKING:
    from ebm_prior.backbones.files import Opened
    from ebm_prior.commands.train.job import Say
    from nvae.data import ImageSet
    from nvae.runtime import Runtime

LARGEST_FULL = 10_000  # coordinates: a covariance of 800 MB in double precision
MEMORY = 4 * 2**30  # bytes that the draws of u may take
BLOCK = 500


def fit(command: Run, backbone: Opened, images: ImageSet, here: Runtime, say: Say) -> int:
    """Draw posteriors, fit, write `prior.safetensors`, `args.json` and a grid."""
    from ebm_prior.commands.train import job

    dim, started = backbone.layout.dim, time.perf_counter()
    config = prior_config(command, backbone.layout.shapes)
    if config.rank == 0 and dim > LARGEST_FULL:
        raise ValueError(
            f"a full covariance of {dim} coordinates takes {8 * dim**2 / 2**30:.0f} GiB; give"
            " --rank 64, or another number of directions beside a diagonal"
        )
    if not here.is_main:
        return 0
    if (command.out / "prior.safetensors").exists():  # asked to go on: nothing is left to do
        say(f"{command.out / 'prior.safetensors'} is there already")
        return 0
    u = draws(command, backbone, images)
    prior = FittedPrior.fit(backbone, config, u)
    command.out.mkdir(parents=True, exist_ok=True)
    checkpoint.save(command.out / "prior.safetensors", prior, fingerprint=backbone.fingerprint())
    job.write_arguments(command)
    generator = seeded(here.device, command.options["seed"], len(u))
    pictures = prior.sample(command.options["grid_size"], generator=generator).cpu()
    rank = f"rank {config.rank} beside a diagonal" if config.rank else "full covariance"
    job.show(command.out / "grids" / "fitted.png", pictures, f"fitted Gaussian, {rank}")
    words = ["python", "-m", "ebm_prior", "sample", "--checkpoint", str(command.checkpoint)]
    words += ["--prior", str(command.out / "prior.safetensors"), "--out"]
    print(
        f"Fitted a Gaussian ({rank}) to {len(u)} posterior draws of {dim} coordinates in"
        f" {time.perf_counter() - started:.1f} s; deviation of u {float(u.std()):.3f}."
        f" {command.out} holds prior.safetensors, args.json and grids/. Next:\n"
        f"  {shlex.join([*words, str(command.out / 'samples')])}"
    )
    return 0


@torch.no_grad()
def draws(command: Run, backbone: Opened, images: ImageSet) -> Tensor:
    """Posterior draws u, (N, D): `draws` per training image, as many as memory holds."""
    seed, times = command.options["seed"], command.settings["draws"]
    if times < 1:
        raise ValueError(f"--draws {times}: expected at least 1")
    most = MEMORY // (4 * backbone.layout.dim)
    order = torch.randperm(len(images), generator=seeded("cpu", seed))
    index = order.repeat_interleave(times)[:most]  # `low_rank` takes halves of different images
    size = min(BLOCK, max(1, command.settings["batch_size"]))
    found = []
    for first in tqdm(range(0, len(index), size), "posterior", disable=None):
        x = torch.stack([images[int(i)] for i in index[first : first + size]])
        x = x.to(backbone.device)
        found.append(backbone.infer(x, seeded(backbone.device, seed, first, 0)))
    return torch.cat(found)
