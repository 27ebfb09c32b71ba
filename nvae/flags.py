"""The command line of `python -m nvae.evaluate`: upstream's flags, and ours in a second group.

Names, types, defaults and meanings of the first group are those of NVAE's `evaluate.py`. Does not
import torch, so `--help` answers at once.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

NO_DATA = "/tmp/data"  # upstream's default of --data
MODES = ("sample", "evaluate", "evaluate_fid", "reconstruct", "encode")
FEATURES = ("2048", "1280", "768", "192", "64", "random")
READJUST_BATCH = {"evaluate_fid": 2}  # upstream's, and 16 in mode `sample`

DESCRIPTION = """\
Draw images from an NVAE checkpoint, with its Gaussian prior or with an EBM prior, and measure it.

modes:
  sample        images as npz, PNG files and a grid
  evaluate      likelihood of the held-out images: ELBO and importance-weighted bound, in bits/dim
  evaluate_fid  FID, KID and IS of samples against statistics that python -m nvae.fid_stats wrote
  reconstruct   your own pictures in --data, and what the model makes of them, side by side
  encode        their latents, u and z, as npz
"""

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

  bits per dimension; reconstructions of pictures in a folder; FID with local Inception weights:
    python -m nvae.evaluate --checkpoint checkpoint.pt --save OUT --eval_mode evaluate --data DATA
    python -m nvae.evaluate --checkpoint checkpoint.pt --save OUT --eval_mode reconstruct \\
        --data PICTURES
    python -m nvae.evaluate --checkpoint checkpoint.pt --save OUT --eval_mode evaluate_fid \\
        --fid_dir STATS --inception pt_inception-2015-12-05.pth
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
    ebm_precision: str
    ebm_recompute: bool
    pixels: str
    pixel_temp: float
    upstream_temp: bool
    readjust_iterations: int
    readjust_batch: int
    bn_cache: str | None
    inception: str | None
    features: str
    num_reconstructions: int
    dry_run: bool

    def __post_init__(self) -> None:
        for name, least in (
            ("num_samples", 2 if self.eval_mode == "evaluate_fid" else 1),
            ("block_size", 1),
            ("num_iw_samples", 1),
            ("readjust_iterations", 1),
            ("readjust_batch", 0),
            ("num_reconstructions", 0),
            ("world_size", 1),
            ("batch_size", 0),
            ("grid", 0),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        for name in ("temp", "pixel_temp"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(
                    f"--{name} {value}: expected a positive number (1 is what was trained)"
                )
        if self.ebm_prior and self.eval_mode not in ("sample", "evaluate_fid"):
            raise ValueError(
                f"--ebm_prior has no part in --eval_mode {self.eval_mode}, which draws nothing"
                " from a prior; leave it out"
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
        help="use the training images of the data set, not those held out",
    )
    theirs.add_argument(
        "--data",
        default=NO_DATA,
        help="data directory: a folder of pictures, else the checkpoint's data set (%(default)s)",
    )
    theirs.add_argument(
        "--readjust_bn",
        action="store_true",
        help="re-estimate the batch-norm statistics from samples at --temp first;"
        " needed for temperatures well below 1 and when samples come out as NaN or as noise;"
        " not used by mode evaluate",
    )
    theirs.add_argument(
        "--temp",
        type=float,
        default=0.7,
        help="temperature of the prior (%(default)s; mode evaluate_fid: 1 if not given)",
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
    ours.add_argument(
        "--ebm_precision",
        choices=("auto", "float32", "bf16"),
        default="auto",
        help="of the model's cells inside that prior's chains; auto: bf16 on CUDA, else float32",
    )
    ours.add_argument(
        "--ebm_recompute",
        action="store_true",
        help="its chains keep a fifth to an eighth as much memory, for half as much work again",
    )
    ours.add_argument(
        "--num_samples",
        type=int,
        default=50000,
        help="images in all; of a folder at most (%(default)s)",
    )
    ours.add_argument(
        "--pixels",
        choices=("mode", "mean", "sample"),
        default="mode",
        help="an image is the decoder's mean, or a pixel sample of it; mode: a sample in mode"
        " sample and the mean otherwise, as upstream; binary images are always means",
    )
    ours.add_argument(
        "--pixel_temp",
        type=float,
        default=1.0,
        metavar="T",
        help="temperature of pixel samples; upstream's mixture decoder divides by it, so there"
        " less is noisier (%(default)s)",
    )
    ours.add_argument(
        "--upstream_temp",
        action="store_true",
        help="ignore temperatures where upstream does: evaluate_fid draws at 1 whatever --temp is"
        " (which --readjust_bn follows), and Gaussian decoders ignore --pixel_temp",
    )
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
        help="batches for --readjust_bn (%(default)s)",
    )
    ours.add_argument(
        "--readjust_batch",
        type=int,
        default=0,
        metavar="N",
        help="samples in each; 0 is upstream's number: 16, in mode evaluate_fid 2 (%(default)s)",
    )
    ours.add_argument(
        "--bn_cache",
        metavar="DIR",
        help="where re-estimated statistics are kept and found again (the folder of --save)",
    )
    add_network_flags(ours)
    ours.add_argument(
        "--num_reconstructions",
        type=int,
        default=0,
        metavar="N",
        help="mode evaluate_fid: also the FID of the reconstructions of at most N images of --data"
        " (%(default)s)",
    )
    ours.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    ours.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    return result


def add_network_flags(group: argparse._ArgumentGroup) -> None:
    """The network whose features are compared."""
    group.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of FID's Inception network, pt_inception-2015-12-05 as .pth or .safetensors",
    )
    group.add_argument(
        "--features",
        choices=FEATURES,
        default="2048",
        help="2048 are those of FID; fewer are of an earlier layer, and random of a small network"
        " of fixed random weights: both for relative use, not comparable with FID (%(default)s)",
    )


def settings(argv: Sequence[str] | None = None) -> Settings:
    """Parse the command line.

    Raises:
        ValueError: a value out of range, or flags that do not go together.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    given = vars(parser().parse_args(words))
    mode = given["eval_mode"]
    if mode == "evaluate_fid" and not given["upstream_temp"] and not _has(words, "--temp"):
        given["temp"] = 1.0  # the number upstream's command gives; its default belongs to samples
    if given["pixels"] == "mode":
        given["pixels"] = "sample" if mode == "sample" else "mean"
    given["readjust_batch"] = given["readjust_batch"] or READJUST_BATCH.get(mode, 16)
    return Settings(**{field.name: given[field.name] for field in fields(Settings)})


def _has(words: Sequence[str], flag: str) -> bool:
    return any(word == flag or word.startswith(f"{flag}=") for word in words)
