"""The flags that commands have in common, and what can be checked of them without torch."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from ebm_prior.commands.shared import speed

NOT_SETTINGS = ("command", "run", "dry_run")
AT_LEAST = {"batch_size": 1, "seed": 0, "max_images": 1, "num_samples": 1}


def add_inputs(parser: argparse.ArgumentParser, *, prior: bool = True) -> None:
    """`--checkpoint`, `--prior` and `--out`."""
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="FILE",
        help="the VAE: NVAE's checkpoint.pt, or HVAE",
    )
    if prior:
        parser.add_argument(
            "--prior", required=True, metavar="FILE", help="its prior, a prior.safetensors"
        )
    parser.add_argument("--out", required=True, metavar="FOLDER", help="the folder to write to")


def add_data(parser: argparse.ArgumentParser) -> None:
    """`--data`, `--dataset` and `--max_images`."""
    parser.add_argument("--data", metavar="FOLDER", help="the VAE's data; digits need none")
    parser.add_argument(
        "--dataset", help="what --data holds: a data set, or folder (default: the checkpoint's)"
    )
    parser.add_argument(
        "--max_images", type=int, metavar="N", help="use at most N images, chosen by the seed"
    )


def add_running(
    parser: argparse.ArgumentParser,
    batch_size: int | None = 100,
    told: str = "%(default)s",
    *,
    chains: bool = True,
) -> None:
    """`--batch_size`, `--seed`, `--device`, `--dry_run`, and the flags of `speed`.

    Args:
        told: what the help says of the default batch size.
        chains: False leaves out the flags of `speed`.
    """
    parser.add_argument(
        "--batch_size",
        type=int,
        metavar="N",
        default=batch_size,
        help=f"images at once; fewer need less memory ({told})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (%(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (%(default)s)")
    parser.add_argument(
        "--dry_run", action="store_true", help="print the settings as JSON and stop"
    )
    if chains:
        speed.add_arguments(parser)


def check_inputs(args: argparse.Namespace) -> None:
    """Refuse what cannot work: missing files, a folder that cannot be written, small numbers.

    Raises:
        ValueError: one line that names the flag.
    """
    for name, least in AT_LEAST.items():
        value = getattr(args, name, None)
        if value is not None and value < least:
            raise ValueError(f"--{name} {value}: expected at least {least}")
    for name in ("checkpoint", "prior"):
        for path in _listed(getattr(args, name, None)):
            if not Path(path).is_file():
                raise ValueError(f"--{name} {path}: no such file")
    data = getattr(args, "data", None)
    if data is not None and not Path(data).is_dir():
        raise ValueError(f"--data {data}: no such folder")
    if getattr(args, "out", None) is not None:
        check_out(Path(args.out))
    if hasattr(args, "plain"):
        speed.check(args)


def check_out(out: Path) -> None:
    """Refuse an --out that is a file or lies where nothing can be written."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; expected a folder, or a name for a new one")
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: no permission in {there}")


def written_signs(dataset: str) -> bool:
    """Whether a data set shows written signs, which mean something else when flipped."""
    return dataset in ("digits", "mnist", "stacked_mnist", "omniglot")


def assignments(flag: str, words: Sequence[str]) -> list[tuple[str, str]]:
    """NAME=CLASS words, as of `--set`, in pairs.

    Raises:
        ValueError: another form, or a name twice.
    """
    pairs = []
    for text in words:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise ValueError(f"--{flag} {text}: expected NAME=CLASS, for example class=3")
        pairs.append((name, value))
    if len({name for name, _ in pairs}) < len(pairs):
        raise ValueError(f"--{flag}: an attribute is named twice")
    return pairs


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The command line as plain values."""
    return {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}


def dry_run(args: argparse.Namespace) -> bool:
    """Whether it is a dry run, in which case the settings have been printed."""
    if args.dry_run:
        print(json.dumps(settings(args), indent=2, default=str))
    return bool(args.dry_run)


def _listed(value: object) -> list[str]:
    if value is None:
        return []
    return [str(v) for v in value] if isinstance(value, list | tuple) else [str(value)]
