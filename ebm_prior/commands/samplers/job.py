"""The comparison itself: the test-bed, a trained prior if there is one, report and picture."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ebm_prior.commands.samplers import oracle
from ebm_prior.commands.shared import figures, rows, sampler
from ebm_prior.commands.shared.arguments import settings
from ebm_prior.commands.shared.kept import Kept
from ebm_prior.commands.shared.measure import Ruler
from ebm_prior.commands.shared.rows import Row, drawn_by
from ebm_prior.commands.shared.session import Job, opened
from ebm_prior.ou_mala import Adapted, check
from ebm_prior.prior import EBMPrior
from nvae import runtime
from nvae.digest import sha256
from nvae.evaluation.job import provenance, write_json

BED = "eight modes, exact energies"


def compare(args: argparse.Namespace) -> None:
    """Measure both samplers; write `report.json` and `samplers.png`, print the tables."""
    started, out = time.perf_counter(), Path(args.out)
    if args.prior is None:
        with runtime.started("cpu") as here, runtime.kept(out, here), torch.no_grad():
            if not here.is_main:
                return
            bed = on_testbed(args)
            facts = {
                "settings": settings(args),
                "seconds": round(time.perf_counter() - started, 1),
                "versions": {"torch": torch.__version__, "python": platform.python_version()},
                **provenance(),
            }
            write_json(out / "report.json", {"testbed": bed, "protocol": facts})
            picture(out, bed, None)
        return
    with opened(args) as job:
        assert job.prior is not None
        check(job.prior)  # before the test-bed's minutes
        images = of_images(job)
        if not job.here.is_main:
            return
        bed = on_testbed(args)
        job.report({"testbed": bed, "images": images})
        picture(out, bed, images)


def on_testbed(args: argparse.Namespace) -> dict[str, Any]:
    """The test-bed's curves, told."""
    bed = oracle.measured(args.num_steps, args.b2, args.seeds, args.draws)
    print(f"{BED}: energy distance, mean of {len(args.seeds)} seeds, (evaluations)")
    print(table(bed["curves"], "energy_distance"))
    print(told(bed))
    pilot = bed["adapted"]["pilot_evaluations"]
    print(
        f"Not counted: {pilot} evaluations of the pilot run that finds ou-mala's steps, once. The"
        " distance is unbiased, so it can be negative; ou-mala asks no network at an index whose"
        " Gaussian part alone would do."
    )
    return bed


def told(bed: Mapping[str, Any]) -> str:
    """The fewest evaluations in words."""
    found = {name: number for name, number in bed["fewest"].items() if number is not None}
    ours = found.pop("ou-mala", None)
    first = f"at most {bed['bound']} in the mean: "
    if ours is None or not found:
        reached = [f"{name} with {n}" for name, n in found.items()]
        if ours is not None:
            reached.append(f"ou-mala with {ours}")
        return first + (", ".join(reached) or "none of those tried")
    best = min(found, key=lambda name: found[name])
    return (
        f"{first}ou-mala with {ours} evaluations, {best} with {found[best]}"
        f" (ratio {ours / found[best]:.2f}), the fewest of Langevin's step sizes"
    )


def of_images(job: Job) -> dict[str, Any]:
    """The ruler's distance for every number of steps and both samplers."""
    args = job.args
    assert isinstance(job.prior, EBMPrior)
    ruler = Ruler.of(job, inception=args.inception, features=args.features, fid_dir=args.fid_dir)
    kept = Kept(job.out, job.here, read=args.resume == "auto")
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in sampler.SAMPLERS:
        prior = job.prior.on(job.prior.backbone)  # the networks shared, the sampler its own
        sampler.choose(prior, name, None, job.batch_size)
        for k in sorted(args.num_steps):
            found = _point(job, prior, name, k, ruler, kept)
            if found is not None:
                curves.setdefault(name, []).append(found)
    result: dict[str, Any] = {"curves": curves, "distance": ruler.name, "title": ruler.title}
    result |= {"ruler": ruler.protocol, "adapted": sampler.described(prior)["chain"]}
    if job.here.is_main:
        print(f"{job.dataset}: {ruler.title}, mean of {len(args.seeds)} seeds, (evaluations)")
        print(table(curves, ruler.name) + "\n")
    return result


def _point(
    job: Job, prior: EBMPrior, name: str, k: int, ruler: Ruler, kept: Kept
) -> dict[str, Any] | None:
    """One sampler with K steps, drawn with every seed; on the first process."""
    args, chain = job.args, prior.sampler
    facts: dict[str, Any] = {"prior": str(args.prior), "sha256": sha256(args.prior)}
    facts |= {"num_steps": k, "sampler": name}
    facts |= sampler.described(prior)
    draw = drawn_by(prior, num_steps=k)
    row = Row(f"{name}-{k}", f"{name}, K = {k}", draw, prior.backbone, "ebm", facts=facts)
    runs = [
        rows.measured(replace(job, seed=seed), row, ruler, args.num_samples, kept)
        for seed in args.seeds
    ]
    if not job.here.is_main:
        return None
    one = chain.evaluations(k) if isinstance(chain, Adapted) else prior.config.max_T * k
    every = rows.summary(row, args.seeds, [run for run in runs if run is not None])
    return {"num_steps": k, "evaluations": one, **every}


def table(curves: Mapping[str, list[dict[str, Any]]], name: str) -> str:
    """A line per number of steps, a column per sampler: the distance and the evaluations."""
    steps = sorted({point["num_steps"] for points in curves.values() for point in points})
    lines = [["K", *curves]]
    for k in steps:
        cells = []
        for points in curves.values():
            (point,) = (p for p in points if p["num_steps"] == k)
            cells.append(f"{point[name]:.4g} ({point['evaluations']})")
        lines.append([str(k), *cells])
    return rows.aligned(lines)


def picture(out: Path, bed: Mapping[str, Any], images: Mapping[str, Any] | None) -> None:
    """`samplers.png`: a panel each for the test-bed and the trained prior."""
    panels = {BED: _points(bed["curves"], "energy_distance")}
    if images is not None:
        panels[images["title"]] = _points(images["curves"], images["distance"])
    figures.curves(
        out / "samplers.png",
        panels,
        xlabel="network evaluations per draw",
        ylabel="distance (lower is better)",
        title="Langevin's chain and OU-MALA",
        hline={BED: bed["bound"]},
    )
    print(f"\nwrote {out}/report.json, samplers.png")


def _points(
    curves: Mapping[str, list[dict[str, Any]]], name: str
) -> dict[str, list[tuple[float, float]]]:
    return {label: [(p["evaluations"], p[name]) for p in ps] for label, ps in curves.items()}
