"""The main job on the shipped digits backbone: train priors, sample, measure, show."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from ebm_prior.presets import PRESETS

HELP = "train priors on the shipped digits VAE and compare their samples with the Gaussian prior's"
EXAMPLES = """\
examples:
  everything, about four minutes on two cores:
    python -m ebm_prior demo

  a quick look: one seed, few steps (the numbers will be worse):
    python -m ebm_prior demo --seeds 0 --iterations 300 --out runs/quick

OUT holds report.json, gaussian_vs_ebm.png, prior.safetensors (the first seed's), and a folder per
training run."""


@dataclass(frozen=True)
class Settings:
    """The command line."""

    checkpoint: Path
    out: Path
    seeds: tuple[int, ...]
    iterations: int
    num_samples: int
    jobs: int

    def __post_init__(self) -> None:
        if not self.checkpoint.is_file():
            raise ValueError(f"--checkpoint {self.checkpoint}: no such file")
        for name, least in (("iterations", 1), ("num_samples", 100), ("jobs", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"--seeds {self.seeds}: expected different numbers from 0 on")


#: The checkpoints that ship with the package (scripts/train_nvae_digits.sh makes them). The second
#: is for an extra row: the same training on a backbone with KL weight 1.
ASSETS = Path(__file__).parents[2] / "assets"
BACKBONE = ASSETS / "digits-nvae.pt"
BACKBONE_KL1 = ASSETS / "digits-nvae-kl1.pt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    steps = PRESETS["digits"]["settings"]["iterations"]
    parser.add_argument(
        "--checkpoint",
        default=BACKBONE,
        metavar="FILE",
        help="another NVAE of the digits (default: the one that ships with the package)",
    )
    parser.add_argument(
        "--out", default="runs/demo", metavar="FOLDER", help="results (%(default)s)"
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(%(default)s)"
    )
    parser.add_argument(
        "--iterations", type=int, default=steps, metavar="N", help="per prior (%(default)s)"
    )
    parser.add_argument(
        "--num_samples",
        type=int,
        default=1500,
        metavar="N",
        help="of each kind, at most the 1500 training images (%(default)s)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(4, os.cpu_count() or 1)),
        metavar="N",
        help="priors trained at once, each on one core (%(default)s)",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print the settings as JSON and stop"
    )


def run(args: argparse.Namespace) -> int:
    """Train, measure, write the report and the picture."""
    settings = Settings(
        checkpoint=Path(args.checkpoint),
        out=Path(args.out),
        seeds=tuple(args.seeds),
        iterations=args.iterations,
        num_samples=args.num_samples,
        jobs=args.jobs,
    )
    if args.dry_run:
        print(json.dumps(asdict(settings), indent=2, default=str))
        return 0
    from ebm_prior.commands.demo import compare

    compare.run(settings, BACKBONE_KL1)
    return 0
