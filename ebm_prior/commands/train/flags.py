"""The command line of `ebm_prior train`: flags over a preset's settings, and checks of paths."""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_prior.commands.shared import speed
from ebm_prior.commands.shared.arguments import check_out
from ebm_prior.presets import PRESETS, PRIOR_SETTINGS, resolved

if TYPE_CHECKING:
    from ebm_prior.config import PriorConfig
    from ebm_prior.training.settings import TrainSettings

_ROWS = "\n".join(
    f"  {name:<11}{row['paper']}\n{'':13}settings: {row['source']}"
    for name, row in PRESETS.items()
)
EXAMPLES = f"""\
presets (every value has a flag):
{_ROWS}

examples:
  the paper's CIFAR-10 run on two GPUs; started again, it goes on where it stopped:
    torchrun --nproc_per_node 2 -m ebm_prior train --preset cifar10 --checkpoint checkpoint.pt \\
        --data data/cifar10 --out runs/cifar10 --resume auto

  what would be run, without running it:
    python -m ebm_prior train --preset celeba256 --checkpoint checkpoint.pt --data data/celeba \\
        --out runs/celeba --lr 2e-5 --dry_run

  a control that any prior has to beat, in seconds:
    python -m ebm_prior train --prior fitted --preset digits --checkpoint digits.pt --out runs/fit

  digits on demand: labels at both layers of the shipped backbone, acting at every step:
    python -m ebm_prior train --preset digits --checkpoint digits.pt --out runs/classes \\
        --attribute class:0,1 --label_steps 3

  a VAE of your own pictures, with a restraint on the energies:
    python -m ebm_prior train --preset church64 --checkpoint checkpoint.pt --dataset folder \\
        --data pictures --out runs/mine --grad_clip 1

OUT holds prior.safetensors (the prior), last.pt (to go on from), config.json, args.json,
metrics.jsonl, grids/*.png, tensorboard/ (tensorboard --logdir OUT/tensorboard) and, once done,
report.json."""

