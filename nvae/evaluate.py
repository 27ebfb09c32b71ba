"""`python -m nvae.evaluate`: images from an NVAE checkpoint, with its own prior or an EBM prior.

Sampling is in float32 (upstream: float16 autocast, one cause of its NaN images). An image is, as
upstream, the mean of a Bernoulli decoder, or of the others a pixel sample at pixel temperature 1.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nvae import flags, runtime
from nvae.flags import Settings

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from nvae.model import AutoEncoder

READJUST_BATCH = 16  # upstream's, in mode `sample`
READJUST_BLOCK = 2**32 - 1  # batch-norm re-estimation draws as if it were this block


def generator_of(seed: int, block: int, device: Any = "cpu") -> Generator:
    """The random numbers of one block of samples; they depend on nothing else.

    Seeds belong to blocks and not to processes, so any number of processes draws the same images
    (to rounding, which the number of threads may change).
    """
    import numpy as np
    import torch

    (state,) = np.random.SeedSequence((seed, block)).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(state) % 2**63)


def draw(model: AutoEncoder, count: int, temperature: float, generator: Generator) -> Tensor:
    """Images (count, C, H, W) in [0, 1] on the CPU from the model's `sample`.

    Raises:
        ValueError: NaN or infinite values, and what to do about them.
    """
    import torch

    with torch.no_grad():
        logits = model.sample(count, temperature, generator=generator)
        output = model.decoder_output(logits)
        bernoulli = model.config.data.output == "bernoulli"
        images = output.mean() if bernoulli else output.sample(generator=generator)
    images = images.float().cpu()
    bad = (~torch.isfinite(images)).flatten(1).any(1)
    if bad.any():
        raise ValueError(
            f"{int(bad.sum())} of {count} images hold NaN or infinite values; the stored"
            " batch-norm statistics do not fit these samples: try --readjust_bn, or a temperature"
            " nearer to 1"
        )
    return images


def provenance() -> dict[str, str | None]:
    """Package version, and the commit if this file is under version control."""
    try:
        version: str | None = importlib.metadata.version("nvae-ebm-prior")
    except importlib.metadata.PackageNotFoundError:
        version = None

    def git(*command: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(Path(__file__).parent), *command],
                capture_output=True,
                text=True,
                timeout=10,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    tracked = git("ls-files", "--error-unmatch", Path(__file__).name)
    return {"version": version, "commit": git("rev-parse", "HEAD") if tracked else None}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with runtime.written_whole(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _prepared_folder(settings: Settings) -> Path:
    """The output folder, made and tried before any long work."""
    folder = Path(settings.save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "args.json", {**dataclasses.asdict(settings), **provenance()})
    except OSError as error:
        raise ValueError(f"--save {folder} cannot be written to: {error}") from None
    return folder


def _ready_model(settings: Settings, here: runtime.Runtime) -> tuple[AutoEncoder, str]:
    """The model as it samples: loaded, prior attached, batch norm re-estimated if asked."""
    from nvae import batchnorm, checkpoint

    model = checkpoint.load(settings.checkpoint, device=str(here.device))
    prior = "Gaussian prior"
    if settings.ebm_prior:
        importlib.import_module("ebm_prior.attach").attach(model, settings.ebm_prior)
        prior = f"EBM prior {Path(settings.ebm_prior).name}"
    if settings.readjust_bn:
        if settings.ebm_prior and here.is_main:
            print(
                "note: --readjust_bn replaces the batch-norm statistics that the prior was trained"
                " with; they belong to it, so its samples may get worse",
                file=sys.stderr,
            )
        batchnorm.readjust(
            model,
            iterations=settings.readjust_iterations,
            batch_size=READJUST_BATCH,
            temperature=settings.temp,
            generator=generator_of(settings.seed, READJUST_BLOCK, here.device),
            progress=here.is_main,
        )
    return model, prior


def sample(settings: Settings) -> None:
    """Mode `sample`: write `num_samples` images, in blocks that are dealt out to the processes."""
    # The processes exchange nothing, so they join no group: within one, batch norm would pool its
    # statistics over them, and the images would depend on how many there are.
    here = runtime.this_process(settings.device)
    folder = _prepared_folder(settings) if here.is_main else Path(settings.save)
    model, prior = _ready_model(settings, here)
    save = _writer(settings, folder, here, f"{model.config.dataset}, {prior}")

    from tqdm import tqdm

    blocks = range(-(-settings.num_samples // settings.block_size))
    bar = tqdm(blocks[here.rank :: here.world_size], desc="blocks", disable=not here.is_main)
    for index, block in enumerate(bar):
        started = time.perf_counter()
        first = block * settings.block_size
        count = min(settings.block_size, settings.num_samples - first)
        generator = generator_of(settings.seed, block, here.device)
        save(index, first, draw(model, count, settings.temp, generator))
        bar.set_postfix(seconds=f"{time.perf_counter() - started:.1f}")
    if here.is_main:
        print(f"{settings.num_samples} images in {folder}")


def _writer(
    settings: Settings, folder: Path, here: runtime.Runtime, title: str
) -> Callable[[int, int, Tensor], None]:
    """A function (index in this process, number of the first image, images) that writes files."""
    import numpy as np

    from nvae import images

    digits = max(5, len(str(settings.num_samples - 1)))

    def save(index: int, first: int, batch: Tensor) -> None:
        if settings.format in ("npz", "both"):
            # Upstream's name has the local rank; with several machines only the rank is unique.
            name = f"gpu_{here.rank}_samples_{index}.npz"
            with runtime.written_whole(folder / name) as temporary:
                np.savez(temporary, samples=batch.numpy())
        if settings.format in ("png", "both"):
            for number, image in enumerate(batch, start=first):
                images.save_png(folder / "png" / f"{number:0{digits}}.png", image)
        if first == 0 and settings.grid:
            caption = f"{title}\ntemperature {settings.temp:g}, seed {settings.seed}"
            images.save_grid(folder / "grid.png", batch[: settings.grid], caption=caption)

    return save


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    settings = flags.settings(argv)
    if settings.dry_run:
        print(json.dumps(dataclasses.asdict(settings), indent=2))
        return 0
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.world_size > 1 and "WORLD_SIZE" not in os.environ:
        # Upstream's flag starts the processes itself; torchrun does it for us.
        arguments = list(sys.argv[1:] if argv is None else argv)
        processes = ["--standalone", f"--nproc_per_node={settings.world_size}"]
        command = ["-m", "torch.distributed.run", *processes, "-m", "nvae.evaluate", *arguments]
        return subprocess.run([sys.executable, *command]).returncode
    if settings.world_size not in (1, started):
        raise ValueError(
            f"--world_size {settings.world_size}, but torchrun started {started} processes;"
            " leave the flag out"
        )
    sample(settings)
    return 0


if __name__ == "__main__":
    sys.exit(runtime.exit_status(main))
