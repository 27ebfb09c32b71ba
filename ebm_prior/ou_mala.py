r"""The second sampler: exact on the Gaussian part of the conditional, corrected for the rest.

The conditional of a diffusion prior is a Gaussian times exp(f),

.. math:: \pi(u) \propto e^{f(u)}\, N(u; m, 1/P), \qquad
    P = 1 + w \alpha^2, \quad m = w \alpha u_{t+1} / P

(`prior.Conditional`). The Ornstein-Uhlenbeck process of that Gaussian is solved exactly, with the
force g = grad f held over the step; with a = e^{-h} the proposal is

.. math:: u' = m + a (u - m) + (1 - a) \frac{g(u)}{P} + \sqrt{\frac{1 - a^2}{P}}\, \xi

and a Metropolis-Hastings test (MALA) makes pi invariant for every h: steps are as long as f lets
them be, and what they are wrong by is refused instead of remaining as bias. The Gaussian cancels
in the ratio, which is

.. math:: \log r = f' - f + \frac{g' \cdot (d - a d') - g \cdot (d' - a d)}{1 + a}
    - \frac{1 - a}{1 + a}\, \frac{|g'|^2 - |g|^2}{2 P}, \qquad d = u - m

so f = 0 is accepted always, and its draw is exact in one step as h grows. A chain of K steps
evaluates f and its gradient K + 1 times: once where it starts, once per proposal.

The steps h_t, one per diffusion index, are found once, before anything is drawn, in a pilot run
with random numbers of its own (`adapt`); so neither blocks nor processes change them.

This is for diffusion priors whose density does not contain the step size: with `energy_scale`
"step" it is exp(f / e2), and the published Langevin chain, far from mixing, is part of the model.
Even otherwise training fits the energies to short Langevin chains; exact draws of their density
are then another model, not always a better one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.base import Prior, frozen, in_mode, plain_numbers
from ebm_prior.langevin import Info, State
from ebm_prior.prior import Conditional, EBMPrior
from ebm_prior.seeds import seeded

#: Acceptance at which MALA moves fastest, for many coordinates (Roberts and Rosenthal, 1998). On
#: the eight modes anything from 0.55 to 0.75 does as well.
TARGET = 0.574
SHORTEST, LONGEST = 1e-8, 8.0  # of h; at 8 all but e^-8 of the old state is gone
PILOT = 0x0FF  # the key of the pilot's random numbers


class Gaussian(NamedTuple):
    """N(m, 1/P), what pi is but for exp(f)."""

    m: Tensor  # (B, D)
    P: Tensor  # (B, 1)

    @classmethod
    def of(cls, conditional: Conditional) -> Gaussian:
        alpha, weight = conditional.alpha, conditional.weight
        P = 1 + weight * alpha.square()
        return cls(weight * alpha * conditional.u_next / P, P)


class Chain(NamedTuple):
    """A state with what is known of f there: the next step evaluates only its proposal."""

    u: Tensor  # (B, D)
    f: Tensor  # (B,)
    g: Tensor  # (B, D), grad f


def init(u: Tensor, conditional: Conditional) -> Chain:
    """Start a chain at u, (B, D): the one evaluation that no proposal asks for."""
    return Chain(langevin.init(u).u, *_force(u, conditional))


def step(
    chain: Chain,
    conditional: Conditional,
    h: float | Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
) -> tuple[Chain, Tensor]:
    """Propose and accept or refuse, each sample for itself; one evaluation, no synchronisation.

    With a mask the chain is one on the free coordinates given the held ones: f is a function of
    all, force, noise and the ratio's sums are of the free.

    Args:
        h: the step, a float or (B,).
        noise: standard normal, (B, D + 1): D columns of xi, and one whose cumulated probability
            is the uniform number of the test.
        mask: (D,) or (B, D) bool; True coordinates are held and keep their bits.

    Returns:
        The next chain, and the probability of acceptance, (B,).
    """
    u, f, g = chain
    m, P = Gaussian.of(conditional)
    # Filled, not copied: a copy from the host would wait for the device.
    h = h.to(u).reshape(-1, 1) if isinstance(h, Tensor) else u.new_full((1, 1), h)
    a, loss = (-h).exp(), -torch.expm1(-h)  # a, 1 - a
    d, xi = u - m, noise[:, :-1]
    moved = a * d + loss * _free(g, mask) / P + (-torch.expm1(-2 * h) / P).sqrt() * xi
    proposed = m + moved
    if mask is not None:
        proposed = torch.where(mask, u, proposed)
    f_new, g_new = _force(proposed, conditional)
    old, new = _free(g, mask), _free(g_new, mask)
    crossed = (new * (d - a * moved) - old * (moved - a * d)).sum(1)
    squares = (new.square() - old.square()).sum(1)
    a, loss, P = a.squeeze(1), loss.squeeze(1), P.squeeze(1)
    log_ratio = f_new - f + crossed / (1 + a) - loss / (1 + a) * squares / (2 * P)
    # A proposal without a finite ratio is refused: the comparison with NaN is false.
    accepted = torch.special.log_ndtr(noise[:, -1]) < log_ratio
    kept = accepted.unsqueeze(1)
    following = Chain(
        torch.where(kept, proposed, u),
        torch.where(accepted, f_new, f),
        torch.where(kept, g_new, g),
    )
    return following, log_ratio.clamp(max=0).exp()


def _free(g: Tensor, mask: Tensor | None) -> Tensor:
    return g if mask is None else g.masked_fill(mask, 0)


def _force(u: Tensor, conditional: Conditional) -> tuple[Tensor, Tensor]:
    """f, (B,), and its gradient, (B, D), without a graph."""
    if conditional.f is None:
        return u.new_zeros(len(u)), torch.zeros_like(u)
    return langevin.value_and_gradient(conditional.f, u)


def run(
    u: Tensor,
    log_density: langevin.LogDensity,
    *,
    step_size: float | Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
    noise: Iterable[Tensor] | None = None,
    mask: Tensor | None = None,
    callback: Callable[[int, State, Info], None] | None = None,
) -> Tensor:
    """K = `num_steps` steps from u, (B, D); a `langevin.Sampler`, whose `step_size` is h.

    Random numbers: one draw of (B, D + 1) per step, see `step`, also for f = 0.

    Args:
        noise: recorded noise instead, one (B, D + 1) per step.
        callback: sees log pi and its gradient at the state each step started from, both as a
            Langevin step would have them.

    Raises:
        ValueError: a density whose Gaussian part is not known, or noise of another shape.
    """
    if not isinstance(log_density, Conditional):
        raise ValueError(
            "ou-mala got a log density without a known Gaussian part, expected a Conditional, as"
            " EBMPrior.log_density gives it; take Langevin for others"
        )
    if num_steps == 0:
        return langevin.init(u).u
    chain, wide = init(u, log_density), u.new_empty(len(u), u.shape[1] + 1)
    for k, drawn in enumerate(langevin.noises(wide, num_steps, generator, noise)):
        _check(drawn, wide)
        before = chain
        chain, _ = step(chain, log_density, step_size, drawn, mask)
        if callback is not None:
            value, gradient = replace(log_density, f=None).with_gradient(before.u)
            info = Info(value + before.f, gradient + before.g, before.u, chain.u)
            callback(k, State(chain.u), info)
    return chain.u


def _check(drawn: Tensor, wide: Tensor) -> None:
    if drawn.shape != wide.shape:
        raise ValueError(
            f"noise has shape {tuple(drawn.shape)}, expected {tuple(wide.shape)}: one more column"
            " than coordinates, for the test of acceptance"
        )


# --- one step size per diffusion index ---------------------------------------------------------


@dataclass(frozen=True)
class Adapted:
    """OU-MALA with a step of its own for every diffusion index; set it as `EBMPrior.sampler`.

    Where the Gaussian part alone is nearly the conditional, its draw takes the chain's place and
    costs no evaluation. Such a draw is wrong in total variation by at most 1 - A, A being the
    probability that it would be accepted as a proposal; K steps at the target acceptance a* leave
    (1 - a*)^K of all chains where they started. The smaller of both wins, so that the sampler
    stays exact as K grows.

    Attributes:
        steps: h_t of t = 0..N-1.
        acceptance: of the proposals with these steps, in the pilot run.
        gaussian: A of every t, in the pilot run.
        target: a*.
    """

    steps: tuple[float, ...]
    acceptance: tuple[float, ...]
    gaussian: tuple[float, ...]
    target: float = TARGET

    def at(self, t: int | Tensor) -> langevin.Sampler:
        """The sampler of one diffusion index, or of each sample's own, (B,), without skipping.

        It is `run` with h_t in place of Langevin's step size. A skipped chain has no steps for a
        callback to see; recorded noise is of K steps, which are then all made.
        """
        h: float | Tensor
        index = None if isinstance(t, Tensor) else t
        if isinstance(t, Tensor):
            h = torch.tensor(self.steps, dtype=torch.float64, device=t.device)[t]
        else:
            h = self.steps[t]

        def sampler(
            u: Tensor,
            log_density: langevin.LogDensity,
            *,
            step_size: float | Tensor,
            num_steps: int,
            generator: torch.Generator | None = None,
            noise: Iterable[Tensor] | None = None,
            mask: Tensor | None = None,
            callback: Callable[[int, State, Info], None] | None = None,
        ) -> Tensor:
            skip = index is not None and noise is None and self.skips(index, num_steps)
            if skip and isinstance(log_density, Conditional):
                m, P = Gaussian.of(log_density)
                draw = m + langevin.standard_normal(u, generator) / P.sqrt()
                return draw if mask is None else torch.where(mask, u, draw)
            return run(
                u,
                log_density,
                step_size=h,
                num_steps=num_steps,
                generator=generator,
                noise=noise,
                mask=mask,
                callback=callback,
            )

        return sampler

    def skips(self, t: int, num_steps: int) -> bool:
        """Whether a draw of the Gaussian part does for K steps at t."""
        return 1 - self.gaussian[t] <= (1 - self.target) ** num_steps

    def evaluations(self, num_steps: int) -> int:
        """Of every network, for one draw of u_0 by K steps."""
        chains = sum(not self.skips(t, num_steps) for t in range(len(self.steps)))
        return chains * (num_steps + 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"name": "ou-mala", **{k: _plain(v) for k, v in asdict(self).items()}}


def _plain(value: Any) -> Any:
    return [float(f"{v:.6g}") for v in value] if isinstance(value, tuple) else value


def check(prior: Prior) -> EBMPrior:
    """The prior, if it is one that this sampler is for.

    Raises:
        ValueError: another kind, or a density that contains Langevin's step size.
    """
    config = prior.config
    if config.kind != "diffusion" or not isinstance(prior, EBMPrior):
        raise ValueError(
            f"ou-mala is for priors of kind diffusion, this one is of kind {config.kind}; leave"
            " the sampler at langevin"
        )
    if config.energy_scale != "none":
        raise ValueError(
            "ou-mala is for priors trained with energy_scale none; with energy_scale"
            f" {config.energy_scale} the density is exp(f / e2), in which the published step size"
            " is part of the model; leave the sampler at langevin"
        )
    return prior


def adapt(
    prior: Prior,
    *,
    chains: int = 64,
    rounds: int = 60,
    target: float = TARGET,
    seed: int = 0,
    labels: Tensor | None = None,
    guidance: float = 1.0,
    label_steps: int | None = None,
) -> Adapted:
    r"""Find h_t in a pilot run down from noise, t = N-1..0, by Robbins and Monro's recursion

    .. math:: \log h \leftarrow \log h + 4 i^{-0.6} (\bar A_i - a^*), \qquad i = 1, 2, \dots

    with A_i the chains' mean probability of acceptance in round i; h_t is the geometric mean of
    the last half. As many rounds again with this h measure acceptance, and bring the chains on to
    where the next t starts. The cost, 3 N `rounds` evaluations of `chains` states, is paid once.

    Args:
        labels: (1, attributes), drawn by all chains, with what `EBMPrior.sample_u` has for them.

    Raises:
        ValueError: see `check`; or energies that are not finite.
    """
    model = check(prior)
    noise = seeded(model.device, PILOT, seed)
    labelled = 0 if labels is None else model.label_steps(label_steps)
    found: dict[int, tuple[float, float, float]] = {}
    with (
        in_mode(model.energies, training=False),
        frozen(model.energies),
        plain_numbers(model.device.type),
        torch.no_grad(),
    ):
        u = langevin.standard_normal(model.weight.new_empty(chains, model.layout.dim), noise)
        for t in reversed(range(model.config.max_T)):
            conditional = model.log_density(
                t,
                u,
                labels=labels.expand(chains, -1) if labels is not None and t < labelled else None,
                guidance=guidance,
            )
            assert isinstance(conditional, Conditional)
            u, found[t] = _pilot(u, conditional, rounds, target, noise)
            if not math.isfinite(sum(found[t])):
                raise ValueError(
                    f"the energies at t = {t} are not finite where the pilot run came to: they are"
                    " untrained or have diverged; check the prior with `ebm_prior doctor`"
                )
    steps, acceptance, gaussian = zip(*(found[t] for t in sorted(found)), strict=True)
    return Adapted(steps, acceptance, gaussian, target)


def _pilot(
    u: Tensor, conditional: Conditional, rounds: int, target: float, noise: torch.Generator
) -> tuple[Tensor, tuple[float, float, float]]:
    """The state after the pilot at one t, h, and the acceptance of its steps and of Gaussians."""
    low, high = math.log(SHORTEST), math.log(LONGEST)
    m, P = Gaussian.of(conditional)
    chain, wide = init(u, conditional), u.new_empty(len(u), u.shape[1] + 1)
    log_h, tried = math.log(0.3), []
    for i in range(1, rounds + 1):
        tried.append(log_h)
        drawn = langevin.standard_normal(wide, noise)
        chain, accepted = step(chain, conditional, math.exp(log_h), drawn)
        log_h += 4 * i**-0.6 * (float(accepted.mean()) - target)
        log_h = min(max(log_h, low), high)
    late = tried[len(tried) // 2 :]
    h = math.exp(sum(late) / len(late))
    own, gaussian = [], []
    for _ in range(rounds):
        chain, accepted = step(chain, conditional, h, langevin.standard_normal(wide, noise))
        draw = m + langevin.standard_normal(u, noise) / P.sqrt()
        f = chain.f if conditional.f is None else conditional.f(draw)
        own.append(float(accepted.mean()))
        gaussian.append(float((f - chain.f).clamp(max=0).exp().mean()))
    return chain.u, (h, sum(own) / rounds, sum(gaussian) / rounds)
