"""The paths of one prior: timed in turn, and what a step of each costs, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.commands.bench import counting, roofline, timing, trace
from ebm_prior.commands.bench.counting import Meter, Work
from ebm_prior.commands.bench.paths import InReferenceStyle, Path, Plain
from ebm_prior.frozen import fast
from ebm_prior.prior import EBMPrior
from ebm_prior.steps import Steps

T = 0  # a step costs the same at every diffusion index


@dataclass(frozen=True)
class Measuring:
    """How everything is measured.

    Attributes:
        steps: of the fast path, by precision.
        num_steps: Langevin steps of each timing.
        clock: the one that is quoted.
    """

    device: torch.device
    steps: dict[str, Steps]
    repeats: int
    num_steps: int
    seed: int
    rates: roofline.Rates
    clock: str


class Bench:
    """The paths of one prior.

    Args:
        u_next: (B, D), which the chains start at and are conditioned on.
    """

    def __init__(self, how: Measuring, name: str, prior: EBMPrior, u_next: Tensor) -> None:
        self.how, self.name, self.prior, self.u_next = how, name, prior, u_next
        self.plain = self._path(prior)
        self.fast = {p: self._path(fast(prior, steps)) for p, steps in how.steps.items()}
        self.paths: dict[str, Path] = {
            "reference": InReferenceStyle(prior, T, u_next, how.seed),
            "plain": self.plain,
            **{f"fast {precision}": path for precision, path in self.fast.items()},
        }

    def _path(self, prior: EBMPrior) -> Plain:
        return Plain(prior, T, self.u_next, self.how.seed)

    def measured(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Per precision the times and the agreement, and per path the counts."""
        agreement = dict(self._agreement())  # first: what is made at the first step is there then
        counts, work = self._counts()
        times = self._times()
        rows = {
            p: {**self._row(f"fast {p}", times, work), "agreement": agreement[p]}
            for p in self.how.steps
        }
        return rows, counts

    def _times(self) -> dict[str, timing.Times]:
        """Of one step of every path."""
        how, steps = self.how, self.how.num_steps
        # Twice on CUDA: the first call captures graphs.
        warm_up = 2 if how.device.type == "cuda" else 1
        runs = {name: partial(path.advance, steps) for name, path in self.paths.items()}
        found = timing.interleaved(runs, how.repeats, how.device, warm_up, self.name)
        return {
            name: timing.Times(*([x / steps for x in values] for values in times))
            for name, times in found.items()
        }

    def _row(
        self, path: str, times: dict[str, timing.Times], work: dict[str, list[Work]]
    ) -> dict[str, Any]:
        how, config = self.how, self.prior.config
        names = {"reference": "reference", "plain": "plain", "fast": path}
        taken = {short: times[name].by(how.clock) for short, name in names.items()}
        middle = {short: timing.median(values) for short, values in taken.items()}
        rounds = [x / f for x, f in zip(taken["reference"], taken["fast"], strict=True)]
        other = next(clock for clock in timing.CLOCKS if clock != how.clock)
        steps_of_a_draw = config.max_T * config.num_steps
        return {
            **{f"{short}_s": seconds for short, seconds in middle.items()},
            "ratio": middle["reference"] / middle["fast"],
            "ratio_to_plain": middle["plain"] / middle["fast"],
            "ratio_of_rounds": timing.spread(rounds),
            "ranges_s": {short: timing.spread(values) for short, values in taken.items()},
            f"{other}_s": {
                short: timing.median(times[name].by(other)) for short, name in names.items()
            },
            "images_per_s": {
                short: len(self.u_next) / (steps_of_a_draw * seconds)
                for short, seconds in middle.items()
            },
            "roofline": {
                short: roofline.against(work[name], how.rates, middle[short], how.device.type)
                for short, name in names.items()
            },
        }

    def _agreement(self) -> Iterator[tuple[str, dict[str, float]]]:
        """How far one step of each fast path is from the plain one's, with the same noise."""
        u, noise = self.u_next, torch.randn_like(self.u_next)
        moved, gradient = self.plain.step(u, noise), self.plain.gradient_of_f(u)
        for precision, path in self.fast.items():
            off = path.gradient_of_f(u) - gradient
            yield (
                precision,
                {
                    "max_du": float((path.step(u, noise) - moved).abs().max()),
                    "gradient_error": float(off.norm() / gradient.norm()),
                },
            )

    def _counts(self) -> tuple[dict[str, Any], dict[str, list[Work]]]:
        """Per path what a step costs, and its launches.

        The fast path is counted with and without recomputation, whichever is timed.
        """
        # Operation by operation: nobody sees into a captured graph.
        eager = {f"fast {p}": replace(s, graph=False) for p, s in self.how.steps.items()}
        first = next(iter(eager.values()))
        if first.tower:
            other = replace(first, recompute=not first.recompute)
            words = "recomputed" if other.recompute else "kept"
            eager[f"fast {first.precision}, {words}"] = other
        found: dict[str, Any] = {}
        work: dict[str, list[Work]] = {}
        names = ["reference", "plain", *eager]
        for name in tqdm(names, desc=f"{self.name}: counting", unit="path", leave=False):
            made = fast(self.prior, eager[name]) if name in eager else None
            path = self.paths[name] if made is None else self._path(made)
            path.advance(1, eager=True)  # what is made once is made here
            found[name], work[name] = self._count(name, path)
        return found, work

    def _count(self, name: str, path: Path) -> tuple[dict[str, Any], list[Work]]:
        size, device = len(self.u_next), self.how.device
        with Meter(*path.state(), self.u_next) as step:
            path.advance(1, eager=True)
        leaves = [part.detach().clone().requires_grad_() for part in path.state()]
        with Meter(*leaves) as forward:
            f = path.force(leaves)  # keeps its graph alive
            saved = forward.held
        del f
        found = {
            "launches": step.launches,
            "gflop_per_image": step.flops / size / 1e9,
            "gb_moved_per_image": step.moved.images / size / 1e9,
            "gb_moved_fixed": step.moved.fixed / 1e9,
            "saved_mb_per_image": saved.images / size / 1e6,
            "saved_mb_fixed": saved.fixed / 1e6,
            "peak_mb_per_image": step.peak.images / size / 1e6,
            "peak_mb_fixed": step.peak.fixed / 1e6,
        }
        if name in self.paths:
            timed = self.paths[name]
            # Two steps more: what a chain does once, at its beginning, is none of its steps'.
            short, longer = (counting.waited(partial(timed.chain, n), device) for n in (2, 4))
            found["host_waits_in_2_steps"] = longer - short
            if isinstance(timed, Plain):
                clock = timing.CLOCKS.index(self.how.clock)
                found["chain_setup_s"] = timing.seconds(timed.prepare, device)[clock]
        if device.type == "cuda":
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            path.advance(1, eager=True)
            peak = torch.cuda.max_memory_allocated(device) - before
            found["cuda_peak_mb_per_image"] = peak / size / 1e6
        return found, step.work

    def traces(self) -> dict[str, list[dict[str, Any]]]:
        """The most costly kernels of every path."""
        return {
            name: trace.summary(partial(path.advance, self.how.num_steps), self.how.device)
            for name, path in self.paths.items()
        }
