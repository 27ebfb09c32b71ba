"""`python -m nvae.evaluate`: images from an NVAE checkpoint, and how good they and it are.

With the checkpoint's own prior or with an EBM prior. Everything is in float32 (upstream samples
under float16 autocast, one cause of its NaN images).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nvae import flags, runtime
from nvae.evaluation.job import provenance, write_json
from nvae.flags import Settings

if TYPE_CHECKING:
    from nvae.evaluation.job import Job


#: Mode -> module, function, and whether its processes bring their results together. The others
#: exchange nothing, so they join no group.
MODES = {
    "sample": ("sampling", "run", False),
    "evaluate": ("likelihood", "run", True),
    "evaluate_fid": ("fid", "run", True),
    "reconstruct": ("posterior", "reconstruct", False),
    "encode": ("posterior", "encode", False),
}


def _prepared_folder(settings: Settings) -> Path:
    """The output folder, made and tried before any long work."""
    folder = Path(settings.save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "args.json", {**dataclasses.asdict(settings), **provenance()})
    except OSError as error:
        raise ValueError(f"--save {folder} cannot be written to: {error}") from None
    return folder


def _job(settings: Settings, here: runtime.Runtime) -> Job:
    """The model as it is to be used: loaded, prior attached, batch norm re-estimated if asked."""
    from nvae import checkpoint
    from nvae.digest import sha256
    from nvae.evaluation.job import Job

    folder = _prepared_folder(settings) if here.is_main else Path(settings.save)
    read = checkpoint.read(settings.checkpoint)
    model = checkpoint.build(read).to(here.device)
    protocol: dict[str, object] = {
        "checkpoint": settings.checkpoint,
        "checkpoint_sha256": sha256(settings.checkpoint),
        "prior": "Gaussian prior",
        "batch_norm": "stored",
        "seed": settings.seed,
        "device": str(here.device),
        "processes": here.world_size,
        **provenance(),
    }
    if settings.ebm_prior:
        attached = importlib.import_module("ebm_prior.attach").attach(
            model,
            settings.ebm_prior,
            precision=settings.ebm_precision,
            recompute=settings.ebm_recompute,
        )
        steps = attached.backbone.steps
        protocol["chains"] = f"{steps.precision}{', recomputed' if steps.recompute else ''}"
        protocol["prior"] = f"EBM prior {Path(settings.ebm_prior).name}"
        protocol["prior_sha256"] = sha256(settings.ebm_prior)
        protocol["batch_norm"] = "the prior's, if it has any, else stored"
    if settings.readjust_bn and settings.eval_mode != "evaluate":
        if settings.ebm_prior and here.is_main:
            print(
                "note: --readjust_bn replaces the batch-norm statistics that the prior was trained"
                " with; they belong to it, so its samples may get worse",
                file=sys.stderr,
            )
        from nvae.evaluation import bn_cache

        bn_cache.readjust(
            model,
            Path(settings.bn_cache or settings.save),
            checkpoint_sha256=str(protocol["checkpoint_sha256"]),
            temperature=settings.temp,
            seed=settings.seed,
            iterations=settings.readjust_iterations,
            batch_size=settings.readjust_batch,
            is_main=here.is_main,
        )
        protocol["batch_norm"] = (
            f"re-estimated at temperature {settings.temp:g} from {settings.readjust_iterations}"
            f" batches of {settings.readjust_batch}"
        )
    return Job(settings, here, folder, model, read.args, protocol)


def evaluate(settings: Settings) -> None:
    """Run one mode."""
    module, function, meet = MODES[settings.eval_mode]
    # Before the processes meet: in a group, batch norm would pool its statistics over them, and
    # the images would depend on how many there are.
    job = _job(settings, runtime.this_process(settings.device))
    with runtime.started(settings.device) if meet else contextlib.nullcontext():
        getattr(importlib.import_module(f"nvae.evaluation.{module}"), function)(job)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = flags.settings(argv)
    if settings.dry_run:
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        return 0
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.world_size > 1 and "WORLD_SIZE" not in os.environ:
        # Upstream's flag starts the processes itself; torchrun does it for us.
        arguments = list(sys.argv[1:] if argv is None else argv)
        processes = ["--standalone", f"--nproc_per_node={settings.world_size}"]
        command = ["-m", "torch.distributed.run", *processes, "-m", "nvae.evaluate", *arguments]
        return subprocess.run([sys.executable, *command]).returncode
    if settings.world_size not in (1, started):
        raise ValueError(
            f"--world_size {settings.world_size}, but torchrun started {started} processes;"
            " leave the flag out"
        )
    evaluate(settings)
    return 0


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
