"""Draw some layers anew and keep the others, group by group (paper, Fig. 2).

The top groups should change what is coarse and the bottom groups what is fine: the report holds,
per group, how much changes and which share of it survives down-sampling, and says whether that
share falls from each group to the next."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING, Any

from ebm_prior.commands.shared import arguments

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_prior.commands.shared.session import Job

HELP = "resample the latents of one group of layers at a time"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
examples:
  four groups of layers, eight variants of each of eight images:
    python -m ebm_prior hierarchy --checkpoint checkpoint.pt --prior prior.safetensors \\
        --out hierarchy

  a chain of the group alone, given the other layers:
    python -m ebm_prior hierarchy --checkpoint checkpoint.pt --prior prior.safetensors \\
        --mode conditional --out hierarchy

OUT gets panels.png (the first image, a row per group), shares.png and report.json."""

MODES, SPACES = ("swap", "conditional"), ("u", "z")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser)
    parser.add_argument(
        "--mode",
        choices=MODES,
        default="swap",
        help="swap: the group's u from another sample of the prior; conditional: from a chain of"
        " its own, the other layers clamped (%(default)s)",
    )
    parser.add_argument(
        "--space",
        choices=SPACES,
        default="u",
        help="of the swap. u: the z below follow the new ones; z: they stay as they are"
        " (%(default)s)",
    )
    parser.add_argument(
        "--groups",
        type=int,
        metavar="G",
        default=4,
        help="contiguous groups of layers, at most one per layer (%(default)s)",
    )
    parser.add_argument(
        "--num_variants", type=int, metavar="N", default=8, help="per image (%(default)s)"
    )
    parser.add_argument(
        "--num_references",
        type=int,
        metavar="N",
        default=64,
        help="images whose layers are kept; the numbers average over them (%(default)s)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="of the decoded latents (%(default)s)"
    )
    arguments.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, measure, write."""
    arguments.check_inputs(args)
    for name in ("groups", "num_variants", "num_references"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: expected at least 1")
    if not 0 < args.temperature < float("inf"):
        raise ValueError(f"--temperature {args.temperature}: expected a positive number")
    if args.mode == "conditional" and args.space == "z":
        raise ValueError("--space z is of --mode swap; a conditional chain runs in u")
    if arguments.dry_run(args):
        return 0

    from ebm_prior import checkpoint
    from ebm_prior.commands.shared.session import opened

    config = checkpoint.read(args.prior).config
    if args.mode == "conditional" and config.kind != "diffusion":
        raise ValueError(
            "--mode conditional needs the reverse chains of a diffusion prior, this one is of"
            f" kind {config.kind}; take --mode swap"
        )
    with opened(args) as job:
        resample(job)
    return 0


def resample(job: Job) -> None:
    """All panels, their numbers, the pictures and the report."""
    from ebm_prior import hierarchy

    args, layout = job.args, job.backbone.layout
    num, count = args.num_references, args.num_variants
    drawn = job.sample_u(num * (1 + count), "hierarchy").view(num, 1 + count, -1)
    # A row per variant; what is decoded in the same row has the same pixel noise.
    reference = drawn[:, :1].expand(-1, count, -1).flatten(0, 1).contiguous()
    variants = drawn[:, 1:].flatten(0, 1)

    def decoded(u: Tensor) -> Tensor:
        images = job.decode(u, args.temperature, "hierarchy")
        return images.view(num, count, *images.shape[1:])

    kept = decoded(reference)

    def seen(images: Tensor) -> list[hierarchy.Change]:
        return [hierarchy.change(*pair) for pair in zip(images, kept, strict=True)]

    groups = hierarchy.groups(layout, args.groups)
    named = [(hierarchy.name_of(layers), list(layers)) for layers in groups]
    sets = [decoded(panel(job, reference, variants, layers)) for layers in groups]
    whole = decoded(variants)
    if not job.here.is_main:
        return
    everything = hierarchy.mean_change(seen(whole))
    found = [seen(images) for images in sets]
    rows = [
        {"name": name, "layers": layers, **numbers(changes, everything)}
        for (name, layers), changes in zip(named, found, strict=True)
    ]
    for row, images in zip(rows, sets, strict=True):
        row["low_pass_share_by_block"] = by_block(images, kept)
    steps = [hierarchy.fall(*pair) for pair in itertools.pairwise(found)]
    verdict = {
        "low_pass_share_falls": hierarchy.falls(steps),
        "falls_by": [step._asdict() for step in steps],
    }
    show(job, rows, kept[0, 0], [images[0] for images in (*sets, whole)])
    protocol = {
        "low_pass_share": "mean squared change of block means over mean squared change of pixels,"
        " of variants against their reference, over all references",
        "block": hierarchy.low_pass_factor(*kept.shape[-2:]),
        "distances": "roots of the mean squares, images in [0, 1]",
        "changed": "mean squared change over that of an independent sample",
        "low_pass_share_falls": f"by {hierarchy.SIGNIFICANT:g} standard errors over references"
        " from each group to the next; null: too few references to tell",
        "decoder_noise": "the same in a variant and its reference",
    }
    whole_numbers = numbers(seen(whole), everything)
    job.report({"groups": rows, "all_layers": whole_numbers, **verdict}, protocol)
    tell(rows, verdict)


def panel(job: Job, reference: Tensor, variants: Tensor, layers: tuple[int, ...]) -> Tensor:
    """u with these layers drawn anew, (n, D) on the CPU."""
    from ebm_prior import hierarchy

    group = job.backbone.layout.mask(layers)
    if job.args.mode == "swap" and job.args.space == "u":
        return hierarchy.swap(reference, variants, group)
    prior: Any = job.prior
    device = job.here.device

    def make(first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        kept, new = reference[rows].to(device), variants[rows].to(device)
        if job.args.mode == "swap":
            return hierarchy.swap_z(prior.backbone, kept, new, layers)
        generator = job.generator("conditional", layers[0], first)
        return hierarchy.conditional(prior, kept, group.to(device), generator=generator)

    return job.blocks(len(reference), hierarchy.name_of(layers), make)


def numbers(changes: list[Any], everything: Any) -> dict[str, Any]:
    """What a report says of one panel; `changes` are those of the references."""
    from ebm_prior import hierarchy

    mean = hierarchy.mean_change(changes)
    return {
        "pixel_distance": mean.pixel**0.5,
        "low_pass_distance": mean.low_pass**0.5,
        "low_pass_share": mean.low_pass_share,
        "standard_error": hierarchy.standard_error(hierarchy.deviations(changes)),
        "changed": mean.pixel / everything.pixel if everything.pixel else 0.0,
    }


def by_block(images: Tensor, kept: Tensor) -> dict[str, float]:
    """The low-pass share for every power of two that fits: how the choice of one matters."""
    from ebm_prior import hierarchy

    side = min(images.shape[-2:])
    blocks = [2**i for i in range(1, side.bit_length()) if 2**i <= side]
    pair = images.flatten(0, 1), kept.flatten(0, 1)
    return {str(block): hierarchy.change(*pair, block).low_pass_share for block in blocks}


def show(job: Job, rows: list[dict[str, Any]], kept: Tensor, panels: list[Tensor]) -> None:
    """`panels.png` and `shares.png`."""
    import torch

    from ebm_prior.commands.shared import figures
    from nvae import images

    args = job.args
    how = "own chain, others clamped" if args.mode == "conditional" else f"swapped in {args.space}"
    labels = [f"{row['name']}\nlow-pass {row['low_pass_share']:.2f}" for row in rows]
    images.save_grid(
        job.out / "panels.png",
        torch.cat([torch.cat([kept[None], panel]) for panel in panels]),
        columns=1 + args.num_variants,
        row_labels=[*labels, "all layers"],
        column_labels=["kept", *(f"{j + 1}" for j in range(args.num_variants))],
        caption=f"New latents in one group of layers at a time, {how};"
        f" low-pass: share of the change in block means, over {args.num_references} images",
    )
    bars = {}
    for row in rows:
        share, error = row["low_pass_share"], row["standard_error"] or 0.0
        bars[row["name"]] = (share, share - error, share + error)
    figures.bars(
        job.out / "shares.png",
        bars,
        ylabel="low-pass share of the change, with standard error",
        title=f"How coarse is what a group of layers changes? Top first; {how}",
    )


def tell(rows: list[dict[str, Any]], verdict: dict[str, Any]) -> None:
    """The numbers in a few lines."""
    for row in rows:
        print(
            f"{row['name']:>14}: low-pass share {row['low_pass_share']:.3f}, pixel distance"
            f" {row['pixel_distance']:.4f}, {row['changed']:.0%} of a new sample's change"
        )
    words = {
        True: "falls from group to group",
        False: "does not fall from group to group",
        None: "does not change by 3 standard errors; more --num_references would tell",
    }
    by = ", ".join(
        f"{step['by']:+.3f} +- {step['standard_error'] or float('nan'):.3f}"
        for step in verdict["falls_by"]
    )
    print(f"the low-pass share {words[verdict['low_pass_share_falls']]} (falls by {by})")
