"""The job of `ebm_prior train`: open everything, check it, train, say what was written."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_prior.commands.shared import speed
from ebm_prior.commands.train.flags import Run, prior_config, train_settings
from ebm_prior.presets import PRESETS

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from ebm_prior.backbones.files import Opened
    from ebm_prior.commands.shared.labels import Labels
    from ebm_prior.config import PriorConfig
    from ebm_prior.trainer import Summary, Trainer
    from ebm_prior.training.batches import Batches
    from nvae.data import ImageSet
    from nvae.runtime import Runtime

LARGE = 10_000  # latent values from which a CPU is not enough
#: What a run may leave, as its last line tells it.
FILES = {
    "prior.safetensors": "prior.safetensors (the prior)",
    "last.pt": "last.pt (to go on from)",
    **{name: name for name in ("config.json", "args.json", "report.json", "metrics.jsonl")},
    **{name: f"{name}/" for name in ("tensorboard", "grids")},
}
BN_KEY = 2**31 + 1  # the random numbers of BatchNorm re-estimation


def train(command: Run, here: Runtime) -> int:
    """Check everything, then train or fit, and say what was written."""
    from ebm_prior.backbones.files import open_backbone
    from ebm_prior.training import apex

    if command.options["optimizer"] == "apex_adam":
        apex.check(here.device)
    say = Say(here)
    backbone = open_backbone(command.checkpoint, here.device)
    images = open_data(command, backbone, say)
    if command.prior == "fitted":
        from ebm_prior.commands.train import fitting

        return fitting.fit(command, backbone, images, here, say)
    labels = open_labels(command, images)
    batches = make_batches(command, images, labels, here)
    trainer = make_trainer(command, backbone, batches, labels, here, say)
    if here.is_main:
        write_arguments(command)
    steps, step = trainer.settings.iterations, trainer.step
    begin = f"going on from step {step}" if step else "training"
    say(f"{begin}: {steps} steps, {len(batches)} per epoch, on {here.device}")
    if here.device.type == "cpu" and trainer.prior.layout.dim > LARGE:
        say(
            f"note: {trainer.prior.layout.dim:,} latent values on a CPU: a step can take minutes,"
            " the published settings are for GPUs; --num_steps 2 --width 8 make a trial of it"
        )
    summary = trainer.run()
    if here.is_main:
        if summary.done:
            report(command, {k: v for k, v in asdict(summary).items() if k != "signal"})
        print(told(command, summary))
    return 128 + summary.signal if summary.signal and not summary.done else 0


class Say:
    """A line on stderr, from the first process only."""

    def __init__(self, here: Runtime) -> None:
        self.here = here

    def __call__(self, text: str) -> None:
        if self.here.is_main:
            print(text, file=sys.stderr)


def open_data(command: Run, backbone: Opened, say: Say) -> ImageSet:
    """The training images, checked against the model.

    Raises:
        ValueError: they are missing, or do not fit.
    """
    from nvae import data

    made_for = backbone.config.dataset
    name = command.dataset or made_for
    if command.data is None and name != "digits":
        raise ValueError(f"give --data, the folder that holds the images of {name}")
    wanted = PRESETS[command.preset]["data"]
    if wanted != made_for:
        fitting = [preset for preset, row in PRESETS.items() if row["data"] == made_for]
        advice = f"; --preset {fitting[0]} is for these" if fitting else ""
        say(f"note: preset {command.preset} is for {wanted}, the VAE is one of {made_for}{advice}")
    # Never flipped: the prior is to learn the latents of the images as they are.
    images = data.load(name, command.data, train=True, augment=False, config=backbone.config)
    first = images[0]
    if tuple(first.shape) != tuple(backbone.config.image_shape):
        raise ValueError(
            f"images of {name} have shape {tuple(first.shape)}, the VAE takes"
            f" {tuple(backbone.config.image_shape)}; give the data it was trained on, or --dataset"
            " folder"
        )
    return images


def open_labels(command: Run, images: ImageSet) -> list[Labels]:
    """The labels of the attributes, in their order."""
    if not command.attributes:
        return []
    from ebm_prior.commands.shared import labels

    names, folder = [name for name, _ in command.attributes], command.labels
    dataset = command.dataset or ("digits" if command.data is None else "the data set")
    return labels.load(names, dataset, images.labels, len(images), train=True, folder=folder)


def make_batches(command: Run, images: ImageSet, labels: list[Labels], here: Runtime) -> Batches:
    """The training images in batches, with labels if there are any."""
    import torch

    from ebm_prior.training.batches import Batches, Labelled, default_workers

    dataset: Any = images
    if labels:
        dataset = Labelled(images, torch.stack([each.values for each in labels], dim=1))
    workers = command.workers
    if workers is None:
        workers = default_workers(images.in_memory)
    seed, size = command.options["seed"], command.settings["batch_size"]
    return Batches(dataset, size, seed=seed, workers=workers, device=here.device)


def configured(command: Run, backbone: Opened, labels: list[Labels]) -> PriorConfig:
    """The configuration with what only backbone and labels know: attributes and contexts."""
    more: dict[str, Any] = {}
    if labels:
        from ebm_prior.coupling import Attribute

        more["attributes"] = tuple(
            Attribute(name, len(each.classes), layers)
            for (name, layers), each in zip(command.attributes, labels, strict=True)
        )
    if command.prior == "ncp" and command.settings["context"]:
        from ebm_prior.ncp import context_shapes

        more["contexts"] = context_shapes(backbone)
    return prior_config(command, backbone.layout.shapes, **more)


def make_trainer(
    command: Run,
    backbone: Opened,
    batches: Batches,
    labels: list[Labels],
    here: Runtime,
    say: Say,
) -> Trainer:
    """The trainer, at its beginning or where the run in OUT stopped."""
    import torch

    from ebm_prior import kinds
    from ebm_prior.trainer import Trainer
    from ebm_prior.training import run_state

    state = run_state.read(command.out) if command.resume == "auto" else None
    settings = train_settings(command, len(batches))
    config = configured(command, backbone, labels)
    torch.manual_seed(settings.seed)  # initial weights come from PyTorch's own generator
    prior = kinds.build(backbone, config)
    check_disk(command.out, sum(p.numel() for p in prior.learned.parameters()))

    statistics = None
    if command.settings["bn_readjust"]:
        statistics = bn_statistics(command, backbone, state, here, say)
        use: Any = backbone
        prior = prior.on(use.with_bn_statistics(statistics))
    steps = speed.steps_of(command, here.device, backbone)
    precision = speed.precision_of(steps)
    trainer = Trainer(
        speed.on_path(prior.to(here.device), steps),
        batches,
        settings,
        command.out,
        bn_statistics=statistics,
        facts={
            "dataset": command.dataset or backbone.config.dataset,
            "batch_size": command.settings["batch_size"],
            "bn_readjust": command.settings["bn_readjust"],
            # As it always was without saying so: runs begun before this was asked go on.
            **({"precision": precision} if precision != "float32" else {}),
            **({"labels": digest(labels)} if labels else {}),
        },
        show=show,
        bar=here.is_main,
    )
    if state is not None:
        trainer.resume(state)
    return trainer


def digest(labels: list[Labels]) -> str:
    """A name for what the images are labelled with."""
    found = hashlib.sha256()
    for each in labels:
        found.update(each.name.encode() + each.values.numpy().tobytes())
    return found.hexdigest()[:16]


def bn_statistics(
    command: Run, backbone: Opened, state: dict[str, Any] | None, here: Runtime, say: Say
) -> dict[str, Tensor]:
    """The VAE's BatchNorm statistics re-estimated, or those that the run began with.

    Raises:
        ValueError: a VAE that has none.
    """
    from ebm_prior import parallel
    from ebm_prior.seeds import seeded

    readjust = getattr(backbone, "readjust_bn", None)
    if readjust is None:
        raise ValueError(
            "this VAE has no BatchNorm statistics to re-estimate; give --no-bn_readjust, or a"
            " preset without it"
        )
    if state is not None:
        return state["bn_statistics"]
    count, size = command.settings["bn_iterations"], command.settings["batch_size"]
    say(f"re-estimating the VAE's BatchNorm statistics from {count} x {size} of its samples")
    statistics = readjust(
        iterations=count,
        batch_size=size,
        generator=seeded(here.device, command.options["seed"], here.rank, BN_KEY),
        progress=here.is_main,
    )
    parallel.broadcast_tensors(list(statistics.values()))
    return statistics


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
    from nvae.evaluation.job import provenance

    with runtime.written_whole(command.out / "args.json") as temporary:
        text = json.dumps({**command.to_json(), **provenance()}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def report(command: Run, content: dict[str, Any]) -> None:
    """`report.json`: how it went, the prior's sha256, and the resolved command line."""
    from nvae.digest import sha256
    from nvae.evaluation.job import provenance, write_json

    whole = {**content, "prior_sha256": sha256(command.out / "prior.safetensors")}
    protocol = {**command.to_json(), **provenance()}
    write_json(command.out / "report.json", {**whole, "protocol": protocol})


