"""Quality against network evaluations, for Langevin's chain and for OU-MALA."""

from __future__ import annotations

import argparse

from ebm_prior.commands.shared import arguments
from ebm_prior.commands.shared.measure_arguments import add_measure, check_measure

HELP = "compare the two samplers: quality against network evaluations"
USAGE = "%(prog)s --out FOLDER [--checkpoint FILE --prior FILE] [options]"

EXAMPLES = """\
on the test-bed, eight Gaussian modes with their exact energies, what is missing is missed by the
sampler alone; each sampler is told by the energy distance of its draws to exact ones, and by the
fewest evaluations at which the mean over seeds is at most 0.002. On a trained prior the distance
is the one of `evaluate`, and says something else: training fits the energies to short Langevin
chains, so better draws of their density need not be better images.

examples:
  the test-bed, about two minutes:
    python -m ebm_prior samplers --out runs/samplers

  and the digits:
    python -m ebm_prior samplers --checkpoint ebm_prior/assets/digits-nvae.pt \\
        --prior runs/demo/prior.safetensors --out runs/samplers

OUT holds report.json, samplers.png and, with a prior, rows/ (what is measured)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write to")
    parser.add_argument(
        "--num_steps",
        type=int,
        nargs="+",
        default=[1, 2, 3, 4, 5, 6, 8, 10, 16, 30],
        metavar="K",
        help="steps at every diffusion index (%(default)s)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3, 4],
        metavar="N",
        help="draw with each of these; means count (%(default)s)",
    )
    bed = parser.add_argument_group("the test-bed")
    bed.add_argument(
        "--b2",
        type=float,
        nargs="+",
        default=[0.1, 0.15, 0.2, 0.25],
        metavar="B2",
        help="Langevin's step sizes, plain rule (%(default)s)",
    )
    bed.add_argument(
        "--draws", type=int, default=3000, metavar="N", help="of each sampler (%(default)s)"
    )
    trained = parser.add_argument_group("a trained prior, if given")
    trained.add_argument("--checkpoint", metavar="FILE", help="the VAE")
    trained.add_argument(
        "--prior", metavar="FILE", help="its diffusion prior, trained with energy_scale none"
    )
    trained.add_argument(
        "--num_samples", type=int, default=1500, metavar="N", help="images (%(default)s)"
    )
    trained.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: keep the rows that OUT holds of the same settings (default: draw all anew)",
    )
    arguments.add_data(parser)
    add_measure(parser)
    arguments.add_running(parser, batch_size=500)


def run(args: argparse.Namespace) -> int:
    """Draw, measure, write report and picture."""
    for name, least in (("num_steps", 1), ("seeds", 0)):
        values = getattr(args, name)
        if min(values) < least or len(set(values)) < len(values):
            raise ValueError(f"--{name} {values}: expected different numbers from {least} on")
    if not all(0 < b2 < 4 for b2 in args.b2):
        raise ValueError(f"--b2 {args.b2}: expected positive numbers, below 4 to be stable")
    for name in ("draws", "num_samples"):
        if getattr(args, name) < 2:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 2")
    if (args.checkpoint is None) != (args.prior is None):
        raise ValueError("--checkpoint and --prior belong together; give both or none")
    arguments.check_inputs(args)
    check_measure(args)
    if arguments.dry_run(args):
        return 0

    from ebm_prior.commands.samplers import job

    job.compare(args)
    return 0
