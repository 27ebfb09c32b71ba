"""Draw images from a trained prior (Algorithm 2)."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from ebm_prior.commands.shared import arguments

HELP = "draw images from a trained prior"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
examples:
  64 images, as PNG files, npz and a grid:
    python -m ebm_prior sample --checkpoint checkpoint.pt --prior prior.safetensors --out samples

  50000 images for FID on two GPUs (the same images on one):
    torchrun --nproc_per_node 2 -m ebm_prior sample --checkpoint checkpoint.pt \\
        --prior prior.safetensors --num_samples 50000 --batch_size 100 --format npz --out samples

  how images come out of noise, one column per diffusion step (Figure 9), and the same latents at
  several temperatures (Figure 10):
    python -m ebm_prior sample --checkpoint checkpoint.pt --prior prior.safetensors \\
        --num_samples 8 --progressive --temperatures 0.4 0.7 1.0 --out samples

  images of one class, from a prior trained with labels:
    python -m ebm_prior sample --checkpoint checkpoint.pt --prior prior.safetensors \\
        --labels class=3 --out samples"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the VAE: NVAE's checkpoint, or an HVAE",
    )
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
        "--labels",
        nargs="+",
        default=[],
        metavar="NAME=CLASS",
        help="draw this class, a number, of a prior trained with labels; several attributes at"
        " once, those not named are free",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="factor of the labels' log probability (%(default)s)",
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
    parser.add_argument(
        "--temperatures",
        type=float,
        nargs="+",
        default=[],
        metavar="T",
        help="also temperatures.png: the first images' latents, decoded at each of these",
    )
    parser.add_argument(
        "--resume",
        choices=("auto",),
        help="go on where a killed run of the same command stopped; without one, begin",
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
    labels: list[str]
    guidance: float
    seed: int
    batch_size: int
    format: str
    grid: int
    progressive: bool
    temperatures: list[float]
    resume: str | None
    device: str

    def __post_init__(self) -> None:
        for name, least in (("num_samples", 1), ("batch_size", 1), ("grid", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} {getattr(self, name)}: expected at least {least}")
        for name, values in (
            ("temperature", [self.temperature]),
            ("temperatures", self.temperatures),
        ):
            for value in values:
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"--{name} {value}: expected a positive number")
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance {self.guidance}: expected a finite number")
        for name in ("checkpoint", "prior"):
            if not Path(getattr(self, name)).is_file():
                raise ValueError(f"--{name} {getattr(self, name)}: no such file")
        self._check_out(Path(self.out))

    def _check_out(self, out: Path) -> None:
        arguments.check_out(out)
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

    from ebm_prior import checkpoint
    from ebm_prior.backbones.files import open_backbone
    from ebm_prior.commands.sample import drawing
    from nvae import runtime

    # Told before the VAE is read; chains enable gradients for themselves.
    chosen = drawing.chosen_labels(settings.labels, checkpoint.read(settings.prior).config)
    with runtime.started(settings.device) as here, torch.no_grad():
        backbone = open_backbone(settings.checkpoint, device=str(here.device))
        prior = checkpoint.load(settings.prior, backbone)
        drawing.Drawing(settings, prior, chosen, here).all(backbone.config.image_shape)
    return 0
