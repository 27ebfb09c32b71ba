"""Draw images from a trained energy-based prior (Algorithm 2)."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Generator, Tensor

    from ebm_prior.prior import EBMPrior
    from nvae.runtime import Runtime

HELP = "draw images from a trained prior"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
examples:
  64 images, as PNG files, npz and a grid:
    python -m ebm_prior sample --checkpoint checkpoint.pt --prior prior.safetensors --out samples

  50000 images for FID on two GPUs (the same images on one):
    torchrun --nproc_per_node 2 -m ebm_prior sample --checkpoint checkpoint.pt \\
        --prior prior.safetensors --num_samples 50000 --batch_size 100 --format npz --out samples

  how images come out of noise, one column per diffusion step:
    python -m ebm_prior sample --checkpoint checkpoint.pt --prior prior.safetensors \\
        --num_samples 8 --progressive --out samples"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="the NVAE checkpoint")
    parser.add_argument(
        "--prior", required=True, metavar="FILE", help="its prior, a prior.safetensors"
    )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write to")
    parser.add_argument(
        "--num_samples", type=int, metavar="N", default=64, help="images (%(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        help="of the map from u to the image; below 1: smoother images (%(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="the same seed and batch size give the same images in any number of processes"
        " (%(default)s)",
    )
    parser.add_argument(
        "--batch_size",
        type=int,
        default=16,
        help="images drawn at once; fewer need less memory (%(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=("npz", "png", "both"),
        default="both",
        help="npz: samples.npz, key samples, float32 (N, C, H, W) in [0, 1]; png: png/<i>.png",
    )
    parser.add_argument(
        "--grid",
        type=int,
        default=64,
        metavar="N",
        help="first N images as grid.png; 0: none (%(default)s)",
    )
    parser.add_argument(
        "--progressive",
        action="store_true",
        help="also progressive.png: the first batch, decoded after each diffusion step",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the settings as JSON and stop"
    )


@dataclass(frozen=True)
class Settings:
    """The command line."""

    checkpoint: str
    prior: str
    out: str
    num_samples: int
    temperature: float
    seed: int
    batch_size: int
    format: str
    grid: int
    progressive: bool
    device: str

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("batch_size", 1), ("grid", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"--temperature {self.temperature}: expected a positive number")
        for name in ("checkpoint", "prior"):
            if not Path(getattr(self, name)).is_file():
                raise ValueError(f"--{name} {getattr(self, name)}: no such file")
        self._check_out(Path(self.out))

    def _check_out(self, out: Path) -> None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"--out {out} is a file; expected a folder, or a name for a new one")
        there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
        if not os.access(there, os.W_OK):
            raise ValueError(f"--out {out} cannot be written: no permission in {there}")
        mine = {self.png(i).name for i in range(self.num_samples)}
        others = [p.name for p in (out / "png").glob("*.png") if p.name not in mine]
        if others and self.format != "npz":
            raise ValueError(
                f"--out {out} holds {len(others)} images of another run ({others[0]}), which would"
                " mix with these; give another --out"
            )

    def png(self, index: int) -> Path:
        return Path(self.out) / "png" / f"{index:0{max(5, len(str(self.num_samples - 1)))}}.png"


def run(args: argparse.Namespace) -> int:
    """Draw and write the images."""
    values = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    settings = Settings(**values)
    if args.dry_run:
        print(json.dumps(asdict(settings), indent=2))
        return 0

    import torch

    import ebm_prior
    from nvae import checkpoint, runtime

    # Chains enable gradients for themselves.
    with runtime.started(settings.device) as here, torch.no_grad():
        vae = checkpoint.load(settings.checkpoint, device=str(here.device))
        prior = ebm_prior.load(settings.prior, vae)
        draw_all(settings, prior, vae.config.image_shape, here)
    return 0


def draw_all(
    settings: Settings, prior: EBMPrior, image_shape: tuple[int, int, int], here: Runtime
) -> None:
    """All images, in blocks dealt out to the processes; a block has random numbers of its own."""
    import torch
    from tqdm import tqdm

    from ebm_prior import parallel
    from nvae import images, runtime

    started, out = time.perf_counter(), Path(settings.out)
    out.mkdir(parents=True, exist_ok=True)
    total, size = settings.num_samples, settings.batch_size
    table = Table(out, (total, *image_shape), here) if settings.format != "png" else None
    shown: dict[int, Tensor] = {}
    firsts = range(0, total, size)[here.rank :: here.world_size]
    for first in tqdm(firsts, "blocks", disable=not here.is_main):
        batch = draw(settings, prior, first, min(size, total - first))
        if table is not None:
            table.rows[first : first + len(batch)] = batch.numpy()
        if settings.format != "npz":
            for index, image in enumerate(batch, start=first):
                images.save_png(settings.png(index), image)
        if first < settings.grid:
            shown[first] = batch
    everywhere = {
        first: batch for part in parallel.collect(shown) for first, batch in part.items()
    }
    if not here.is_main:
        return
    if table is not None:
        table.pack()
    if everywhere:
        caption = f"EBM prior, temperature {settings.temperature:g}, seed {settings.seed}"
        batches = torch.cat([everywhere[first] for first in sorted(everywhere)])
        images.save_grid(out / "grid.png", batches[: settings.grid], caption=caption)
    with runtime.written_whole(out / "args.json") as temporary:
        temporary.write_text(json.dumps(protocol(settings), indent=2) + "\n", encoding="utf-8")
    print(f"{total} images in {out}, {time.perf_counter() - started:.1f} s")


def draw(settings: Settings, prior: EBMPrior, first: int, count: int) -> Tensor:
    """The block that starts at image `first`, (count, C, H, W) on the CPU.

    Raises:
        ValueError: NaN or infinite values.
    """
    from ebm_prior.seeds import seeded

    device = next(prior.energies.parameters()).device
    generator = seeded(device, settings.seed, first)
    states: list[Tensor] = []  # u_N .. u_0
    u = prior.sample_u(count, generator=generator, callback=lambda _, u: states.append(u))
    batch = prior.backbone.decode(u, settings.temperature, generator).float().cpu()
    if not batch.isfinite().all():
        raise ValueError(
            f"images {first} to {first + count - 1} hold NaN or infinite values; check checkpoint"
            " and prior with `ebm_prior doctor`, or try a temperature nearer to 1"
        )
    if settings.progressive and first == 0:
        progressive(settings, prior, states, seeded(device, settings.seed, first, 1))
    return batch


def progressive(
    settings: Settings, prior: EBMPrior, states: list[Tensor], generator: Generator
) -> None:
    """`progressive.png`: a row per image, a column per diffusion state, the noise first."""
    import torch

    from nvae import images

    decoded = [prior.backbone.decode(u, settings.temperature, generator).cpu() for u in states]
    levels = range(len(states) - 1, -1, -1)
    images.save_grid(
        Path(settings.out) / "progressive.png",
        torch.stack(decoded, dim=1).flatten(0, 1),
        columns=len(states),
        column_labels=[f"u_{k}" for k in levels],
        caption="From the Gaussian prior's noise to the EBM prior's u_0",
    )


class Table:
    """`samples.npz`, written in place by all processes: it need not fit into memory."""

    def __init__(self, out: Path, shape: tuple[int, ...], here: Runtime) -> None:
        import numpy as np

        from ebm_prior import parallel

        self.out, self.raw = out, out / ".samples.npy"
        needed, free = 2 * 4 * math.prod(shape), shutil.disk_usage(out).free
        if free < needed:
            raise ValueError(
                f"--out {out}: samples.npz needs {needed / 2**20:.0f} MiB of disk,"
                f" {free / 2**20:.0f} MiB are free; make room or give --format png"
            )
        if here.is_main:
            np.lib.format.open_memmap(self.raw, "w+", np.float32, shape).flush()
        parallel.wait()
        self.rows: np.ndarray = np.lib.format.open_memmap(self.raw, "r+")

    def pack(self) -> None:
        """Turn the finished rows into the npz that numpy reads."""
        from nvae import runtime

        with runtime.written_whole(self.out / "samples.npz") as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                archive.write(self.raw, "samples.npy")
        self.raw.unlink()


def protocol(settings: Settings) -> dict[str, Any]:
    """What the images were made of and with."""
    from ebm_prior import checkpoint
    from nvae.evaluation.job import provenance

    file = checkpoint.read(settings.prior)
    return {
        **asdict(settings),
        "backbone": file.fingerprint,
        "prior_step": file.step,
        "config": file.config.to_dict(),
        "bn_statistics": "the prior's" if file.bn_statistics else "the checkpoint's",
        **provenance(),
    }
