"""Train an energy-based prior on the latents of a frozen NVAE checkpoint (Algorithm 1)."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_prior.presets import PRESETS, PRIOR_SETTINGS, resolved

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ebm_prior.batches import Batches
    from ebm_prior.config import PriorConfig
    from ebm_prior.settings import TrainSettings
    from ebm_prior.trainer import Summary, Trainer
    from nvae.model import AutoEncoder
    from nvae.runtime import Runtime

HELP = "train a prior on a frozen NVAE checkpoint"
USAGE = "%(prog)s --checkpoint FILE --preset NAME --data FOLDER --out FOLDER [options]"
IN_MEMORY = ("cifar10", "mnist", "digits")  # need no processes that read ahead
BN_KEY = 2**31 + 1  # the random numbers of BatchNorm re-estimation

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

  a VAE of your own pictures, with a restraint on the energies:
    python -m ebm_prior train --preset church64 --checkpoint checkpoint.pt --dataset folder \\
        --data pictures --out runs/mine --grad_clip 1

OUT holds prior.safetensors (the prior), last.pt (to go on from), config.json, args.json,
metrics.jsonl, grids/*.png, and tensorboard/ (tensorboard --logdir OUT/tensorboard)."""

METAVAR = {int: "N", float: "X"}
# name -> (type or choices, help); the defaults are the preset's.
PRIOR_FLAGS: dict[str, tuple[Any, str]] = {
    "network": (
        ("residual", "conv", "mlp"),
        "energies: residual (the paper's for CIFAR-10), conv (CelebA-HQ), mlp (small latents)",
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
}
TRAINING_FLAGS: dict[str, tuple[Any, str]] = {
    "batch_size": (int, "images per process and step"),
    "lr": (float, "Adam's learning rate"),
    "lr_schedule": (("epoch", "linear"), "epoch: lr * lr_decay^epoch; linear: to lr * lr_decay"),
    "lr_decay": (float, "see --lr_schedule"),
    "beta1": (float, "Adam"),
    "beta2": (float, "Adam"),
    "weight_decay": (float, "added to the gradient"),
    "ema": (float, "decay of averaged weights, which are then saved and sampled; 0: off"),
    "grad_clip": (float, "largest norm of the gradient; 0: off"),
    "squared_penalty": (float, "weight of f^2 in the loss; 0: off"),
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
    main.add_argument("--checkpoint", required=True, metavar="FILE", help="the NVAE checkpoint")
    main.add_argument("--preset", required=True, choices=tuple(PRESETS), help="settings by name")
    main.add_argument(
        "--data", metavar="FOLDER", help="the folder of the training images; digits need none"
    )
    main.add_argument(
        "--dataset", help="what --data holds: a data set, or folder (default: the checkpoint's)"
    )
    main.add_argument("--out", required=True, metavar="FOLDER", help="the folder of the run")
    main.add_argument("--prior", choices=("diffusion",), default="diffusion", help="kind of prior")
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
    resume: str
    device: str
    workers: int | None
    options: dict[str, Any]  # of RUN_FLAGS
    settings: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        row = PRESETS[self.preset]
        return {
            **{k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()},
            "source": row["source"],
            "paper": row["paper"],
        }


def run(args: argparse.Namespace) -> int:
    """Train; 0 when done, 128 + signal when stopped by one."""
    names = [*PRIOR_FLAGS, *TRAINING_FLAGS, "iterations", "epochs"]
    command = Run(
        checkpoint=Path(args.checkpoint),
        preset=args.preset,
        data=Path(args.data) if args.data else None,
        dataset=args.dataset,
        out=Path(args.out),
        prior=args.prior,
        resume=args.resume,
        device=args.device,
        workers=args.workers,
        options={name: getattr(args, name) for name in RUN_FLAGS},
        settings=resolved(args.preset, {name: getattr(args, name) for name in names}),
    )
    check_paths(command)
    # Settings out of range are told before anything is read; shapes and length come later.
    prior_config(command, ((1,),))
    train_settings(command, 1)
    if args.dry_run:
        print(json.dumps(command.to_json(), indent=2))
        return 0

    from nvae import runtime

    with runtime.started(command.device) as here:
        return train(command, here)


def check_paths(command: Run) -> None:
    """Everything about the paths that can be told without reading them.

    Raises:
        ValueError: a missing input, a folder that cannot be written, a run that must not be lost.
    """
    if not command.checkpoint.is_file():
        raise ValueError(f"--checkpoint {command.checkpoint}: no such file")
    if command.data is not None and not command.data.is_dir():
        raise ValueError(f"--data {command.data}: no such folder")
    out = command.out
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a folder, or a name for a new one")
    held = [name for name in ("last.pt", "prior.safetensors") if (out / name).exists()]
    if held and command.resume == "never":
        raise ValueError(
            f"--out {out} holds {' and '.join(held)} of another run; go on with it by --resume"
            " auto, or give another --out"
        )
    if held == ["prior.safetensors"]:
        raise ValueError(
            f"--out {out} holds a prior but no last.pt to go on from; give another --out"
        )
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: no permission in {there}")


def train(command: Run, here: Runtime) -> int:
    """Check everything, then train, and say what was written."""
    from ebm_prior import apex
    from nvae import checkpoint

    if command.options["optimizer"] == "apex_adam":
        apex.check(here.device)
    say = Say(here)
    vae = checkpoint.load(command.checkpoint, device=str(here.device))
    batches = open_data(command, vae, say)
    trainer = make_trainer(command, vae, batches, here, say)
    if here.is_main:
        write_arguments(command)
    steps, step = trainer.settings.iterations, trainer.step
    begin = f"going on from step {step}" if step else "training"
    say(f"{begin}: {steps} steps, {len(batches)} per epoch, on {here.device}")
    summary = trainer.run()
    if here.is_main:
        print(told(command, summary))
    return 128 + summary.signal if summary.signal and not summary.done else 0


class Say:
    """A line on stderr, from the first process only."""

    def __init__(self, here: Runtime) -> None:
        self.here = here

    def __call__(self, text: str) -> None:
        if self.here.is_main:
            print(text, file=sys.stderr)


def open_data(command: Run, vae: AutoEncoder, say: Say) -> Batches:
    """The training images, checked against the model.

    Raises:
        ValueError: they are missing, or do not fit.
    """
    from ebm_prior.batches import Batches
    from nvae import data

    made_for = vae.config.dataset
    name = command.dataset or made_for
    if command.data is None and name != "digits":
        raise ValueError(f"give --data, the folder that holds the images of {name}")
    wanted = PRESETS[command.preset]["data"]
    if wanted != made_for:
        fitting = [preset for preset, row in PRESETS.items() if row["data"] == made_for]
        advice = f"; --preset {fitting[0]} is for these" if fitting else ""
        say(f"note: preset {command.preset} is for {wanted}, the VAE is one of {made_for}{advice}")
    # Never flipped: the prior is to learn the latents of the images as they are.
    images = data.load(name, command.data, train=True, augment=False, config=vae.config)
    first = images[0]
    if tuple(first.shape) != vae.config.image_shape:
        raise ValueError(
            f"images of {name} have shape {tuple(first.shape)}, the VAE takes"
            f" {vae.config.image_shape}; give the data it was trained on, or --dataset folder"
        )
    workers = command.workers
    if workers is None:
        workers = 0 if name in IN_MEMORY else 2
    seed, size = command.options["seed"], command.settings["batch_size"]
    return Batches(images, size, seed=seed, workers=workers)


def make_trainer(
    command: Run, vae: AutoEncoder, batches: Batches, here: Runtime, say: Say
) -> Trainer:
    """The trainer, at its beginning or where the run in OUT stopped."""
    import torch

    from ebm_prior import run_state
    from ebm_prior.backbones.nvae import NVAEBackbone, bn_statistics
    from ebm_prior.prior import EBMPrior
    from ebm_prior.trainer import Trainer

    state = run_state.read(command.out) if command.resume == "auto" else None
    settings = train_settings(command, len(batches))
    backbone = NVAEBackbone(vae)
    torch.manual_seed(settings.seed)  # initial weights come from PyTorch's own generator
    prior = EBMPrior(backbone, prior_config(command, backbone.layout.shapes))
    check_disk(command.out, sum(p.numel() for p in prior.energies.parameters()))

    statistics = None
    if command.settings["bn_readjust"]:  # in place: the backbone is a view of the VAE
        if state is None:
            readjust(command, vae, here, say)
        else:
            take_statistics(vae, state["bn_statistics"])
        statistics = bn_statistics(vae)
    trainer = Trainer(
        prior.to(here.device),
        batches,
        settings,
        command.out,
        bn_statistics=statistics,
        facts={
            "dataset": command.dataset or vae.config.dataset,
            "batch_size": command.settings["batch_size"],
            "bn_readjust": command.settings["bn_readjust"],
        },
        show=show,
        bar=here.is_main,
    )
    if state is not None:
        trainer.resume(state)
    return trainer


def prior_config(command: Run, shapes: tuple[tuple[int, ...], ...]) -> PriorConfig:
    """The prior's part of the settings."""
    from ebm_prior.config import PriorConfig

    chosen = {name: command.settings[name] for name in PRIOR_SETTINGS}
    return PriorConfig(shapes=shapes, preset=command.preset, **chosen)


def train_settings(command: Run, batches_per_epoch: int) -> TrainSettings:
    """The trainer's part of the settings, with the length in steps."""
    from ebm_prior.settings import TrainSettings

    given = {**command.settings, **command.options}
    length = given["iterations"]
    if length is None:
        if given["epochs"] < 1:
            raise ValueError(f"--epochs {given['epochs']}: expected at least 1")
        length = given["epochs"] * batches_per_epoch
    names = [field.name for field in fields(TrainSettings)]
    return TrainSettings(**{name: given[name] for name in names} | {"iterations": length})


def readjust(command: Run, vae: AutoEncoder, here: Runtime, say: Say) -> None:
    """Re-estimate the VAE's BatchNorm statistics in place, at temperature 1."""
    from ebm_prior import parallel
    from ebm_prior.batches import seeded
    from nvae import batchnorm

    count, size = command.settings["bn_iterations"], command.settings["batch_size"]
    say(f"re-estimating the VAE's BatchNorm statistics from {count} x {size} of its samples")
    batchnorm.readjust(
        vae,
        temperature=1.0,
        iterations=count,
        batch_size=size,
        generator=seeded(here.device, command.options["seed"], here.rank, BN_KEY),
        progress=here.is_main,
    )
    parallel.broadcast_tensors(list(vae.buffers()))


def take_statistics(vae: AutoEncoder, statistics: dict[str, Tensor]) -> None:
    """Go on with the BatchNorm statistics that a run began with.

    Raises:
        ValueError: they are of another model.
    """
    try:
        left = vae.load_state_dict(statistics, strict=False).unexpected_keys
    except RuntimeError:
        left = ["other shapes"]
    if left:
        raise ValueError(
            f"last.pt holds BatchNorm statistics of another model ({left[0]}); give the"
            " --checkpoint that the run began with, or another --out"
        )


def check_disk(out: Path, parameters: int) -> None:
    """Room for `last.pt` twice (written beside the old one): weights, EMA, Adam; now and good."""
    needed = 2 * 4 * parameters * (2 * 4 + 1)
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise ValueError(
            f"--out {out}: the run needs about {needed / 2**20:.0f} MiB of disk,"
            f" {free / 2**20:.0f} MiB are free; make room or give another --out"
        )


def show(path: Path, pictures: Tensor, caption: str) -> np.ndarray:
    """Write a grid as PNG; its pixels are for TensorBoard."""
    from nvae import images

    return images.to_array(images.save_grid(path, pictures, caption=caption))


def write_arguments(command: Run) -> None:
    """`args.json`: the resolved command line, the package version and the commit."""
    from nvae import runtime
    from nvae.evaluate import provenance

    with runtime.written_whole(command.out / "args.json") as temporary:
        text = json.dumps({**command.to_json(), **provenance()}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def told(command: Run, summary: Summary) -> str:
    """What happened, what was written, what comes next."""
    out = command.out
    state = "Trained" if summary.done else "Stopped: trained"
    halved = f"; the learning rate was halved {summary.halvings} times" if summary.halvings else ""
    text = (
        f"{state} {summary.step} of {summary.steps} steps in {summary.seconds:.0f} s. Of the last"
        f" steps: mean f(u-) - f(u+) {summary.difference:+.3g} (near 0 is right), deviation of the"
        f" chains' u {summary.u_std:.3f} (the data's: {summary.data_std:.3f}){halved}. {out} holds"
        " prior.safetensors (the prior), last.pt (to go on from), config.json, args.json,"
        " metrics.jsonl, tensorboard/ and grids/."
    )
    if not summary.done:
        return f"{text} Go on with the same command and --resume auto."
    words = ["python", "-m", "ebm_prior", "sample", "--checkpoint", str(command.checkpoint)]
    words += ["--prior", str(out / "prior.safetensors"), "--num_samples", "64"]
    return f"{text} Next:\n  {shlex.join([*words, '--out', str(out / 'samples')])}"
