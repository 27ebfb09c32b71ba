"""The samplers on the test-bed whose energies are exact."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from ebm_prior import ou_mala
from ebm_prior.prior import EBMPrior
from ebm_prior.testbed import EightModes, Energies, energy_distance, oracle_prior

BOUND = 0.002  # energy distance up to which draws count as exact (contract, testbed.md, section 7)


def candidates(b2: Sequence[float]) -> dict[str, Callable[[], EBMPrior]]:
    """Name of a sampler -> the test-bed's prior with it."""

    def langevin(size: float) -> Callable[[], EBMPrior]:
        return lambda: oracle_prior(b2=size)

    def adapted() -> EBMPrior:
        prior = oracle_prior()
        prior.sampler = ou_mala.adapt(prior)
        return prior

    return {**{f"langevin, b2 = {size:g}": langevin(size) for size in b2}, "ou-mala": adapted}


def curve(prior: EBMPrior, num_steps: int, seeds: Sequence[int], draws: int) -> dict[str, Any]:
    """Energy distances of draws to as many exact ones, a seed each, and evaluations per draw."""
    energies, modes = prior.energies, prior.backbone
    assert isinstance(energies, Energies)
    assert isinstance(modes, EightModes)
    found = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        energies.calls = 0
        u = prior.sample_u(draws, generator=generator, num_steps=num_steps)
        found.append(energy_distance(u, modes.draw(draws, generator)))
    return {
        "num_steps": num_steps,
        "evaluations": energies.calls,
        "energy_distance": sum(found) / len(found),
        "per_seed": found,
    }


def measured(
    num_steps: Sequence[int], b2: Sequence[float], seeds: Sequence[int], draws: int
) -> dict[str, Any]:
    """The curve of every sampler; where it first reaches `BOUND`; how OU-MALA was adapted."""
    result: dict[str, Any] = {"bound": BOUND, "draws": draws, "seeds": list(seeds)}
    curves: dict[str, list[dict[str, Any]]] = {}
    makers = candidates(b2)
    with tqdm(total=len(makers) * len(num_steps), desc="test-bed", leave=False) as bar:
        for name, make in makers.items():
            prior, curves[name] = make(), []
            assert isinstance(prior.energies, Energies)
            pilot = prior.energies.calls  # before anything is drawn
            for k in sorted(num_steps):
                curves[name].append(curve(prior, k, seeds, draws))
                bar.update()
            if isinstance(prior.sampler, ou_mala.Adapted):
                result["adapted"] = {**prior.sampler.to_dict(), "pilot_evaluations": pilot}
    return {**result, "curves": curves, "fewest": {n: fewest(c) for n, c in curves.items()}}


def fewest(points: Sequence[dict[str, Any]], bound: float = BOUND) -> int | None:
    """The fewest evaluations whose mean distance is within the bound, of those tried."""
    reached = [p["evaluations"] for p in points if p["energy_distance"] <= bound]
    return min(reached, default=None)
