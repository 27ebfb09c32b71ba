"""Train the small hierarchical VAE (HVAE) on images: the paper's second backbone (Figure 8)."""

from __future__ import annotations

import argparse
import json

from ebm_prior.commands.train_hvae.flags import (
    EXAMPLES,
    add_arguments,
    check_paths,
    parsed,
    train_settings,
)

__all__ = ["EXAMPLES", "HELP", "USAGE", "add_arguments", "run"]

HELP = "train a small hierarchical VAE, a backbone that needs no NVAE checkpoint"
USAGE = "%(prog)s --dataset NAME --data FOLDER --size NAME --out FOLDER [options]"


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done or out of time, 128 + signal when stopped by one."""
    command = parsed(args)
    check_paths(command)
    train_settings(command, 1, "off")  # settings out of range are told before anything is read
    if args.dry_run:
        print(json.dumps(command.to_json(), indent=2))
        return 0

    from ebm_prior.commands.train_hvae import job
    from nvae import runtime

    with runtime.started(command.device) as here, runtime.kept(command.out, here):
        return job.train(command, here)