METAVAR = {int: "N", float: "X"}
KINDS = {
    "diffusion": "the paper's",
    "joint": "one marginal EBM",
    "ncp": "a classifier per layer",
    "fitted": "a Gaussian, in seconds",
}
# name -> (type or choices, help); the defaults are the preset's.
PRIOR_FLAGS: dict[str, tuple[Any, str]] = {
    "network": (
        ("residual", "conv", "mlp", "map"),
        "energies: residual (the paper's for CIFAR-10), conv (CelebA-HQ), mlp (small latents), map"
        " (light, convolutional, with biases)",
    ),
    "width": (int, "channels, or units, of the energies"),
    "depth": (int, "residual layers of mlp"),
    "spectral_norm": (bool, "spectral normalisation of the energies"),
    "max_T": (int, "diffusion steps"),
    "num_steps": (int, "Langevin steps per diffusion step"),
    "b2": (float, "the number behind the Langevin step size"),
    "energy_scale": (("step", "none"), "step: energies are divided by the step size"),
    "step_rule": (("cumulative", "plain"), "how the step size grows with the noise"),
    "last_step_kernel": (bool, "keep the kernel term at the noisiest step"),
    "label_steps": (int, "labels act at diffusion indices below this"),
    "per_layer_classes": (bool, "each layer of an attribute is a classifier of its own"),
    "sampler": (
        ("u", "z", "sir", "langevin"),
        "joint: chains in u or z; ncp: importance resampling or Langevin",
    ),
    "joint_logdet": (("exact", "released"), "joint in u: the density, or as it was released"),
    "proposals": (int, "ncp, sir: proposals per draw"),
    "rank": (int, "fitted: of the covariance beside a diagonal; 0: full"),
}
TRAINING_FLAGS: dict[str, tuple[Any, str]] = {
    "batch_size": (int, "images per process and step"),
    "lr": (float, "Adam's learning rate"),
    "lr_schedule": (
        ("epoch", "linear", "cosine"),
        "epoch: lr * lr_decay^epoch; linear, cosine: to lr * lr_decay",
    ),
    "lr_decay": (float, "see --lr_schedule"),
    "beta1": (float, "Adam"),
    "beta2": (float, "Adam"),
    "weight_decay": (float, "added to the gradient"),
    "ema": (float, "decay of averaged weights, which are then saved and sampled; 0: off"),
    "grad_clip": (float, "largest norm of the gradient; 0: off"),
    "squared_penalty": (float, "weight of f^2 in the loss; 0: off"),
    "label_weight": (float, "weight of the labels' cross-entropy"),
    "context": (bool, "ncp: the classifiers see the decoder's state"),
    "draws": (int, "fitted: posterior draws per training image"),
    "bn_readjust": (bool, "re-estimate the VAE's BatchNorm from its own samples first"),
    "bn_iterations": (int, "batches for that"),
}
# name -> (default, type or choices, help)
RUN_FLAGS: dict[str, tuple[Any, Any, str]] = {
    "seed": (0, int, "of weights, order and noise"),
    "optimizer": (
        "adam",
        ("adam", "apex_adam"),
        "apex_adam: NVIDIA's fused one, if built here; the same to rounding",
    ),
    "log_every": (10, int, "steps between lines of metrics.jsonl"),
    "save_every": (500, int, "steps between saves"),
    "grid_every": (500, int, "steps between grids of samples; 0: none"),
    "grid_size": (16, int, "samples of a grid"),
    "guard_difference": (None, float, "limit of mean f(u-) - f(u+); by default the prior's own"),
    "guard_u_std": (2.0, float, "limit of the deviation of the chains' u; inf: none"),
    "guard_every": (50, int, "steps between states to go back to"),
    "max_halvings": (5, int, "halvings of the learning rate before giving up"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    main = parser.add_argument_group("what to train on")
    main.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the VAE: NVAE's checkpoint.pt, or HVAE",
    )
    main.add_argument("--preset", required=True, choices=tuple(PRESETS), help="settings by name")
    main.add_argument(
        "--data", metavar="FOLDER", help="the folder of the training images; digits need none"
    )
    main.add_argument(
        "--dataset", help="what --data holds: a data set, or folder (default: the checkpoint's)"
    )
    main.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the run")
    main.add_argument(
        "--prior",
        choices=tuple(KINDS),
        default="diffusion",
        help="; ".join(f"{kind}: {text}" for kind, text in KINDS.items()) + " (%(default)s)",
    )
    main.add_argument(
        "--attribute",
        action="append",
        default=[],
        metavar="NAME:LAYERS",
        help="couple a label to layers, 0 = top: class:0,1 or class:0-9; again for more of them",
    )
    main.add_argument(
        "--labels",
        metavar="FOLDER",
        help="train.csv and validation.csv, a column of class numbers per attribute, empty ="
        " unlabelled; without it: class, and of the digits parity and loop",
    )
    main.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="never",
        help="auto: go on if OUT holds a run (default: refuse to touch it)",
    )
    main.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    main.add_argument(
        "--workers", type=int, metavar="N", help="processes that read images (default: as needed)"
    )
    main.add_argument("--dry_run", action="store_true", help="print the settings as JSON and stop")
    speed.add_arguments(parser)
    for name, (default, kind, text) in RUN_FLAGS.items():
        text += "" if default is None else " (%(default)s)"
        form = {"type": kind, "metavar": METAVAR.get(kind)}
        if isinstance(kind, tuple):
            form = {"choices": kind}
        main.add_argument(f"--{name}", default=default, help=text, **form)

    for title, flags in (("the prior", PRIOR_FLAGS), ("the training", TRAINING_FLAGS)):
        group = parser.add_argument_group(f"{title} (defaults: the preset's)")
        for name, (kind, text) in flags.items():
            if kind is bool:
                group.add_argument(
                    f"--{name}", action=argparse.BooleanOptionalAction, default=None, help=text
                )
            elif isinstance(kind, tuple):
                group.add_argument(f"--{name}", choices=kind, help=text)
            else:
                group.add_argument(f"--{name}", type=kind, metavar=METAVAR[kind], help=text)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=int, metavar="N", help="length of the run in steps")
    length.add_argument(
        "--epochs", type=int, metavar="N", help="length of the run in passes over the data"
    )


