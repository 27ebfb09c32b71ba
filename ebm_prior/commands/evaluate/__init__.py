"""Measure priors on one backbone: FID, KID, IS, with every control in one report (Tables 1, 2)."""

from __future__ import annotations

import argparse
import math

from ebm_prior.commands.shared import arguments
from ebm_prior.commands.shared.measure_arguments import add_measure, check_measure
from ebm_prior.commands.shared.sampler import add_sampler, check_sampler

HELP = "FID, KID and IS of priors, controls and reconstructions in one report"
USAGE = "%(prog)s --checkpoint FILE --prior FILE [FILE ...] --out FOLDER [options]"
LARGEST_FIT = 4096  # latent values up to which a full covariance is fitted unasked

EXAMPLES = """\
rows of the report: gaussian (the VAE's own prior), no_model_chain (the chain of a diffusion prior
with f = 0), fitted (a Gaussian with the covariance of the aggregate posterior), ebm, joint, ncp
(the priors given, by kind; ebm_2 is the second of its kind), reconstruction (a posterior draw of
training images, decoded). A prior that is not below the controls has shown nothing.

examples:
  the digits, each row three times:
    python -m ebm_prior evaluate --checkpoint ebm_prior/assets/digits-nvae.pt \\
        --prior runs/demo/prior.safetensors --seeds 0 1 2 --out runs/digits

  the paper's Table 1, on two GPUs; started again, it goes on where it stopped:
    torchrun --nproc_per_node 2 -m ebm_prior evaluate --checkpoint checkpoint.pt \\
        --prior diffusion.safetensors joint.safetensors ncp.safetensors --data data/cifar10 \\
        --inception pt_inception-2015-12-05.pth --num_samples 50000 --out runs/table1 \\
        --resume auto

OUT holds report.json, comparison.png (images of each row), rows.png (its distance) and rows/
(what is finished)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser, prior=False)
    parser.add_argument(
        "--prior",
        nargs="+",
        default=[],
        metavar="FILE",
        help="priors made for this checkpoint, of any kind; none: controls only",
    )
    arguments.add_data(parser)
    parser.add_argument(
        "--num_samples",
        type=int,
        metavar="N",
        help="images of each row (default: as many as there are training images, at most 50000)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="draw each row with each of these, and give mean and range (default: --seed)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the map from u to the image; the paper's numbers are at 1 (%(default)s)",
    )
    parser.add_argument(
        "--controls",
        action=argparse.BooleanOptionalAction,
        help="the rows no_model_chain and fitted (default: on; fitted for at most"
        f" {LARGEST_FIT} latent values)",
    )
    parser.add_argument(
        "--reconstruction",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="the row reconstruction (on)",
    )
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: keep the rows that OUT holds of the same settings (default: draw all anew)",
    )
    add_sampler(parser)
    add_measure(parser)
    arguments.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Measure all rows; write report and pictures."""
    arguments.check_inputs(args)
    check_measure(args)
    check_sampler(args)
    args.seeds = args.seeds or [args.seed]
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"--seeds {args.seeds}: expected different numbers from 0 on")
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        raise ValueError(f"--temperature {args.temperature}: expected a positive number")
    if args.num_samples is not None and args.num_samples < 2:
        raise ValueError(f"--num_samples {args.num_samples}: expected at least 2")
    if arguments.dry_run(args):
        return 0

    from ebm_prior.commands.evaluate import table
    from ebm_prior.commands.shared.session import opened

    with opened(args) as job:
        table.evaluate(job)
    return 0
