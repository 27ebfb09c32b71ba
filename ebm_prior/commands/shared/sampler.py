"""`--sampler` and `--num_steps`: which chain draws from a diffusion prior, and how long it is."""

from __future__ import annotations

import argparse
import textwrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ebm_prior.base import Prior

SAMPLERS = ("langevin", "ou-mala")
PILOT_CHAINS = 64
TOLD = (
    "langevin runs the short chain that the prior was trained with. ou-mala draws from the prior's"
    " density itself: it solves the Gaussian part exactly, takes long steps and accepts or refuses"
    " each: K + 1 network evaluations for K steps, and none at an index whose Gaussian part alone"
    " would nearly always be accepted. Its steps are found beforehand, in a pilot run of at most"
    " 64 chains. It is for diffusion priors trained with energy_scale none. Its images"
    " are not always better, since training fits the energies to Langevin's chain: `ebm_prior"
    " samplers` compares. On CUDA its steps are not captured as a graph, so that one takes longer"
    " than one of Langevin's."
)


def add_sampler(parser: argparse.ArgumentParser) -> None:
    """`--sampler` and `--num_steps`."""
    group = parser.add_argument_group("the chain", textwrap.fill(TOLD, 78))
    group.add_argument("--sampler", choices=SAMPLERS, default=SAMPLERS[0], help="(%(default)s)")
    group.add_argument(
        "--num_steps",
        type=int,
        metavar="K",
        help="steps at every diffusion index (default: the prior's)",
    )


def check_sampler(args: argparse.Namespace) -> None:
    """Refuse a chain without steps.

    Raises:
        ValueError: one line that names the flag.
    """
    if args.num_steps is not None and args.num_steps < 1:
        raise ValueError(f"--num_steps {args.num_steps}: expected at least 1")


def choose(
    prior: Prior, sampler: str, num_steps: int | None, chains: int, **labelled: Any
) -> dict[str, Any]:
    """Give a prior its sampler, the same in all processes; returns what its `sample_u` is given.

    Args:
        chains: of the pilot run, for memory's sake no more than are drawn at once; at most 64.
        labelled: further arguments of `ou_mala.adapt`.

    Raises:
        ValueError: a prior that the sampler is not for, or one without steps to choose.
    """
    from ebm_prior import ou_mala, parallel

    if sampler != SAMPLERS[0]:
        model = ou_mala.check(prior)
        found = ou_mala.adapt(model, chains=min(chains, PILOT_CHAINS), **labelled)
        model.sampler = parallel.collect(found)[0]
    if num_steps is None:
        return {}
    kind = prior.config.kind
    if kind != "diffusion":
        raise ValueError(f"--num_steps: this prior is of kind {kind}, expected diffusion")
    return {"num_steps": num_steps}


def described(prior: Prior) -> dict[str, Any]:
    """What a report says of the sampler; empty for Langevin's chain."""
    from ebm_prior.ou_mala import Adapted

    sampler = getattr(prior, "sampler", None)
    return {"chain": sampler.to_dict()} if isinstance(sampler, Adapted) else {}
