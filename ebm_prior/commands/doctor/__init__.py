"""What fits together, what is wrong, and what to do about it.

With a VAE and its prior: whether the prior's chains do what they claim. With `--hole`: how far
the VAE's aggregate posterior is from its prior, before any training."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ebm_prior.commands.doctor.checks import OK, PROBLEM, WARNING, Check, Checks, guarded, shown
from ebm_prior.commands.shared import arguments, speed

if TYPE_CHECKING:
    from ebm_prior.backbones.files import Opened

HELP = "read a checkpoint, a prior, a data folder and the machine; say what fits, and the hole"
EXAMPLES = """\
examples:
  python -m ebm_prior doctor --checkpoint checkpoint.pt --data data/cifar10 --hole
  python -m ebm_prior doctor --checkpoint checkpoint.pt --prior prior.safetensors --out doctor"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("--checkpoint", metavar="FILE", help="a VAE: NVAE's checkpoint, or HVAE")
    parser.add_argument(
        "--prior", metavar="FILE", help="a prior, compared with --checkpoint if that is given"
    )
    arguments.add_data(parser)
    parser.add_argument(
        "--out", metavar="FOLDER", help="write report.json and figures there (default: nothing)"
    )
    chains = parser.add_argument_group("chains of a prior")
    chains.add_argument(
        "--chains",
        type=int,
        metavar="N",
        help="parallel chains; 0: leave them out (default: 64 if that takes no more than minutes)",
    )
    chains.add_argument(
        "--num_steps", type=int, metavar="K", help="Langevin steps per t (default: the prior's)"
    )
    hole = parser.add_argument_group("hole between posterior and prior")
    hole.add_argument(
        "--hole",
        action="store_true",
        help="measure it on --data with small discriminators: all layers, then each alone",
    )
    hole.add_argument(
        "--hole_steps",
        type=int,
        default=300,
        metavar="N",
        help="training steps of each discriminator (%(default)s)",
    )
    arguments.add_running(parser)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if there is a problem."""
    _check(args)
    speed.check(args)
    if arguments.dry_run(args):
        return 0
    results: dict[str, Any] = {}
    found = list(shown(examine(args, results)))
    count = {verdict: sum(c.verdict == verdict for c in found) for verdict in (PROBLEM, WARNING)}
    print(f"\n{count[PROBLEM]} problem(s), {count[WARNING]} warning(s)")
    if args.out:
        _write(args, {"checks": [check._asdict() for check in found], **results})
    return 1 if count[PROBLEM] else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before anything is read; files that are bad are findings."""
    if args.hole and not args.checkpoint:
        raise ValueError("--hole needs --checkpoint: the VAE whose posterior is looked at")
    if args.chains is not None and (args.chains < 0 or args.chains == 1):
        raise ValueError(f"--chains {args.chains}: expected 0, or at least 2 to compare")
    for name, least in (("num_steps", 1), ("hole_steps", 1), *arguments.AT_LEAST.items()):
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}")
    if args.out:
        arguments.check_out(Path(args.out))


def examine(args: argparse.Namespace, results: dict[str, Any]) -> Checks:
    """All checks that the arguments ask for; the machine is always looked at.

    Args:
        results: what is measured is put here, as `report.json` has it.
    """
    from ebm_prior.commands.doctor import checks

    yield from guarded("machine", checks.machine)
    backbone: Opened | None = None
    if args.checkpoint:
        from ebm_prior.backbones.files import open_backbone
        from nvae import runtime

        try:
            backbone = opened = open_backbone(args.checkpoint, runtime.pick_device(args.device))
        except ValueError as error:
            yield Check(PROBLEM, "checkpoint", str(error))
        else:
            yield from guarded("checkpoint", lambda: checks.of_checkpoint(opened))
    if args.prior:
        yield from guarded("prior", lambda: checks.of_prior(args.prior, backbone))
        if backbone is not None and args.chains != 0:
            yield from guarded("chains", lambda: _of_chains(args, backbone, results))
        elif not args.checkpoint and args.chains != 0:
            yield Check(OK, "chains", "give --checkpoint to run them")
    if args.data:
        yield from guarded("data", lambda: checks.of_data(args.data, args.dataset, backbone))
    if args.hole and backbone is not None:
        from ebm_prior.commands.doctor import hole

        yield from guarded("hole", lambda: hole.measured(args, backbone, results))


def _of_chains(args: argparse.Namespace, backbone: Opened, results: dict[str, Any]) -> Checks:
    from ebm_prior import checkpoint
    from ebm_prior.commands.doctor import chains

    with contextlib.suppress(ValueError):  # told already, under `prior`
        prior = checkpoint.load(args.prior, backbone)
        prior = speed.on_path(prior, speed.steps_of(args, backbone.device, backbone))
        yield from guarded("chains", lambda: chains.examined(args, prior, results))


def _write(args: argparse.Namespace, content: dict[str, Any]) -> None:
    """`report.json`, and a figure of what was measured."""
    from ebm_prior.commands.doctor import figures
    from nvae.evaluation.job import provenance, write_json

    out = Path(args.out)
    protocol = {"settings": arguments.settings(args), **provenance()}
    write_json(out / "report.json", {**content, "protocol": protocol})
    figures.draw(out, content)


__all__ = ["EXAMPLES", "HELP", "OK", "add_arguments", "examine", "run"]