@dataclass(frozen=True)
class Run:
    """The command line, resolved. `settings` are the preset's with flags in their place."""

    checkpoint: Path
    preset: str
    data: Path | None
    dataset: str | None
    out: Path
    prior: str
    attributes: tuple[tuple[str, tuple[int, ...]], ...]
    labels: Path | None
    resume: str
    device: str
    workers: int | None
    precision: str
    recompute: bool
    plain: bool
    options: dict[str, Any]  # of RUN_FLAGS
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        row = PRESETS[self.preset]
        return {
            **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()},
            "source": row["source"],
            "paper": row["paper"],
        }


def parsed(args: argparse.Namespace) -> Run:
    """The command line with the preset's settings, flags in their place."""
    speed.check(args)
    names = [*PRIOR_FLAGS, *TRAINING_FLAGS, "iterations", "epochs"]
    return Run(
        checkpoint=Path(args.checkpoint),
        preset=args.preset,
        data=Path(args.data) if args.data else None,
        dataset=args.dataset,
        out=Path(args.out),
        prior=args.prior,
        attributes=tuple(_attribute(text) for text in args.attribute),
        labels=Path(args.labels) if args.labels else None,
        resume=args.resume,
        device=args.device,
        workers=args.workers,
        precision=args.precision,
        recompute=args.recompute,
        plain=args.plain,
        options={name: getattr(args, name) for name in RUN_FLAGS},
        settings=resolved(args.preset, {name: getattr(args, name) for name in names}, args.prior),
    )


def _attribute(text: str) -> tuple[str, tuple[int, ...]]:
    """`class:0,2-4` as ("class", (0, 2, 3, 4)).

    Raises:
        ValueError: another form.
    """
    name, colon, layers = text.partition(":")
    try:
        ends = [[int(end) for end in part.split("-", 1)] for part in layers.split(",")]
    except ValueError:
        ends = []
    if not (name and colon and ends) or any(part[0] > part[-1] for part in ends):
        raise ValueError(f"--attribute {text}: expected NAME:LAYERS, for example class:0,2-4")
    return name, tuple(layer for part in ends for layer in range(part[0], part[-1] + 1))


def check_paths(command: Run) -> None:
    """Everything about the paths that can be told without reading them.

    Raises:
        ValueError: a missing input, a folder that cannot be written, a run that must not be lost.
    """
    if not command.checkpoint.is_file():
        raise ValueError(f"--checkpoint {command.checkpoint}: no such file")
    for name, folder in (("data", command.data), ("labels", command.labels)):
        if folder is not None and not folder.is_dir():
            raise ValueError(f"--{name} {folder}: no such folder")
    if command.labels is not None and not command.attributes:
        raise ValueError("--labels without --attribute: name the attributes and their layers")
    if command.attributes and command.prior != "diffusion":
        raise ValueError(f"--attribute belongs to --prior diffusion, got --prior {command.prior}")
    out = command.out
    check_out(out)
    held = [name for name in ("last.pt", "prior.safetensors") if (out / name).exists()]
    if held and command.resume == "never":
        raise ValueError(
            f"--out {out} holds {' and '.join(held)} of another run; go on with it by --resume"
            " auto, or give another --out"
        )
    if command.prior == "fitted":
        if "last.pt" in held:
            raise ValueError(f"--out {out} holds the training of another kind; give another --out")
    elif held == ["prior.safetensors"]:
        raise ValueError(
            f"--out {out} holds a prior but no last.pt to go on from; give another --out"
        )


def prior_config(command: Run, shapes: tuple[tuple[int, ...], ...], **more: Any) -> PriorConfig:
    """The prior's part of the settings; `more` is what data and backbone add."""
    from ebm_prior.config import PriorConfig

    chosen = {name: command.settings[name] for name in PRIOR_SETTINGS}
    kind, preset = command.prior, command.preset
    return PriorConfig(shapes=shapes, preset=preset, kind=kind, **chosen, **more)


def train_settings(command: Run, batches_per_epoch: int) -> TrainSettings:
    """The trainer's part of the settings, with the length in steps."""
    from ebm_prior.training.settings import TrainSettings

    given = {**command.settings, **command.options}
    length = given["iterations"]
    if length is None:
        if given["epochs"] < 1:
            raise ValueError(f"--epochs {given['epochs']}: expected at least 1")
        length = given["epochs"] * batches_per_epoch
    names = [field.name for field in fields(TrainSettings)]
    return TrainSettings(**{name: given[name] for name in names} | {"iterations": length})
