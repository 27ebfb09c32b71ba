"""Quality and time with other numbers of diffusion and Langevin steps (Table 3)."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ebm_prior.commands.ablate.cells import PAPER, Cell, chosen
from ebm_prior.commands.shared import arguments
from ebm_prior.commands.shared.measure_arguments import add_measure, check_measure
from ebm_prior.presets import PRESETS

HELP = "the cost and the use of diffusion and Langevin steps (Table 3)"
USAGE = "%(prog)s --checkpoint FILE --preset NAME --out FOLDER [--cells TxK ...] [options]"

EXAMPLES = """\
examples:
  the digits, two cells at a time:
    python -m ebm_prior ablate --checkpoint ebm_prior/assets/digits-nvae.pt --preset digits \\
        --cells 3x4 3x8 3x16 1x8 6x8 --jobs 2 --out runs/ablation

  the paper's Table 3; started again, it goes on where it stopped:
    python -m ebm_prior ablate --checkpoint checkpoint.pt --preset cifar10 --data data/cifar10 \\
        --inception pt_inception-2015-12-05.pth --out runs/table3 --resume auto

  a diagnostic only: a trained prior, sampled with other numbers of Langevin steps:
    python -m ebm_prior ablate --checkpoint checkpoint.pt --prior prior.safetensors \\
        --sampling_only --num_steps 30 50 100 --out runs/steps

OUT holds report.json, quality.png, seconds.png, runs/ (a training run per cell and seed) and
rows/ (what is measured)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser, prior=False)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="settings of the training")
    arguments.add_data(parser)
    cells = parser.add_argument_group(f"cells (default: the paper's, {' '.join(map(str, PAPER))})")
    cells.add_argument(
        "--cells", nargs="+", metavar="TxK", help="diffusion steps x Langevin steps, e.g. 3x50"
    )
    cells.add_argument("--max_T", type=int, nargs="+", metavar="N", help="a grid of these ...")
    cells.add_argument("--num_steps", type=int, nargs="+", metavar="N", help="... and these")
    cells.add_argument(
        "--sampling_only",
        action="store_true",
        help="train nothing: sample --prior with other --num_steps than it was trained with",
    )
    cells.add_argument("--prior", metavar="FILE", help="for --sampling_only")
    training = parser.add_argument_group("training")
    training.add_argument("--iterations", type=int, metavar="N", help="(default: the preset's)")
    training.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[0],
        metavar="N",
        help="train and sample each cell with each of these (%(default)s)",
    )
    training.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="trained at once (%(default)s)"
    )
    training.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: go on if OUT holds an ablation (default: refuse to touch it)",
    )
    training.add_argument(
        "--train_flags",
        nargs=argparse.REMAINDER,
        default=[],
        metavar="...",
        help="everything after it goes to `ebm_prior train`, for example --train_flags --lr 1e-3",
    )
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--num_samples", type=int, default=1500, metavar="N", help="for quality (%(default)s)"
    )
    measuring.add_argument(
        "--time_images", type=int, default=500, metavar="N", help="for time (%(default)s)"
    )
    measuring.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="of each time; the median counts"
    )
    add_measure(parser)
    arguments.add_running(parser, batch_size=500)


def run(args: argparse.Namespace) -> int:
    """Train, measure, write the report and the figures."""
    arguments.check_inputs(args)
    check_measure(args)
    cells = _checked(args)
    if arguments.dry_run(args):
        return 0

    from ebm_prior.commands.ablate import table
    from ebm_prior.commands.shared.session import opened

    path, args.prior = args.prior, None  # opened by the ablation, beside the others
    with opened(args) as job:
        table.ablate(job, cells, path)
    return 0


def _checked(args: argparse.Namespace) -> list[Cell]:
    """The cells.

    Raises:
        ValueError: flags that do not go together, numbers out of range, an OUT to keep.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ablate starts its own processes; run it without torchrun")
    for name, least in (("iterations", 1), ("jobs", 1), ("time_images", 1), ("repeats", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}")
    if args.num_samples < 2:
        raise ValueError(f"--num_samples {args.num_samples}: expected at least 2")
    if len(set(args.seeds)) < len(args.seeds) or min(args.seeds) < 0:
        raise ValueError(f"--seeds {args.seeds}: expected different numbers from 0 on")
    if args.sampling_only:
        if args.prior is None or not args.num_steps or args.cells or args.max_T:
            raise ValueError(
                "--sampling_only goes with --prior FILE and --num_steps N ..., and no other cells:"
                " the number of diffusion steps is the prior's"
            )
        return []
    if args.prior is not None:
        raise ValueError("--prior belongs to --sampling_only: every cell trains its own prior")
    if args.preset is None:
        raise ValueError("give --preset, the settings of the training")
    runs = Path(args.out) / "runs"
    if args.resume == "never" and runs.is_dir() and any(runs.iterdir()):
        raise ValueError(
            f"--out {args.out} holds another ablation; go on with it by --resume auto, or give"
            " another --out"
        )
    return chosen(args.cells, args.max_T, args.num_steps)
