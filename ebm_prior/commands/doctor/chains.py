"""The chains of a trained prior, as a table: a row per t, below it a line per layer."""

from __future__ import annotations

import argparse
import time
from typing import Any

from ebm_prior.base import Prior
from ebm_prior.commands.doctor.checks import OK, Check, Checks
from ebm_prior.diagnostics import Kernel, examine
from ebm_prior.prior import EBMPrior
from ebm_prior.seeds import seeded

CHAINS = 64
REPLICAS = 8  # chains of the same start, where t has a kernel
PATIENCE = 180.0  # seconds of chains that nobody asked for by number
TRIED = 8  # chains of the trial that tells how long they take
HEADER = "accept    log p  last 1/4        F  last 1/4  R-hat    ESS  way/noise  u std  verdict"
PLACES = "{:>6} {:>8} {:>9} {:>8} {:>9} {:>6} {:>6} {:>10} {:>6}  {}"


def examined(args: argparse.Namespace, prior: Prior, results: dict[str, Any]) -> Checks:
    """Run the chains and print what they do."""
    if not isinstance(prior, EBMPrior):
        yield Check(OK, "chains", f"a prior of the kind {prior.config.kind} is drawn without")
        return
    count, steps = args.chains or CHAINS, args.num_steps or prior.config.num_steps
    seconds = _seconds(prior, count, steps)
    if args.chains is None and seconds > PATIENCE:
        text = f"left out: {count} would take about {seconds / 60:.0f} min; ask with --chains N"
        yield Check(OK, "chains", text)
        return
    kernels = examine(
        prior,
        count,
        generator=seeded(prior.device, args.seed, 1),
        replicas=min(REPLICAS, count),
        num_steps=steps,
    )
    results["chains"] = {
        "num_chains": count,
        "num_steps": steps,
        "by_t": [kernel.report() for kernel in kernels],
    }
    text = f"{count} at each t, K = {steps}, started as in sampling; R-hat, ESS (of K), u std: of"
    yield Check(OK, "chains", f"{text} the worst layer")
    yield Check(OK, "", HEADER)
    for kernel in kernels:
        yield Check(OK, f"t = {kernel.t}", _row(kernel))
        for i, layer in enumerate(kernel.layers):
            way = layer.travelled / kernel.injected
            cells = (_told(layer.r_hat, 2), _told(layer.effective_sample_size, 1), f"{way:.2f}")
            text = PLACES.format("", "", "", "", "", *cells, f"{layer.u_std:.2f}", "")
            yield Check(OK, f"  layer {i}", text.rstrip())


def _row(kernel: Kernel) -> str:
    return PLACES.format(
        f"{kernel.acceptance:.2f}",
        f"{kernel.log_density.total:+.3g}",
        f"{kernel.log_density.last_quarter:+.3g}",
        f"{kernel.f.total:+.3g}",
        f"{kernel.f.last_quarter:+.3g}",
        _told(kernel.r_hat, 2),
        _told(kernel.effective_sample_size, 1),
        f"{kernel.travelled / kernel.injected:.2f}",
        f"{max(layer.u_std for layer in kernel.layers):.2f}",
        kernel.verdict(),
    )


def _told(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _seconds(prior: EBMPrior, count: int, steps: int) -> float:
    """About how long `examine` takes, its two passes: a line through two short trials."""

    def trial(chains: int) -> float:
        started = time.perf_counter()
        prior.sample_u(chains, generator=seeded(prior.device, 0), num_steps=1).cpu()
        return time.perf_counter() - started

    trial(1)  # warms up
    one, more = trial(1), trial(TRIED)
    each = max(0.0, more - one) / (TRIED - 1)
    return 2 * steps * (one + each * (count - 1))
