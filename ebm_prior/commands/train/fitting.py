"""`ebm_prior train --prior fitted`: a Gaussian fitted to the aggregate posterior, in seconds."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior import checkpoint
from ebm_prior.commands.shared.subset import Subset, draws_of, posterior
from ebm_prior.commands.train.flags import Run, prior_config
from ebm_prior.fitted import FittedPrior
from ebm_prior.seeds import seeded
from ebm_prior.training import run_state

if TYPE_CHECKING:
    from ebm_prior.backbones.files import Opened
    from ebm_prior.commands.train.job import Say
    from ebm_prior.config import PriorConfig
    from nvae.data import ImageSet
    from nvae.runtime import Runtime

LARGEST_FULL = 10_000  # coordinates: a covariance of 800 MB in double precision
BLOCK = 500


def fit(command: Run, backbone: Opened, images: ImageSet, here: Runtime, say: Say) -> int:
    """Draw posteriors, fit, write `prior.safetensors`, a grid and the reports.

    Raises:
        ValueError: a covariance that is too large, or OUT holds a prior of other settings.
    """
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
    facts = _facts(
        config,
        backbone.fingerprint(),
        dataset=command.dataset or backbone.config.dataset,
        draws=command.settings["draws"],
        seed=command.options["seed"],
    )
    if _there(command.out, facts):  # asked to go on: nothing is left to do
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
    seconds, deviation = round(time.perf_counter() - started, 1), float(u.std())
    content = {"posterior_draws": len(u), "u_std": deviation, "seconds": seconds, "facts": facts}
    job.report(command, content)  # last: where it is, all of it is
    print(
        f"Fitted a Gaussian ({rank}) to {len(u)} posterior draws of {dim} coordinates in"
        f" {seconds} s; deviation of u {deviation:.3f}. {command.out} holds prior.safetensors,"
        f" report.json, args.json and grids/. Next:\n"
        f"  {shlex.join([*words, str(command.out / 'samples')])}"
    )
    return 0


def _facts(config: PriorConfig, fingerprint: str, **more: Any) -> dict[str, Any]:
    """What a fit must share with the one that is there, as plain JSON."""
    known = {k: v for k, v in config.to_dict().items() if k != "preset"}
    return json.loads(json.dumps({**known, "backbone": fingerprint, **more}))


def _there(out: Path, facts: dict[str, Any]) -> bool:
    """Whether OUT holds this very fit, whole; what was stopped before its report is made anew.

    Raises:
        ValueError: it holds another one.
    """
    prior, report = out / "prior.safetensors", out / "report.json"
    if not prior.exists():
        return False
    file = checkpoint.read(prior)
    before = _facts(file.config, file.fingerprint)
    if report.exists():
        before |= json.loads(report.read_text(encoding="utf-8")).get("facts", {})
    run_state.check_facts(prior, before, {k: v for k, v in facts.items() if k in before})
    return report.exists()


@torch.no_grad()
def draws(command: Run, backbone: Opened, images: ImageSet) -> Tensor:
    """Posterior draws u, (N, D): `draws` per training image, as many as memory holds."""
    seed, times = command.options["seed"], command.settings["draws"]
    if times < 1:
        raise ValueError(f"--draws {times}: expected at least 1")
    order = torch.randperm(len(images), generator=seeded("cpu", seed))
    index = order[draws_of(len(images), times, backbone.layout.dim)]
    size = min(BLOCK, max(1, command.settings["batch_size"]))
    found, chosen = [], Subset(images, torch.arange(len(images)))
    for first in tqdm(range(0, len(index), size), "posterior", disable=None):
        generator = seeded(backbone.device, seed, first, 0)
        found.append(posterior(backbone, chosen, index[first : first + size], generator))
    return torch.cat(found)
