"""The commands of `python -m ebm_prior`: one module or package each, and what they share.

A command module has `HELP`, `add_arguments(parser)` and `run(args) -> status`, and imports torch
only inside `run`. Naming a command imports its module alone.
"""

from __future__ import annotations

import argparse
import pkgutil
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nvae.runtime import exit_status

SHARED = "shared"  # no command
COMMANDS = tuple(module.name for module in pkgutil.iter_modules(__path__) if module.name != SHARED)

DESCRIPTION = """\
Energy-based diffusion priors for hierarchical VAEs: train one on a frozen VAE (NVAE or HVAE), draw
images from it, and measure, steer and examine it."""

EXAMPLES = """\
a first run:
  python -m ebm_prior doctor --checkpoint checkpoint.pt --data data/cifar10
  python -m ebm_prior train --checkpoint checkpoint.pt --data data/cifar10 --preset cifar10 \\
      --out runs/cifar10
  python -m ebm_prior sample --checkpoint checkpoint.pt --prior runs/cifar10/prior.safetensors \\
      --num_samples 64 --out runs/cifar10/samples

`python -m ebm_prior <command> --help` tells more."""


def command(name: str) -> Any:
    """The module of a command."""
    return import_module(f"{__name__}.{name}")


def parser(names: Sequence[str] = COMMANDS) -> argparse.ArgumentParser:
    """The parser of these commands."""
    called = sys.argv[0].endswith("__main__.py")
    result = argparse.ArgumentParser(
        prog="python -m ebm_prior" if called else "ebm-prior",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = result.add_subparsers(dest="command", metavar="command", required=True)
    for name in names:
        module = command(name)
        added = commands.add_parser(
            name,
            help=module.HELP,
            usage=getattr(module, "USAGE", None),
            description=module.__doc__,
            epilog=getattr(module, "EXAMPLES", None),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(added)
        added.set_defaults(run=module.run)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    named = words[:1] if words[:1] and words[0] in COMMANDS else COMMANDS
    args = parser(named).parse_args(words)
    return exit_status(lambda: args.run(args))