def told(command: Run, summary: Summary) -> str:
    """What happened, what was written, what comes next."""
    out = command.out
    state = "Trained" if summary.done else "Stopped: trained"
    halved = f"; the learning rate was halved {summary.halvings} times" if summary.halvings else ""
    classes = ""
    if summary.accuracy is not None:
        classes = f"; {summary.accuracy:.0%} of the labels at t = 0 are right"
    right = "a classifier's: it falls" if command.prior == "ncp" else "near 0 is right"
    text = (
        f"{state} {summary.step} of {summary.steps} steps in {summary.seconds:.0f} s. Of the last"
        f" steps: mean f(u-) - f(u+) {summary.difference:+.3g} ({right}), deviation of the"
        f" chains' u {summary.u_std:.3f} (the data's: {summary.data_std:.3f}){classes}{halved}."
        f" {out} holds {', '.join(told for name, told in FILES.items() if (out / name).exists())}."
    )
    if not summary.done:
        return f"{text} Go on with the same command and --resume auto."
    words = ["python", "-m", "ebm_prior", "sample", "--checkpoint", str(command.checkpoint)]
    words += ["--prior", str(out / "prior.safetensors"), "--num_samples", "64"]
    return f"{text} Next:\n  {shlex.join([*words, '--out', str(out / 'samples')])}"
