"""Draw images from a trained prior of any kind (the paper's by Algorithm 2)."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

from ebm_prior.commands.shared import arguments, speed
from ebm_prior.commands.shared.sampler import add_sampler, check_sampler

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
        --set class=3 --out samples

  a prior trained with energy_scale none, by the second sampler:
    python -m ebm_prior sample --checkpoint ebm_prior/assets/digits-nvae.pt \\
        --prior runs/demo/prior.safetensors --sampler ou-mala --num_steps 4 --out samples"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser)
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
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=CLASS",
        help="draw these classes, by name or number, of a prior trained with labels; attributes"
        " that are not named are free",
    )
    parser.add_argument(
        "--guidance",
        type=float,
        default=1.0,
        help="factor of the labels' log probability (%(default)s)",
    )
    parser.add_argument(
        "--label_steps",
        type=int,
        metavar="N",
        help="labels act at diffusion indices below this (default: the prior's)",
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
        choices=("auto", "never"),
        default="never",
        help="auto: go on where a killed run of the same command stopped; without one, begin"
        " (%(default)s)",
    )
    add_sampler(parser)
    arguments.add_running(parser, batch_size=16)


@dataclass(frozen=True)
class Settings:
    """The command line."""

    checkpoint: str
    prior: str
    out: str
    num_samples: int
    temperature: float
    set: list[str]
    guidance: float
    label_steps: int | None
    sampler: str
    num_steps: int | None
    seed: int
    batch_size: int
    format: str
    grid: int
    progressive: bool
    temperatures: list[float]
    resume: str
    device: str
    precision: str
    recompute: bool
    plain: bool

    def __post_init__(self) -> None:
        if self.grid < 0:
            raise ValueError(f"--grid {self.grid}: expected at least 0")
        for name, values in (
            ("temperature", [self.temperature]),
            ("temperatures", self.temperatures),
        ):
            for value in values:
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(f"--{name} {value}: expected a positive number")
        if not math.isfinite(self.guidance):
            raise ValueError(f"--guidance {self.guidance}: expected a finite number")
        if self.label_steps is not None and not self.set:
            raise ValueError("--label_steps without --set: name the classes to draw")
        arguments.assignments("set", self.set)
        self._check_pictures(Path(self.out))

    def _check_pictures(self, out: Path) -> None:
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
    arguments.check_inputs(args)
    check_sampler(args)
    values = {name: getattr(args, name) for name in Settings.__dataclass_fields__}
    settings = Settings(**values)
    if arguments.dry_run(args):
        return 0

    import torch

    from ebm_prior import checkpoint
    from ebm_prior.backbones.files import open_backbone
    from ebm_prior.commands.sample import drawing
    from nvae import runtime

    # Told before the VAE is read; chains enable gradients for themselves.
    config = checkpoint.read(settings.prior).config
    speed.check_kind(config.kind, args)
    chosen = drawing.chosen_labels(settings.set, config)
    with runtime.started(settings.device) as here, torch.no_grad():
        backbone = open_backbone(settings.checkpoint, device=str(here.device))
        steps = speed.steps_of(args, here.device, backbone)
        prior = speed.on_path(checkpoint.load(settings.prior, backbone), steps)
        drawing.Drawing(settings, prior, chosen, here, steps).all(backbone.config.image_shape)
    return 0
