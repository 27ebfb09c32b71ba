"""The flags that choose what images are measured with; without torch, for the parsers."""

from __future__ import annotations

import argparse
from pathlib import Path

FEATURES = ("classifier", "2048", "1280", "768", "192", "64", "random")


def add_measure(parser: argparse.ArgumentParser) -> None:
    """`--features`, `--inception` and `--fid_dir`."""
    group = parser.add_argument_group("what images are measured with")
    group.add_argument(
        "--features",
        choices=FEATURES,
        help="2048: FID's; fewer: of an earlier layer of its network; random: of a network of"
        " random weights; classifier: of one trained here on the data's labels. Only 2048 give"
        " FID (default: classifier for the digits, else 2048)",
    )
    group.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of FID's Inception network, pt_inception-2015-12-05 as .pth or .safetensors",
    )
    group.add_argument(
        "--fid_dir",
        metavar="FOLDER",
        help="reference statistics by python -m nvae.fid_stats (default: of the training images,"
        " computed here)",
    )


def check_measure(args: argparse.Namespace) -> None:
    """Refuse weights or statistics that are not there.

    Raises:
        ValueError: one line that names the flag.
    """
    if args.inception is not None and not Path(args.inception).is_file():
        raise ValueError(f"--inception {args.inception}: no such file")
    if args.fid_dir is not None and not Path(args.fid_dir).is_dir():
        raise ValueError(f"--fid_dir {args.fid_dir}: no such folder")
    if args.fid_dir is not None and args.features == "classifier":
        raise ValueError(
            "--fid_dir has statistics of network features, --features classifier trains its own;"
            " leave one of them out"
        )
