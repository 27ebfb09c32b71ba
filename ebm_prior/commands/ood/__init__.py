"""Out-of-distribution detection by a prior's energies (paper, Fig. 3).

Scores held-out images of the model's own data set and foreign ones by E_>k, the energy of the
layers above k, for every k, and says how well the scores tell them apart and whether that gets
better with k."""

from __future__ import annotations

import argparse

from ebm_prior.commands.ood.sets import DEFAULT, OWN, SHIFTS, Source
from ebm_prior.commands.shared import arguments

HELP = "tell foreign images from the model's own by the prior's energies"
USAGE = "%(prog)s --checkpoint FILE --prior FILE --out FOLDER [options]"

EXAMPLES = """\
examples:
  the digits against shifted digits, every k, both schemes:
    python -m ebm_prior ood --checkpoint checkpoint.pt --prior prior.safetensors --out ood

  CIFAR-10 against SVHN and CIFAR-100, as in the paper, from files of your own:
    python -m ebm_prior ood --checkpoint checkpoint.pt --prior prior.safetensors --data cifar10 \\
        --ood svhn=test_32x32.mat cifar100=cifar-100-python --max_images 10000 --out ood

  a folder of pictures of any size, the inference scheme only, six values of k:
    python -m ebm_prior ood --checkpoint checkpoint.pt --prior prior.safetensors --data cifar10 \\
        --ood mine=pictures --scheme inference --k 0 5 10 15 20 25 --out ood"""

SCHEMES = ("inference", "diffusion")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    arguments.add_inputs(parser, prior=True)
    arguments.add_data(parser)
    parser.add_argument(
        "--ood",
        nargs="+",
        metavar="NAME[=PATH]",
        default=list(DEFAULT),
        help="foreign sets: NAME=PATH, a .mat of SVHN, an .npz with images or samples, a folder"
        " of pictures, or the folder of cifar100, cifar10 or another data set of the package; or"
        f" the model's own images {', '.join(SHIFTS)}"
        f" ({' '.join(DEFAULT)})",
    )
    parser.add_argument(
        "--scheme",
        nargs="+",
        choices=SCHEMES,
        default=list(SCHEMES),
        help="inference: scores the posterior's draw; diffusion: after the last kernel of the"
        " chain, with the layers up to k from the prior (both)",
    )
    parser.add_argument(
        "--k",
        nargs="+",
        default=["all"],
        help="E_>k sums all layers but the k lowest: numbers from 0, or all (all)",
    )
    parser.add_argument(
        "--draws",
        type=int,
        metavar="R",
        default=1,
        help="posterior draws per image, whose scores are averaged (%(default)s)",
    )
    parser.add_argument(
        "--perturb",
        action=argparse.BooleanOptionalAction,
        help="inference scheme: add the 1%% of noise that the energies saw in training (on; off"
        " for a joint prior, whose energies saw clean latents)",
    )
    parser.add_argument(
        "--perturb_state",
        type=int,
        choices=(0, 1),
        help="diffusion scheme: the state that the layers above k are perturbed to (1; 0 for a"
        " prior of one diffusion step, whose state 1 is all noise)",
    )
    arguments.add_running(parser, batch_size=100)


def run(args: argparse.Namespace) -> int:
    """Score, report, draw."""
    arguments.check_inputs(args)
    if args.draws < 1:
        raise ValueError(f"--draws {args.draws}: expected at least 1")
    ks = None if args.k == ["all"] else layers(args.k)
    sources = [Source.parse(text) for text in args.ood]
    names = [source.name for source in sources]
    if len({*names, OWN}) <= len(names):
        raise ValueError(f"--ood {' '.join(names)}: expected different names, and not {OWN}")
    if arguments.dry_run(args):
        return 0

    from ebm_prior.commands.ood.job import score_all

    score_all(args, ks, sources)
    return 0


def layers(words: list[str]) -> list[int]:
    """The numbers of `--k`."""
    if not all(word.isdecimal() for word in words):
        raise ValueError(f"--k {' '.join(words)}: expected all, or whole numbers from 0")
    return sorted({int(word) for word in words})
