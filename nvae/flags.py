"""The command line of `python -m nvae.evaluate`: upstream's flags, and ours in a second group.

Names, types, defaults and meanings of the first group are those of NVAE's `evaluate.py`. Does not
import torch, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

MODES = ("sample", "evaluate", "evaluate_fid")

DESCRIPTION = "Draw images from an NVAE checkpoint, with its Gaussian prior or with an EBM prior."

EXAMPLES = """\
examples:
  64 images from a checkpoint, as npz, PNG files and a labelled grid in OUT:
    python -m nvae.evaluate --checkpoint checkpoint.pt --save OUT --num_samples 64

  the same with an energy-based prior trained for this checkpoint:
    python -m nvae.evaluate --checkpoint checkpoint.pt --save OUT --num_samples 64 \\
        --ebm_prior prior.safetensors --temp 1.0

  50000 images at low temperature with re-estimated batch norm, on two GPUs:
    torchrun --nproc_per_node 2 -m nvae.evaluate --checkpoint checkpoint.pt --save OUT \\
        --temp 0.6 --readjust_bn --format npz
"""


@dataclass(frozen=True)
class Settings:
    """The command line, one field per flag."""

    checkpoint: str
    save: str
    eval_mode: str
    eval_on_train: bool
    data: str
    readjust_bn: bool
    temp: float
    num_iw_samples: int
    fid_dir: str
    batch_size: int
    local_rank: int
    world_size: int
    seed: int
    master_address: str
    device: str
    num_samples: int
    block_size: int
    format: str
    grid: int
    ebm_prior: str | None
    readjust_iterations: int
    dry_run: bool

    def __post_init__(self) -> None:
        for name, least in (
            ("num_samples", 1),
            ("block_size", 1),
            ("readjust_iterations", 1),
            ("world_size", 1),
            ("batch_size", 0),
            ("grid", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if not (math.isfinite(self.temp) and self.temp > 0):
            raise ValueError(
                f"--temp {self.temp}: expected a positive number (1 is the trained prior)"
            )
        if self.eval_mode != "sample":
            raise ValueError(
                f"--eval_mode {self.eval_mode} is not part of this version; use --eval_mode sample"
                " (its npz files hold the images that upstream's FID programs read)"
            )


def parser() -> argparse.ArgumentParser:
    """Upstream's evaluation flags and ours."""
    result = argparse.ArgumentParser(
        prog="python -m nvae.evaluate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    theirs = result.add_argument_group("NVAE's flags")
    theirs.add_argument(
        "--checkpoint", default="/tmp/expr/checkpoint.pt", help="file to load (%(default)s)"
    )
    theirs.add_argument(
        "--save", default="/tmp/expr", help="output directory, created if missing (%(default)s)"
    )
    theirs.add_argument(
        "--eval_mode", choices=MODES, default="sample", help="what to do (%(default)s)"
    )
    theirs.add_argument(
        "--eval_on_train",
        action="store_true",
        help="mode evaluate: use the training images",
    )
    theirs.add_argument("--data", default="/tmp/data", help="data directory (%(default)s)")
    theirs.add_argument(
        "--readjust_bn",
        action="store_true",
        help="re-estimate the batch-norm statistics from samples at --temp first;"
        " needed for temperatures well below 1 and when samples come out as NaN or as noise",
    )
    theirs.add_argument(
        "--temp", type=float, default=0.7, help="temperature of the prior (%(default)s)"
    )
    theirs.add_argument(
        "--num_iw_samples",
        type=int,
        default=1000,
        help="mode evaluate: importance samples (%(default)s)",
    )
    theirs.add_argument(
        "--fid_dir",
        default="/tmp/fid-stats",
        help="mode evaluate_fid: reference statistics (%(default)s)",
    )
    theirs.add_argument(
        "--batch_size",
        type=int,
        default=0,
        help="modes evaluate and evaluate_fid: 0 is the training batch size (%(default)s)",
    )
    theirs.add_argument(
        "--local_rank",
        type=int,
        default=0,
        help="accepted; torchrun tells each process its rank",
    )
    theirs.add_argument(
        "--world_size",
        type=int,
        default=1,
        help="processes on this machine; more than 1 starts them through torchrun (%(default)s)",
    )
    theirs.add_argument(
        "--seed",
        type=int,
        default=1,
        help="the same seed gives the same images, whatever the number of processes (%(default)s)",
    )
    theirs.add_argument(
        "--master_address",
        default="127.0.0.1",
        help="accepted; processes on one machine find each other, torchrun knows of others",
    )

    ours = result.add_argument_group("our flags")
    ours.add_argument(
        "--ebm_prior",
        metavar="FILE",
        help="sample from this energy-based prior (prior.safetensors), made for this checkpoint",
    )
    ours.add_argument("--num_samples", type=int, default=50000, help="images in all (%(default)s)")
    ours.add_argument(
        "--format",
        choices=("npz", "png", "both"),
        default="both",
        help="npz: gpu_<rank>_samples_<i>.npz, key samples, floats (N, C, H, W) in [0, 1];"
        " png: png/<image>.png (%(default)s)",
    )
    ours.add_argument(
        "--grid",
        type=int,
        nargs="?",
        const=64,
        default=64,
        metavar="N",
        help="first N images, at most one block, as grid.png; 0 for none (%(default)s)",
    )
    ours.add_argument(
        "--block_size",
        type=int,
        default=100,
        metavar="N",
        help="images drawn at once; fewer need less memory. A seed belongs to a block, so another"
        " size gives other images (%(default)s)",
    )
    ours.add_argument(
        "--readjust_iterations",
        type=int,
        default=500,
        metavar="N",
        help="batches of 16 samples for --readjust_bn (%(default)s)",
    )
    ours.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    ours.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    return result


def settings(argv: Sequence[str] | None = None) -> Settings:
    """Parse the command line.

    Raises:
        ValueError: a value out of range, or a mode that is not part of this version.
    """
    namespace = parser().parse_args(argv)
    return Settings(**{field.name: getattr(namespace, field.name) for field in fields(Settings)})
