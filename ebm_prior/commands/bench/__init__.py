"""How fast a Langevin step is: the fast path against the plain one and against a step in the style
of the released code, timed in turn in one process on the same shapes."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from ebm_prior.commands.bench.shapes import SHAPES
from ebm_prior.commands.shared import arguments
from ebm_prior.presets import PRESETS
from ebm_prior.steps import NAMES, PRECISIONS, Steps

HELP = "time the fast chain against the plain one and the released code's style"
USAGE = "%(prog)s --out FOLDER [--shapes NAME ... | --checkpoint FILE] [options]"

_SHAPES = "\n".join(f"  {name:5} {shape.title}" for name, shape in SHAPES.items())
EXAMPLES = f"""\
shapes (random weights):
{_SHAPES}

examples:
  minutes on a CPU:
    python -m ebm_prior bench --shapes c --repeats 7 --out runs/bench

  the published shapes on a GPU, with the kernels that take the time:
    python -m ebm_prior bench --shapes a b --device cuda --trace --out runs/bench-gpu

  your own VAE and prior:
    python -m ebm_prior bench --checkpoint checkpoint.pt --prior prior.safetensors \\
        --out runs/bench

  the tables of an earlier run, as Markdown:
    python -m ebm_prior bench --table runs/bench/bench.json
    python -m ebm_prior bench --table docs/bench/cpu.json --into docs/performance.md

OUT holds bench.json, its tables as bench.md, bench.png, and with --trace trace_summary.json."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--out", metavar="FOLDER", help="the folder to write to")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=tuple(SHAPES),
        metavar="NAME",
        help=f"of {', '.join(SHAPES)}, see below (default: c on the CPU, a b c q on CUDA)",
    )
    parser.add_argument("--checkpoint", metavar="FILE", help="a VAE of your own, too")
    parser.add_argument("--prior", metavar="FILE", help="its prior")
    parser.add_argument(
        "--preset", choices=tuple(PRESETS), help="settings of an untrained prior in its place"
    )
    fast = parser.add_argument_group("fast path")
    fast.add_argument(
        "--precisions",
        nargs="+",
        choices=PRECISIONS,
        default=list(PRECISIONS),
        help="of its tower (default: both)",
    )
    fast.add_argument(
        "--recompute", action="store_true", help="time the variant that keeps the least memory"
    )
    fast.add_argument(
        "--without",
        nargs="+",
        choices=NAMES,
        default=[],
        metavar="STEP",
        help=f"switch off steps of it: {', '.join(NAMES)}",
    )
    timing = parser.add_argument_group("timing")
    timing.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="rounds (%(default)s); medians count"
    )
    timing.add_argument(
        "--num_steps",
        type=int,
        metavar="N",
        help="Langevin steps of each path in a round (default: 1 on the CPU, 10 on CUDA)",
    )
    timing.add_argument(
        "--threads", type=int, default=1, metavar="N", help="of the CPU (%(default)s)"
    )
    timing.add_argument(
        "--trace", action="store_true", help="also the kernels that take most of the time"
    )
    timing.add_argument(
        "--table", metavar="FILE", help="print the tables of this bench.json and stop"
    )
    timing.add_argument(
        "--into",
        metavar="FILE",
        help="put them into this Markdown file instead, at <!-- table: bench.json -->",
    )
    arguments.add_running(parser, None, "each shape's own", chains=False)


def run(args: argparse.Namespace) -> int:
    """Measure and write, or print the tables of what was measured."""
    from ebm_prior.commands.bench import table

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler would write between bars
    _check(args)
    if arguments.dry_run(args):
        return 0
    if args.table is None:
        from ebm_prior.commands.bench import job

        job.run(args)
    source = Path(args.table or Path(args.out) / "bench.json")
    text = table.markdown(table.read(source))
    if args.into is None:
        print(text, end="")
        if args.table is None:
            told = f"wrote {args.out}/bench.json, bench.md, bench.png"
            print(told, file=sys.stderr)
    else:
        table.into(Path(args.into), source, text)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work.

    Raises:
        ValueError: flags that do not go together, numbers out of range, files that are not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("bench times one process; run it without torchrun")
    if (args.out is None) == (args.table is None):
        raise ValueError("give one of --out, the folder to write to, and --table, a bench.json")
    if args.into is not None and args.table is None:
        raise ValueError("--into goes with --table FILE, whose tables it puts there")
    for name in ("repeats", "num_steps", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if args.checkpoint is None and (args.prior or args.preset):
        raise ValueError("--prior and --preset are for a VAE of your own; give it as --checkpoint")
    if args.checkpoint is not None and (args.prior is None) == (args.preset is None):
        raise ValueError("--checkpoint goes with either --prior FILE or --preset NAME")
    if "tower" in args.without and (args.recompute or "bf16" in args.precisions):
        raise ValueError(
            "--without tower leaves float32 alone: give --precisions float32, without --recompute"
        )
    arguments.check_inputs(args)


def chosen(args: argparse.Namespace, precision: str) -> Steps:
    """The fast path's steps at a precision."""
    off = {name: False for name in args.without}
    return Steps(recompute=args.recompute, precision=precision, **off)
