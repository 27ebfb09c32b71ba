"""The job of `ebm_prior train_hvae`: open the images, train, measure, say what was written."""

from __future__ import annotations

import json
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_prior.commands.train_hvae.flags import Run, train_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch
    from torch import Tensor

    from ebm_prior.backbones.hvae.training import HVAETrainer, Summary
    from nvae.data import ImageSet
    from nvae.runtime import Runtime


def train(command: Run, here: Runtime) -> int:
    """Check everything, train, measure what came out."""
    import torch

    from ebm_prior.backbones.hvae.model import HVAE
    from ebm_prior.backbones.hvae.training import HVAETrainer
    from ebm_prior.training import run_state
    from ebm_prior.training.batches import Batches, default_workers
    from nvae import data

    halves: dict[str, ImageSet] = {
        name: data.load(command.dataset, command.data, train=name == "train")
        for name in ("train", "held_out")
    }
    workers = command.workers
    if workers is None:
        workers = default_workers(halves["train"].in_memory)
    seed, size = command.settings["seed"], command.settings["batch_size"]
    batches = Batches(halves["train"], size, seed=seed, workers=workers, device=here.device)
    settings = train_settings(command, len(batches), precision(command.amp, here.device))
    state = run_state.read(command.out) if command.resume == "auto" else None
    torch.manual_seed(seed)  # initial weights come from PyTorch's own generator
    # Convolutions of this layout are faster, on CPUs too.
    model: HVAE = HVAE(command.network()).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.to(here.device)
    trainer = HVAETrainer(
        model,
        batches,
        settings,
        command.out,
        shown=next(blocks(halves["held_out"], settings.grid_size, settings.grid_size)),
        facts={"batch_size": size},
        show=show,
        bar=here.is_main,
    )
    if state is not None:
        trainer.resume(state)
    if here.is_main:
        write(command.out / "args.json", command.to_json())
        parameters = sum(p.numel() for p in model.parameters())
        begin = f"going on from step {trainer.step}" if trainer.step else "training"
        print(
            f"{begin}: {parameters / 1e6:.2f} M parameters, {settings.iterations} steps,"
            f" {len(batches)} per epoch, on {here.device}, amp {settings.amp}",
            file=sys.stderr,
        )
    summary = trainer.run()
    if here.is_main:
        found = {}
        if summary.done:
            found = report(command, trainer, halves, summary)
        print(told(command, summary, found))
    return 128 + summary.signal if summary.signal and not summary.done else 0


def precision(amp: str, device: torch.device) -> str:
    """`bf16` where the device has instructions for it, if `amp` is auto."""
    import torch

    if amp != "auto":
        return amp
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "off"
    able = device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if able else "off"


def blocks(images: ImageSet, count: int, size: int) -> Iterator[Tensor]:
    """The first `count` images, in batches."""
    import torch

    loaded = (images[i] for i in range(min(count, len(images))))
    while block := list(islice(loaded, size)):
        yield torch.stack(block)


def report(
    command: Run, trainer: HVAETrainer, halves: dict[str, ImageSet], summary: Summary
) -> dict[str, Any]:
    """Measure both halves with the saved weights, and write `report.json`."""
    from ebm_prior.backbones.hvae.objective import measure

    size, seed = command.settings["batch_size"], command.settings["seed"]
    with trainer.evaluated() as model:
        found = {
            name: measure(
                model, blocks(images, command.eval_images, size), seed, trainer.precision()
            )
            for name, images in halves.items()
        }
    content = {
        **found,
        "latents": [list(shape) for shape in model.config.latents],
        "seconds": round(summary.seconds, 1),
        "steps": summary.step,
        "protocol": {
            **command.to_json(),
            "precision": trainer.settings.amp,
            "skipped_updates": summary.skipped,
            "learning_rate_halvings": summary.halvings,
            "measured": "first images of each half, one posterior draw each, averaged weights;"
            " nats per image, layers top first; no free bits, KL weight 1",
        },
    }
    write(command.out / "report.json", content)
    return found


def show(path: Path, pictures: Tensor, caption: str, columns: int | None) -> np.ndarray:
    """Write a grid as PNG; its pixels are for TensorBoard."""
    from nvae import images

    return images.to_array(images.save_grid(path, pictures, columns, caption=caption))


def write(path: Path, content: dict[str, Any]) -> None:
    """JSON with the package version and the commit."""
    from nvae import runtime
    from nvae.evaluation.job import provenance

    with runtime.written_whole(path) as temporary:
        text = json.dumps({**content, **provenance()}, indent=2)
        temporary.write_text(text + "\n", encoding="utf-8")


def told(command: Run, summary: Summary, found: dict[str, Any]) -> str:
    """What happened, what was written, what comes next."""
    out = command.out
    if not summary.done:
        return (
            f"Stopped after {summary.step} of {summary.steps} steps, {summary.seconds:.0f} s;"
            f" {out} holds last.pt and hvae.safetensors. Go on with the same command and --resume"
            " auto."
        )
    numbers = "; ".join(
        f"{name.replace('_', ' ')}: {half['bits_per_dim']:.3f} bits per dimension, KL top first"
        f" {' / '.join(f'{value:.1f}' for value in half['kl_per_layer'])} nats"
        for name, half in found.items()
    )
    words = ["python", "-m", "ebm_prior", "train", "--checkpoint", str(out / "hvae.safetensors")]
    words += ["--preset", "hvae" if command.size == "full" else "hvae_small"]
    words += ["--data", str(command.data)] if command.data else []
    words += ["--out", f"{out}_prior"]
    return (
        f"Trained {summary.steps} steps in {summary.seconds:.0f} s, {summary.skipped} updates"
        f" skipped. {numbers}. {out} holds hvae.safetensors (the VAE), last.pt, report.json,"
        f" config.json, args.json, metrics.jsonl, tensorboard/ and grids/. Next:\n"
        f"  {shlex.join(words)}"
    )
