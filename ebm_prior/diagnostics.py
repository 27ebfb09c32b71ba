r"""Whether the chains of a trained prior do what they claim: sample pi(u_t | u_{t+1}).

Algorithm 2 is written as Langevin sampling; at the published settings it is "50 steps of gradient
ascent on f, a learned short-run denoiser" (contract, Section 4). Which of the two a prior's chains
are is measured here, over parallel chains that start as in sampling, at u_{t+1} itself:

* acceptance of the matching MALA step: would the unadjusted steps pass a Metropolis test?
* drift of log pi and of F: zero in equilibrium.
* split R-hat and effective sample size. Below the last t each u_{t+1} makes a target of its own,
  so chains are compared within groups that share it. They also share their start: R-hat near 1
  is necessary for mixing, not sufficient.
* the way: how far u travels against what the noise alone would do, and what carries it.
* the deviation of u per layer, 1 in the aggregate; above 1.03 something is left un-equilibrated.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.base import Prior, frozen, in_mode, plain_numbers
from ebm_prior.mixing import effective_sample_size, mala_log_acceptance, split_r_hat
from ebm_prior.prior import EBMPrior

COORDINATES = 64  # per layer, spread evenly, that R-hat and the effective sample size look at
MIXED = 1.1  # the bound on R-hat of Bayesian Data Analysis, Section 11.5
# A sampler keeps its last states only, which ask for less: with exponentially falling correlation
# split R-hat is 1.5 after 4 relaxation times, when 2% of the start is left, and 1.1 after 20.
FORGOTTEN = 1.5
CARRIED = 0.5  # share of the move that makes f its carrier
STILL = 0.2  # share of the way back to u_t below which a chain hardly moves
ACCEPTED = 0.5  # below it the step's own bias is worth a word
WIDE = 1.03  # deviation of u that a finished chain does not exceed (contract, experiments.md)


class Drift(NamedTuple):
    """Change of a mean over the chains: over all K steps, the first and the last quarter."""

    total: float
    first_quarter: float
    last_quarter: float


class Layer(NamedTuple):
    """One layer at one t. R-hat and its companion need K >= 4 steps and two chains per target."""

    r_hat: float | None
    effective_sample_size: float | None  # of the K states of a chain
    u_std: float  # of u_t
    u_std_error: float  # of that, for independent coordinates
    travelled: float  # root mean square of u_t - u_{t+1} per coordinate


@dataclass(frozen=True)
class Kernel:
    """What the chains did at one t.

    Attributes:
        acceptance: mean Metropolis-Hastings acceptance probability of their steps.
        travelled, injected: root mean square move per coordinate; what noise alone would give,
            the root of K e2(t).
        needed: root mean square of u_{t+1} - u_t under the forward process, for a u_t of unit
            deviation: the way back. None for a chain in z.
        share: of the move d, by what carried it, sum over chains of <d_part, d> / |d|^2; the
            parts, drift along grad F, along the Gaussian terms, and noise, add up to 1. In
            equilibrium the drifts undo the noise, whose share then exceeds 1.
        f_path: mean F at u^0 .. u^K.

    The joint prior's chain in z is told in z, but for `u_std`; "Gaussian" is then the VAE's prior.
    """

    t: int
    step_size: float
    num_steps: int
    acceptance: float
    log_density: Drift
    f: Drift
    travelled: float
    injected: float
    needed: float | None
    share: dict[str, float]
    f_path: tuple[float, ...]
    layers: tuple[Layer, ...]

    @property
    def r_hat(self) -> float | None:
        """The worst layer's."""
        return max((x.r_hat for x in self.layers if x.r_hat is not None), default=None)

    @property
    def effective_sample_size(self) -> float | None:
        """The worst layer's."""
        sizes = [x.effective_sample_size for x in self.layers]
        return min((size for size in sizes if size is not None), default=None)

    @property
    def mixes(self) -> bool:
        """R-hat passes in every layer."""
        return self.r_hat is not None and self.r_hat < MIXED

    def verdict(self) -> str:
        """In words."""
        words = [f"injected noise {self.injected:.2g} per coordinate"]
        if self.mixes:
            name = "mixes"
        elif self.r_hat is not None and self.r_hat < FORGOTTEN:
            name = "forgets its start"
        elif self.needed and self.travelled < STILL * self.needed:
            name = "hardly moves"
            words.append(f"travels {self.travelled:.2g} of the {self.needed:.2g} back to u_t")
        elif self.share["f"] > CARRIED and self.travelled > self.injected:
            name = "learned short-run denoiser"
            words.append(f"the f gradient carries {self.share['f']:.0%} of the move")
        else:
            name = "short run, not equilibrated"
            parts = ("noise", "f", "gaussian")
            words.append(", ".join(f"{part} {self.share[part]:.0%} of the move" for part in parts))
        if self.acceptance < ACCEPTED:
            words.append(f"MALA would accept {self.acceptance:.0%}: smaller steps are truer")
        if any(layer.u_std - 2 * layer.u_std_error > WIDE for layer in self.layers):
            words.append(f"u is wider than {WIDE}")
        return f"{name} ({'; '.join(words)})"

    def report(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        drifts = {name: getattr(self, name)._asdict() for name in ("log_density", "f")}
        layers = [layer._asdict() for layer in self.layers]
        further = {name: getattr(self, name) for name in ("r_hat", "effective_sample_size")}
        return {
            **asdict(self),
            **drifts,
            **further,
            "travelled_over_noise": self.travelled / self.injected,
            "layers": layers,
            "verdict": self.verdict(),
        }


def examine(
    prior: Prior,
    num_chains: int = 64,
    *,
    generator: torch.Generator | None,
    replicas: int = 8,
    num_steps: int | None = None,
) -> list[Kernel]:
    """Run chains as in sampling and say what they do, t = N-1 first.

    The first pass is `prior.sample_u`, state for state if the generator is the same. At each t
    with a kernel term a second one takes `num_chains / replicas` of its u_{t+1} and runs
    `replicas` chains from each.

    Args:
        num_chains: M, at least 2; at most 2 M chains are run at each t.
        num_steps: K, if not the configured one.

    Raises:
        ValueError: too few chains, or they left the finite numbers.
    """
    if not isinstance(prior, EBMPrior):
        raise ValueError(f"a prior of the kind {prior.config.kind} has no chains to examine")
    if not 2 <= replicas <= num_chains:
        raise ValueError(
            f"{num_chains} chains with {replicas} of the same start: expected at least 2 of the"
            " same start, and no more than there are chains"
        )
    K = prior.config.num_steps if num_steps is None else num_steps
    states: dict[int, Tensor] = {}  # u_k
    records: dict[int, _Record] = {}

    def on_step(t: int, k: int, state: langevin.State, info: langevin.Info) -> None:
        if k == 0:
            records[t] = _Record(prior, t, states[t + 1])
        records[t].step(state, info)

    prior.sample_u(
        num_chains,
        generator=generator,
        num_steps=K,
        callback=lambda k, u: states.update({k: u}),
        on_step=on_step,
    )
    found = []
    with frozen(prior.energies), in_mode(prior, training=False), plain_numbers(prior.device.type):
        for t, record in records.items():
            draws = torch.stack(record.draws)  # (K, M, J): one target for all, at the last t
            if prior.schedule.recovery[t + 1]:
                starts = states[t + 1][: num_chains // replicas]
                draws = _replicated(prior, t, starts, replicas, K, generator)
            found.append(record.kernel(draws, states[t]))
    return found


class _Record:
    """Gathers what the chains at one t do, step by step; sums stay on their device."""

    def __init__(self, prior: EBMPrior, t: int, u_next: Tensor) -> None:
        self.prior, self.t = prior, t
        self.step_size = float(prior.step_sizes[t])
        self.start, self.target = prior.chain(t, u_next)
        _, self.gaussian = prior.chain(t, u_next, zero_energy=True)
        self.needed = None
        if self.start is u_next:  # a chain in u
            alpha, sigma = (float(x[t + 1]) for x in (prior.schedule.alpha, prior.schedule.sigma))
            self.needed = math.hypot(1 - alpha, sigma)
        self.u = self.start  # where the chains are: u, or z
        self.by_f, self.by_gaussian = torch.zeros_like(self.u), torch.zeros_like(self.u)
        self.log_density: list[Tensor] = []  # (), mean over the chains, at u^0 .. u^K
        self.f: list[Tensor] = []
        self.accepted: list[Tensor] = []  # ()
        self.draws: list[Tensor] = []  # (M, J)
        self.columns = _columns(prior)
        self.before: tuple[Tensor, Tensor, Tensor] | None = None  # log p, gradient, u

    def step(self, state: langevin.State, info: langevin.Info) -> None:
        """After a step from the state that the last one led to."""
        gaussian = self.visit(info.log_density, info.gradient)
        self.by_gaussian += 0.5 * self.step_size * gaussian
        self.by_f += 0.5 * self.step_size * (info.gradient - gaussian)
        self.u = state.u
        self.draws.append(state.u[:, self.columns])

    def visit(self, log_p: Tensor, gradient: Tensor) -> Tensor:
        """Note the densities at u and the step that led here; the Gaussian terms' gradient."""
        here = (log_p, gradient, self.u)
        log_gaussian, of_gaussian = _with_gradient(self.gaussian, self.u)
        self.log_density.append(log_p.mean())
        self.f.append((log_p - log_gaussian).mean())
        if self.before is not None:
            log_accepted = mala_log_acceptance(*self.before, *here, self.step_size)
            self.accepted.append(log_accepted.exp().mean())
        self.before = here
        return of_gaussian

    def kernel(self, draws: Tensor, u_t: Tensor) -> Kernel:
        """The summary; evaluates the density once more, at the last state.

        Args:
            draws: (K, chains of the same target, ..., J): what R-hat looks at.
            u_t: (M, D), what the chains led to.
        """
        self.visit(*_with_gradient(self.target, self.u))
        move = self.u - self.start
        parts = {"f": self.by_f, "gaussian": self.by_gaussian}
        parts["noise"] = move - self.by_f - self.by_gaussian
        length = float(move.square().sum())
        K, layout = len(self.draws), self.prior.layout
        f_path = torch.stack(self.f).tolist()
        layers = zip(
            draws.split([min(n, COORDINATES) for n in layout.sizes], dim=-1),
            layout.split(u_t),
            layout.split(move),
            strict=True,
        )
        enough = len(draws) >= 4
        return Kernel(
            t=self.t,
            step_size=self.step_size,
            num_steps=K,
            acceptance=float(torch.stack(self.accepted).mean()),
            log_density=_drift(torch.stack(self.log_density).tolist()),
            f=_drift(f_path),
            f_path=tuple(f_path),
            travelled=_rms(move),
            injected=math.sqrt(K * self.step_size),
            needed=self.needed,
            share={name: float((part * move).sum()) / length for name, part in parts.items()},
            layers=tuple(
                Layer(
                    split_r_hat(drawn) if enough else None,
                    effective_sample_size(drawn) if enough else None,
                    float(u.std()),
                    float(u.std()) / math.sqrt(2 * u.numel()),
                    _rms(moved),
                )
                for drawn, u, moved in layers
            ),
        )


def _replicated(
    prior: EBMPrior,
    t: int,
    starts: Tensor,
    replicas: int,
    num_steps: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Several chains from each start, (G, D): their states, (K, replicas, G, J)."""
    draws: list[Tensor] = []
    columns = _columns(prior)
    prior.reverse(
        t,
        starts.repeat(replicas, 1),
        num_steps=num_steps,
        generator=generator,
        on_step=lambda k, state, info: draws.append(state.u[:, columns]),
    )
    return torch.stack(draws).unflatten(1, (replicas, len(starts)))


def _columns(prior: EBMPrior) -> Tensor:
    """(J,): at most `COORDINATES` of each layer, spread evenly."""
    first, found = 0, []
    for size in prior.layout.sizes:
        found.append(first + torch.linspace(0, size - 1, min(size, COORDINATES)).long())
        first += size
    return torch.cat(found).to(prior.device)


def _with_gradient(log_density: langevin.LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """log p (B,) and its gradient (B, D)."""
    _, info = langevin.step(langevin.init(u), log_density, 0.0, torch.zeros_like(u))
    return info.log_density, info.gradient


def _drift(v: list[float]) -> Drift:
    """Of the values at u^0 .. u^K."""
    quarter = max(1, (len(v) - 1) // 4)
    return Drift(v[-1] - v[0], v[quarter] - v[0], v[-1] - v[-1 - quarter])


def _rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())
