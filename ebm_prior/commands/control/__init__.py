"""Sample with labels: every class, chosen attributes at once, or one attribute after the other
(paper, Section 3.3, Figs. 4 and 5).

Whether the samples obey is judged by classifiers of pixels trained on the spot; the report also
holds their own accuracy, that of the prior's classifier of latents, and what samples without a
label would have got by chance."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from ebm_prior.commands.shared import arguments

HELP = "sample classes, or compose attributes layer by layer"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
the prior is one trained with labels:
  python -m ebm_prior train --preset digits --checkpoint digits.pt --out runs/classes \\
      --attribute class:0,1 --label_steps 3

examples:
  every class of every attribute, a row each:
    python -m ebm_prior control --checkpoint digits.pt --prior runs/classes/prior.safetensors \\
        --out runs/classes/control

  threes, with twice the weight on the label:
    python -m ebm_prior control --checkpoint digits.pt --prior runs/classes/prior.safetensors \\
        --set class=3 --guidance 2 --out threes

  Figure 4: one attribute after the other from top to bottom, what is above held fixed:
    python -m ebm_prior control --checkpoint celeba.pt --prior prior.safetensors --data celeba \\
        --labels labels --compose Male=1 Smiling=1 Blond_Hair=0 --out composed"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser)
    arguments.add_data(parser)
    parser.add_argument(
        "--labels",
        metavar="FOLDER",
        help="the one of the training: train.csv and validation.csv, a column per attribute",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--set",
        nargs="+",
        metavar="NAME=CLASS",
        help="sample with these attributes at once; by default every class of every attribute",
    )
    what.add_argument(
        "--compose",
        nargs="+",
        metavar="NAME=CLASS",
        help="ask for one attribute after the other, from the top layers down",
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        metavar="N",
        default=100,
        help="samples of each class, or of --set or --compose (%(default)s)",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        default=1.0,
        help="factor of log p(class | u): 0 ignores the label, above 1 stresses it (%(default)s)",
    )
    parser.add_argument(
        "--label_steps",
        type=int,
        metavar="N",
        help="labels act at diffusion indices below this (default: the prior's)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the map to the image (%(default)s)"
    )
    arguments.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Sample, judge, report, draw."""
    arguments.check_inputs(args)
    flag = "compose" if args.compose else "set"
    asked = arguments.assignments(flag, args.compose or args.set or [])
    if not math.isfinite(args.guidance):
        raise ValueError(f"--guidance {args.guidance}: expected a finite number")
    if not (math.isfinite(args.temperature) and args.temperature > 0):
        raise ValueError(f"--temperature {args.temperature}: expected a positive number")
    if args.labels is not None and not Path(args.labels).is_dir():
        raise ValueError(f"--labels {args.labels}: no such folder")
    if arguments.dry_run(args):
        return 0

    from ebm_prior.commands.control.job import control

    control(args, asked)
    return 0
