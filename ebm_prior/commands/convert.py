"""`ebm_prior convert`: the authors' energy networks as a prior's file."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ebm_prior import presets

HELP = "import the authors' netE{i} files as prior.safetensors"
GIVEN = ("max_T", "num_steps", "b2", "bn_readjust")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument(
        "--authors", required=True, help="the authors' file: a dictionary of netE0, opt0, ..."
    )
    parser.add_argument(
        "--checkpoint", required=True, help="the NVAE checkpoint that it was trained on"
    )
    parser.add_argument(
        "--out", required=True, help="file to write, a prior.safetensors; an old one is kept"
    )
    parser.add_argument(
        "--preset",
        required=True,
        choices=presets.PRESETS,
        help="settings that the authors' file does not hold; the next flags replace some",
    )
    parser.add_argument("--max_T", type=int, help="diffusion steps (the paper's T)")
    parser.add_argument("--num_steps", type=int, help="Langevin steps K of a diffusion step")
    parser.add_argument("--b2", type=float, help="the number behind the Langevin step size")
    parser.add_argument(
        "--bn_readjust",
        action=argparse.BooleanOptionalAction,
        help="re-estimate the backbone's BatchNorm statistics and store them with the prior: the"
        " authors did, and did not keep theirs (default: the preset's)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="seed of the re-estimation (%(default)s)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the resolved settings and exit"
    )


def run(args: argparse.Namespace) -> int:
    """Read, check against the backbone, write."""
    settings = presets.resolved(args.preset, {name: getattr(args, name) for name in GIVEN})
    if Path(args.out).exists():
        raise ValueError(f"--out {args.out} is there already; give another --out, or remove it")
    if args.dry_run:
        print(json.dumps({**vars(args), **settings}, indent=2, default=str))
        return 0

    import torch

    from ebm_prior import authors, checkpoint
    from ebm_prior.backbones.files import open_backbone
    from nvae import runtime

    backbone = open_backbone(args.checkpoint, runtime.pick_device(args.device))
    # Width, kind and spectral norm are read off the file itself.
    fixed = {"shapes", "network", "width", "spectral_norm"}
    prior = authors.import_authors(
        args.authors,
        backbone,
        {name: settings[name] for name in presets.PRIOR_SETTINGS if name not in fixed}
        | {"preset": args.preset},
    )
    statistics = None
    readjust = getattr(backbone, "readjust_bn", None)
    if settings["bn_readjust"] and readjust is not None:
        statistics = readjust(
            iterations=settings["bn_iterations"],
            batch_size=settings["batch_size"],
            generator=torch.Generator().manual_seed(args.seed),
            progress=True,
        )
    checkpoint.save(args.out, prior, bn_statistics=statistics)
    config = prior.config
    print(
        f"{args.out}: {prior.layout.num_layers} {config.network} networks of width {config.width},"
        f" spectral norm {'on' if config.spectral_norm else 'off'}, max_T {config.max_T},"
        f" {config.num_steps} steps, b2 {config.b2:g}, BatchNorm statistics"
        f" {'re-estimated' if statistics else 'of the checkpoint'}"
    )
    return 0
