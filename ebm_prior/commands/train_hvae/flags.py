"""The command line of `ebm_prior train_hvae`: flags over a size's settings, checks of paths."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ebm_prior.backbones.hvae.config import LIKELIHOODS, SIZES, HVAEConfig
from ebm_prior.backbones.hvae.settings import HVAESettings
from ebm_prior.commands.shared.arguments import check_out, written_signs
from nvae.arch import DATA_SETS

# The training that goes with a size; what is not named has the default of `HVAESettings`.
TRAINING: dict[str, dict[str, Any]] = {
    "full": {"batch_size": 128, "epochs": 200},
    "small": {
        "batch_size": 128,
        "iterations": 2000,
        "lr": 1.5e-3,
        "warmup": 0.3,
        "ema": 0.998,
    },
    "tiny": {
        "batch_size": 100,
        "iterations": 1500,
        "lr": 3e-3,
        "warmup": 0.3,
        "ema": 0.99,
    },
}
_SIZES = "\n".join(f"  {name:<7}{size.about}" for name, size in SIZES.items())
EXAMPLES = f"""\
sizes:
{_SIZES}

examples:
  CIFAR-10 on a GPU, in bf16; started again, it goes on where it stopped:
    python -m ebm_prior train_hvae --dataset cifar10 --data data/cifar10 --size full \\
        --out runs/hvae --resume auto

  CIFAR-10 on a CPU, for the next 25 minutes:
    python -m ebm_prior train_hvae --dataset cifar10 --data data/cifar10 --size small \\
        --out runs/hvae_small --resume auto --max_minutes 25

  8x8 digits, which need no download, in about a minute:
    python -m ebm_prior train_hvae --dataset digits --size tiny --kl_weight 0.5 --out runs/tiny

then, for example (OUT/hvae.safetensors is given wherever a checkpoint is asked for):
    python -m ebm_prior train --preset hvae --checkpoint runs/hvae/hvae.safetensors \\
        --data data/cifar10 --out runs/hvae_prior

