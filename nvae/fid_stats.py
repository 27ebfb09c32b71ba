"""`python -m nvae.fid_stats`: reference statistics of a data set, and distances between such.

Upstream's program of this kind reads the training images with random flips and drops the last
incomplete batch; here every image counts, once, and flips are asked for.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nvae import flags, runtime
from nvae.arch import DATA_SETS

if TYPE_CHECKING:
    from torch import Tensor

    from nvae.metrics import Statistics

WITH_HELD_OUT = ("celeba_256", "omniglot")  # upstream takes both halves of these

DESCRIPTION = """\
Write mean and covariance of a data set's features (npz with mu and sigma, as the field's programs
read them), for `python -m nvae.evaluate --eval_mode evaluate_fid`; or compare two data sets.
"""

EXAMPLES = """\
examples:
  the reference for CIFAR-10, STATS/cifar10.npz:
    python -m nvae.fid_stats --dataset cifar10 --data DATA --fid_dir STATS \\
        --inception pt_inception-2015-12-05.pth

  its test images against its training images:
    python -m nvae.fid_stats --dataset cifar10 --data DATA --fid_dir STATS --held_out \\
        --inception pt_inception-2015-12-05.pth --against STATS/cifar10.npz

  any folder of PNG files against it:
    python -m nvae.fid_stats --dataset folder --image_size 32 --data SAMPLES --fid_dir OUT \\
        --inception pt_inception-2015-12-05.pth --against STATS/cifar10.npz
"""


@dataclass(frozen=True)
class Settings:
    """The command line, one field per flag."""

    dataset: str
    data: str
    batch_size: int
    max_samples: int
    fid_dir: str
    held_out: bool
    flip: bool
    image_size: int
    kid_samples: int
    against: str | None
    inception: str | None
    features: str
    seed: int
    device: str
    dry_run: bool

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("max_samples", 2), ("kid_samples", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if (self.dataset == "folder") != (self.image_size > 0):
            raise ValueError("--image_size is needed for --dataset folder, and for no other")


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        prog="python -m nvae.fid_stats",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    theirs = result.add_argument_group("NVAE's flags")
    theirs.add_argument("--dataset", choices=(*DATA_SETS, "folder"), default="cifar10")
    theirs.add_argument("--data", default="/tmp/nvae-diff/data", help="data directory")
    theirs.add_argument("--batch_size", type=int, default=64, help="images at once (%(default)s)")
    theirs.add_argument(
        "--max_samples",
        type=int,
        default=50000,
        help="of a larger set so many are drawn with the seed (%(default)s)",
    )
    theirs.add_argument(
        "--fid_dir", default="/tmp/fid-stats", help="output: <dataset>.npz (%(default)s)"
    )
    ours = result.add_argument_group("our flags")
    flags.add_network_flags(ours)
    ours.add_argument(
        "--held_out", action="store_true", help="the held-out images, not those of training"
    )
    ours.add_argument("--flip", action="store_true", help="flip images at random, as upstream")
    ours.add_argument(
        "--image_size", type=int, default=0, metavar="S", help="of --dataset folder: S x S pixels"
    )
    ours.add_argument(
        "--kid_samples",
        type=int,
        default=10000,
        metavar="N",
        help="features of N images are kept in the file, for KID (%(default)s)",
    )
    ours.add_argument(
        "--against", metavar="FILE", help="print the distance to these statistics as well"
    )
    ours.add_argument("--seed", type=int, default=1, help="of what is drawn (%(default)s)")
    ours.add_argument(
        "--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:N"
    )
    ours.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    return result


def _images(settings: Settings) -> Any:
    """The images, of a large set a choice by the seed."""
    import torch
    from torch.utils.data import ConcatDataset, Subset

    from nvae import data

    if settings.dataset == "folder":
        fit = data.Fit(settings.image_size, augment=settings.flip)
        found: Any = data.folder(settings.data, fit)
    else:
        both = settings.dataset in WITH_HELD_OUT and not settings.held_out
        halves = [True, False] if both else [not settings.held_out]
        root = None if settings.dataset == "digits" else settings.data  # with scikit-learn
        parts = [data.load(settings.dataset, root, h, augment=settings.flip) for h in halves]
        found = ConcatDataset(parts) if both else parts[0]
    if len(found) <= settings.max_samples:
        return found
    generator = torch.Generator().manual_seed(settings.seed)
    chosen = torch.randperm(len(found), generator=generator)[: settings.max_samples]
    return Subset(found, sorted(chosen.tolist()))


def compute(settings: Settings, here: runtime.Runtime) -> tuple[Statistics, Tensor] | None:
    """The statistics and all features, on the main process."""
    import torch

    from nvae import feature_networks, features, metrics
    from nvae.evaluation import blocks, fid
    from nvae.evaluation.job import provenance
    from nvae.seeds import derived

    network = feature_networks.network(settings.inception, settings.features).to(here.device)
    images = _images(settings)
    parts = {}
    for block in blocks.mine(len(images), settings.batch_size, here, settings.dataset):
        # Flips and binarised pixels come from the process's own generator.
        torch.manual_seed(derived(settings.seed, block.number))
        parts[block.number] = network(block.of(images))
    found = fid.joined(blocks.gathered(parts, here))
    if found is None:
        return None
    protocol = {
        **features.described(network),
        "dataset": settings.dataset,
        "half": "held-out" if settings.held_out else "training",
        "num_images": len(found.pooled),
        "flips": settings.flip,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        **provenance(),
    }
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(found.pooled), generator=generator)[: settings.kid_samples]
    sample = found.pooled[order] if len(order) else None
    return metrics.Statistics.of(
        found.pooled, label=network.label, sample=sample, protocol=protocol
    ), found.pooled


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    given = vars(parser().parse_args(argv))
    settings = Settings(**{f.name: given[f.name] for f in dataclasses.fields(Settings)})
    if settings.dry_run:
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        return 0
    from nvae import metrics
    from nvae.digest import sha256
    from nvae.evaluation import fid
    from nvae.evaluation.job import write_json
    from nvae.features import Features

    reference = metrics.read(settings.against) if settings.against else None
    with runtime.started(settings.device) as here:
        made = compute(settings, here)
    if made is None:
        return 0
    statistics, pooled = made
    label = statistics.label or ""
    name = f"{settings.dataset}_held_out" if settings.held_out else settings.dataset
    path = metrics.path_of(settings.fid_dir, name, label)
    metrics.write(path, statistics)
    print(f"statistics of {len(pooled)} images, {label} features: {path}")
    if reference is not None:
        metrics.check_same_features(reference, label, pooled.shape[1])
        numbers = fid.measured(reference, Features(pooled, None), label, settings.seed)
        against = {
            "against": settings.against,
            "against_sha256": sha256(str(settings.against)),
            "against_protocol": reference.protocol,
        }
        protocol = {**statistics.protocol, **metrics.PROTOCOL, **against}
        report = {**numbers, "protocol": protocol}
        write_json(path.with_suffix(".json"), report)
        fid.tell("", numbers, label)
    return 0


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
