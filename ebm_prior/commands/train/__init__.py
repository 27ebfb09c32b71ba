"""Train a prior on the latents of a frozen VAE, NVAE or HVAE; --prior diffusion by Algorithm 1."""

from __future__ import annotations

import argparse
import json

from ebm_prior.commands.train.flags import (
    EXAMPLES,
    add_arguments,
    check_paths,
    parsed,
    prior_config,
    train_settings,
)

__all__ = ["EXAMPLES", "HELP", "USAGE", "add_arguments", "run"]

HELP = "train a prior on a frozen VAE (NVAE or HVAE)"
USAGE = "%(prog)s --checkpoint FILE --preset NAME --data FOLDER --out FOLDER [options]"


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 128 + signal when stopped by one."""
    command = parsed(args)
    check_paths(command)
    # Settings out of range are told before anything is read; shapes and length come later.
    prior_config(command, ((1,),))
    train_settings(command, 1)
    if args.dry_run:
        print(json.dumps(command.to_json(), indent=2))
        return 0

    from ebm_prior.commands.train import job
    from nvae import runtime

    with runtime.started(command.device) as here, runtime.kept(command.out, here):
        return job.train(command, here)