OUT holds hvae.safetensors (the VAE), last.pt (to go on from), report.json (bits per dimension and
KL per layer, train and held out), config.json, args.json, metrics.jsonl, grids/*.png, and
tensorboard/."""

# name -> help; type and default come from `HVAESettings`, or the size's.
TRAINING_FLAGS = {
    "lr": "Adam's learning rate, which falls on a half cosine",
    "lr_end": "to this one",
    "weight_decay": "decoupled, as in AdamW; 0: Adam",
    "beta1": "Adam",
    "beta2": "Adam",
    "kl_weight": "of the KL; below 1: sharper images, and a prior that fits less",
    "warmup": "fraction of the steps in which the weight of the KL rises from 0",
    "free_bits": "nats of KL per channel of a layer that are free",
    "grad_clip": "largest norm of the gradient (of the loss per image value); inf: off",
    "grad_skip": "above this norm the update is skipped; inf: off",
    "ema": "decay of the averaged weights that are saved and shown; 0: off",
    "seed": "of weights, order and noise",
    "log_every": "steps between lines of metrics.jsonl",
    "save_every": "steps between saves",
    "grid_every": "steps between grids of reconstructions and samples; 0: none",
    "grid_size": "images of a grid",
    "max_minutes": "stop and save after this many; go on with --resume auto; 0: never",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    main = parser.add_argument_group("what to train")
    main.add_argument(
        "--dataset",
        choices=tuple(DATA_SETS),
        default="cifar10",
        metavar="NAME",
        help="cifar10 (default), digits, celeba_64, or another set of nvae.train",
    )
    main.add_argument("--data", metavar="FOLDER", help="where its images are; digits need none")
    main.add_argument("--size", choices=tuple(SIZES), default="full", help="network (%(default)s)")
    main.add_argument(
        "--likelihood",
        choices=LIKELIHOODS,
        default="logistic",
        help="of a pixel: logistic with a predicted scale, mixture of five such, or gaussian with"
        " one deviation for all; images are means with all of them (%(default)s)",
    )
    main.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the run")
    main.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: go on if OUT holds a run (default: refuse to touch it)",
    )
    main.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    main.add_argument(
        "--amp",
        choices=("auto", "bf16", "off"),
        default="auto",
        help="bf16: the network in bfloat16, latents and losses in float32; auto:"
        " where the device computes in it",
    )
    main.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: as needed)"
    )
    main.add_argument(
        "--eval_images",
        type=int,
        default=2000,
        metavar="N",
        help="images of each half for report.json (%(default)s)",
    )
    main.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    group = parser.add_argument_group("the training (defaults: the size's, shown by --dry_run)")
    kinds = {field.name: field.type for field in fields(HVAESettings)}
    for name, text in TRAINING_FLAGS.items():
        whole = kinds[name] == "int"
        group.add_argument(
            f"--{name}", type=int if whole else float, metavar="N" if whole else "X", help=text
        )
    group.add_argument("--batch_size", type=int, metavar="N", help="images per process and step")
    group.add_argument(
        "--flips",
        action=argparse.BooleanOptionalAction,
        help="flip images at random (default: all but written signs)",
    )
    length = group.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=int, metavar="N", help="length of the run in steps")
    length.add_argument("--epochs", type=int, metavar="N", help="length in passes over the data")


@dataclass(frozen=True)
class Run:
    """The command line, resolved. `settings` are the size's with flags in their place."""

    dataset: str
    data: Path | None
    size: str
    likelihood: str
    out: Path
    resume: str
    device: str
    amp: str
    workers: int | None
    eval_images: int
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        values = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}
        return {**values, "network": self.network().to_dict()}

    def network(self) -> HVAEConfig:
        """The network that the data set and the size ask for.

        Raises:
            ValueError: images too small for the size.
        """
        known = DATA_SETS[self.dataset]
        shape = (known.channels, known.image_size, known.image_size)
        return SIZES[self.size].config(self.dataset, shape, known.levels, self.likelihood)


def parsed(args: argparse.Namespace) -> Run:
    """The command line with the size's settings, flags in their place."""
    settings: dict[str, Any] = {
        field.name: field.default for field in fields(HVAESettings) if field.name != "amp"
    }
    settings |= {"iterations": None, "epochs": None, **TRAINING[args.size]}
    settings["flips"] = not written_signs(args.dataset)
    given = {k: v for k in (*settings, "batch_size") if (v := getattr(args, k)) is not None}
    if {"iterations", "epochs"} & given.keys():
        settings |= {"iterations": None, "epochs": None}
    settings["lr_end"] = given.get("lr", settings["lr"]) / 100
    return Run(
        dataset=args.dataset,
        data=Path(args.data) if args.data else None,
        size=args.size,
        likelihood=args.likelihood,
        out=Path(args.out),
        resume=args.resume,
        device=args.device,
        amp=args.amp,
        workers=args.workers,
        eval_images=args.eval_images,
        settings=settings | given,
    )


def check_paths(command: Run) -> None:
    """Everything that can be told without reading the data.

    Raises:
        ValueError: a missing input, a folder that cannot be written, a run that must not be lost.
    """
    command.network()
    for name, value in (
        ("batch_size", command.settings["batch_size"]),
        ("eval_images", command.eval_images),
    ):
        if value < 1:
            raise ValueError(f"--{name} {value}: expected at least 1")
    if command.data is None and command.dataset != "digits":
        raise ValueError(f"give --data, the folder that holds the images of {command.dataset}")
    if command.data is not None and not command.data.is_dir():
        raise ValueError(f"--data {command.data}: no such folder")
    out = command.out
    check_out(out)
    held = [name for name in ("last.pt", "hvae.safetensors") if (out / name).exists()]
    if held and command.resume == "never":
        raise ValueError(
            f"--out {out} holds {' and '.join(held)} of another run; go on with it by --resume"
            " auto, or give another --out"
        )
    if held == ["hvae.safetensors"]:
        raise ValueError(f"--out {out} holds an HVAE but no last.pt to go on from; give another")


def train_settings(command: Run, batches_per_epoch: int, amp: str) -> HVAESettings:
    """The trainer's settings, with the length in steps."""
    given, length = command.settings, command.settings["iterations"]
    if length is None:
        if given["epochs"] < 1:
            raise ValueError(f"--epochs {given['epochs']}: expected at least 1")
        length = given["epochs"] * batches_per_epoch
    names = [f.name for f in fields(HVAESettings) if f.name not in ("iterations", "amp")]
    return HVAESettings(iterations=length, amp=amp, **{name: given[name] for name in names})
