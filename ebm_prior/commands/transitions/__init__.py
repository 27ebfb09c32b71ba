"""Show what Langevin chains pass through, and run them far longer than in training (Figs. 6, 7).

Short: the trained number of steps, decoded every few of them. Long: 300 steps per diffusion index;
the report says, with numbers, whether such chains oversaturate."""

from __future__ import annotations

import argparse

from ebm_prior.commands.shared import arguments, measure_arguments

HELP = "trace short and long Langevin chains, and judge the long ones"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
examples:
  short and long chains, pictures and numbers (digits: with a Fréchet distance):
    python -m ebm_prior transitions --checkpoint checkpoint.pt --prior prior.safetensors \\
        --out transitions

  long chains of CIFAR-10, 30 times the trained length, with FID:
    python -m ebm_prior transitions --checkpoint checkpoint.pt --prior prior.safetensors \\
        --mode long --long_steps 1500 --long_every 150 --data cifar10 --inception FILE \\
        --num_samples 10000 --out transitions

OUT gets short.png and long.png (a row per image, a column per recorded step), short_curves.png,
long_curves.png and report.json."""

MODES = ("short", "long", "both")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser)
    parser.add_argument("--mode", choices=MODES, default="both", help="(%(default)s)")
    parser.add_argument(
        "--num_samples",
        type=int,
        metavar="N",
        default=500,
        help="chains, over which the numbers are averages (%(default)s)",
    )
    parser.add_argument(
        "--shown", type=int, metavar="N", default=6, help="chains in the pictures (%(default)s)"
    )
    parser.add_argument(
        "--short_every",
        type=int,
        metavar="STEPS",
        help="between recorded states of short chains (5, or a quarter of fewer than 20 steps)",
    )
    parser.add_argument(
        "--long_steps",
        type=int,
        metavar="K",
        default=300,
        help="of long chains, per diffusion index (%(default)s)",
    )
    parser.add_argument(
        "--long_every",
        type=int,
        metavar="STEPS",
        default=30,
        help="between recorded states of long chains (%(default)s)",
    )
    arguments.add_data(parser)
    measure_arguments.add_measure(parser)
    arguments.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Trace, measure, write."""
    arguments.check_inputs(args)
    measure_arguments.check_measure(args)
    for name in ("shown", "short_every", "long_steps", "long_every"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if arguments.dry_run(args):
        return 0

    from ebm_prior import checkpoint
    from ebm_prior.commands.shared.session import opened
    from ebm_prior.commands.transitions.job import trace_all

    config = checkpoint.read(args.prior).config
    if config.kind not in ("diffusion", "joint") or config.sampler == "z":
        sampler = f" with the sampler {config.sampler}" if config.sampler else ""
        raise ValueError(
            f"a prior of kind {config.kind}{sampler} has no Langevin chain in u to trace; give a"
            " diffusion prior, or a joint one with the sampler u"
        )
    with opened(args) as job:
        trace_all(job)
    return 0
