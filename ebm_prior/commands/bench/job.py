"""One shape after the other: build it, measure it, write what was found so far."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ebm_prior import checkpoint
from ebm_prior.backbones.files import open_backbone
from ebm_prior.base import frozen, plain_numbers
from ebm_prior.commands.bench import chosen, machine, roofline, shapes, shown, table, timing
from ebm_prior.commands.bench.one import Bench, Measuring
from ebm_prior.commands.shared.arguments import settings
from ebm_prior.prior import EBMPrior
from ebm_prior.seeds import seeded
from nvae import runtime
from nvae.evaluation.job import provenance, write_json

OWN = "own"  # the name of the user's own shape
EFFICIENCY = 0.2  # of a matrix product's rate, reached by a step in reference style; a rough guess


@dataclass
class Found:
    """What was found, by shape: the sections of `bench.json`."""

    shapes: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    traces: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    """Measure what the command line asks for; write after every shape."""
    with runtime.started(args.device) as here, torch.no_grad(), plain_numbers(here.device.type):
        if here.device.type == "cpu":
            torch.set_num_threads(args.threads)
        clock = timing.clock_of(here.device, args.threads)
        measured = roofline.measured(here.device, clock)
        how = _how(args, here.device, roofline.stated(here.device) or measured, clock)
        header = {
            "machine": machine.facts(here.device, args.threads, measured),
            "rates": how.rates.to_dict(),
            "clock": how.clock,
        }
        found = Found()
        with runtime.kept(args.out, here):
            for name in _names(args):
                _one(name, args, how, found)
                _write(Path(args.out), header, found, args)


def _how(
    args: argparse.Namespace, device: torch.device, rates: roofline.Rates, clock: str
) -> Measuring:
    default = 10 if device.type == "cuda" else 1  # a step on CUDA is short
    return Measuring(
        device,
        {precision: chosen(args, precision) for precision in args.precisions},
        args.repeats,
        args.num_steps or default,
        args.seed,
        rates,
        clock,
    )


def _names(args: argparse.Namespace) -> list[str]:
    own = [OWN] if args.checkpoint else []
    if args.shapes:
        return [*own, *args.shapes]
    cuda = runtime.pick_device(args.device).type == "cuda"
    return own or (["a", "b", "c", "q"] if cuda else ["c"])


def _one(name: str, args: argparse.Namespace, how: Measuring, found: Found) -> None:
    """Build and measure one shape; its weights are freed at the end."""
    device = how.device
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    if name == OWN:
        prior, title = _own(args, device), f"{args.checkpoint}"
        size = args.batch_size or (4 if memory is None else 16)
    else:
        shape = shapes.SHAPES[name]
        size = args.batch_size or shape.batch_size(memory)
        _tell(name, shape, size, how)
        prior, title = shapes.build(shape, args.seed, device), shape.title
    generator = seeded(device, args.seed)
    u_next = torch.randn(size, prior.layout.dim, generator=generator, device=device)
    with frozen(prior.energies):
        bench = Bench(how, name, prior, u_next)
        found.shapes[name], found.counts[name] = bench.measured()
        if args.trace:
            found.traces[name] = bench.traces()
    config, counted = prior.config, found.counts[name]
    found.settings[name] = {
        "title": title,
        "batch_size": size,
        "layers": prior.layout.num_layers,
        "dim": prior.layout.dim,
        "network": f"{config.network}, width {config.width}",
        "max_T": config.max_T,
        "num_steps": config.num_steps,
        "gflop_executed": counted["reference"]["gflop_per_image"],
        "gflop_needed": min(
            row["gflop_per_image"] for path, row in counted.items() if path.startswith("fast")
        ),
    }


def _own(args: argparse.Namespace, device: torch.device) -> EBMPrior:
    """The user's backbone with its prior, or with a fresh one.

    Raises:
        ValueError: a prior of another kind, which has no chain of this form.
    """
    backbone = open_backbone(args.checkpoint, device)
    if args.prior is None:
        return shapes.fresh(backbone, args.preset, args.seed)
    prior = checkpoint.load(args.prior, backbone).to(device)
    if not isinstance(prior, EBMPrior) or prior.config.kind != "diffusion":
        raise ValueError(
            f"--prior {args.prior} is of the kind {prior.config.kind}; bench compares the paths"
            " of diffusion priors"
        )
    return prior


def _tell(name: str, shape: shapes.Shape, size: int, how: Measuring) -> None:
    """Say how long it will take, where that is long."""
    step = shape.gflop * 1e9 * size / (EFFICIENCY * how.rates.float32)
    paths = 2 + len(how.steps)
    minutes = step * paths * ((how.repeats + 1) * how.num_steps + 5) / 60
    if minutes > 1:
        print(f"shape {name}: very roughly {minutes:.0f} minutes", file=sys.stderr)


def _write(out: Path, header: dict[str, Any], found: Found, args: argparse.Namespace) -> None:
    report = {
        "shapes": found.shapes,
        "counts": found.counts,
        "settings": found.settings,
        **header,
        "protocol": {"arguments": settings(args), **provenance()},
    }
    write_json(out / "bench.json", report)
    if found.traces:
        write_json(out / "trace_summary.json", {"machine": header["machine"], **found.traces})
    shown.draw(out / "bench.png", report)
    (out / "bench.md").write_text(table.markdown(report), encoding="utf-8")
