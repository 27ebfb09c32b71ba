"""Short-run Langevin dynamics on any function u -> log density (paper, Eq. 3).

The sampler sees nothing of networks, layers or diffusion: a chain of K steps calls the function
exactly K times, at the state each step starts from. In training every call advances the spectral
norm of the energies, so one call more or less is another algorithm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

#: u (B, D) -> log p(u), (B,), differentiable. It may have a method `with_gradient`, u -> (log p,
#: gradient), for what it knows in closed form; without one autograd finds the gradient.
LogDensity = Callable[[Tensor], Tensor]


class Sampler(Protocol):
    """What draws from a log density; `run` is one."""

    def __call__(
        self,
        u: Tensor,
        log_density: LogDensity,
        *,
        step_size: float | Tensor,
        num_steps: int,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
        mask: Tensor | None = None,
        callback: Callable[[int, State, Info], None] | None = None,
    ) -> Tensor: ...


@runtime_checkable
class PerIndex(Protocol):
    """A sampler with settings of its own for every diffusion index."""

    def at(self, t: int | Tensor) -> Sampler:
        """The sampler of one index, or of each sample's own, (B,)."""
        ...


class State(NamedTuple):
    """What a chain carries from step to step."""

    u: Tensor  # (B, D)


class Info(NamedTuple):
    """What one step did, for logs; what follows from it is computed only when asked for."""

    log_density: Tensor  # (B,), at the state the step started from
    gradient: Tensor  # (B, D)
    before: Tensor  # (B, D), the state the step started from
    after: Tensor  # (B, D)

    @property
    def move(self) -> Tensor:
        """(B, D), new state minus old."""
        return self.after - self.before

    @property
    def gradient_norm(self) -> Tensor:
        """(B,)."""
        return self.gradient.norm(dim=1)

    @property
    def move_norm(self) -> Tensor:
        """(B,)."""
        return self.move.norm(dim=1)


def init(u: Tensor) -> State:
    """Start a chain at u, (B, D): no fresh noise, no rescaling."""
    if u.ndim != 2:
        raise ValueError(f"u has shape {tuple(u.shape)}, expected (B, D): use Layout.join")
    return State(u.detach())


def step(
    state: State,
    log_density: LogDensity,
    step_size: float | Tensor,
    noise: Tensor,
    mask: Tensor | None = None,
) -> tuple[State, Info]:
    r"""Move the chain once by unadjusted Langevin dynamics (paper, Eq. 3, terms restored).

    .. math:: u' = u + \tfrac{s}{2} \nabla_u \log p(u) + \sqrt{s}\,\epsilon

    Some texts write s for half of this step size.

    Args:
        log_density: u -> log p(u), (B, D) -> (B,), differentiable.
        step_size: s, a float or (B,): in training each sample has its own t, hence its own s.
        noise: standard normal, (B, D), like `state.u`.
        mask: (D,) or (B, D) bool; True coordinates are held: no drift, no noise, the same bits.

    Returns:
        The next state, and log p at the old one with gradient and move.
    """
    s = step_size.unsqueeze(1) if isinstance(step_size, Tensor) and step_size.ndim else step_size
    u = state.u
    log_p, gradient = value_and_gradient(log_density, u)
    moved = u + 0.5 * s * gradient + s**0.5 * noise
    if mask is not None:
        moved = torch.where(mask, u, moved)
    return State(moved), Info(log_p, gradient, u, moved)


def value_and_gradient(log_density: LogDensity, u: Tensor) -> tuple[Tensor, Tensor]:
    """log p(u), (B,), and its gradient, (B, D), without a graph; one evaluation."""
    own = getattr(log_density, "with_gradient", None)
    if own is not None:
        return own(u)
    u = u.detach().requires_grad_()
    with torch.enable_grad():
        log_p = log_density(u)
        if log_p.shape != u.shape[:1]:
            raise ValueError(
                f"log_density returned shape {tuple(log_p.shape)}, expected ({len(u)},): one"
                " value per sample, summed over layers and pixels."
            )
        # Summed, never averaged: samples are independent, so each row is its own exact gradient.
        (gradient,) = torch.autograd.grad(log_p.sum(), u)
    return log_p.detach(), gradient


def run(
    u: Tensor,
    log_density: LogDensity,
    *,
    step_size: float | Tensor,
    num_steps: int,
    generator: torch.Generator | None = None,
    noise: Iterable[Tensor] | None = None,
    mask: Tensor | None = None,
    callback: Callable[[int, State, Info], None] | None = None,
) -> Tensor:
    """K = `num_steps` steps from u; returns the last state, (B, D), without a graph.

    Args:
        generator: draws the noise; without one, PyTorch's own generator does.
        noise: recorded noise instead, one (B, D) per step.
        callback: called after each step with its index, the new state and what the step did.
    """
    state = init(u)
    for k, drawn in enumerate(noises(state.u, num_steps, generator, noise)):
        state, info = step(state, log_density, step_size, drawn, mask)
        if callback is not None:
            callback(k, state, info)
    return state.u


def noises(
    like: Tensor,
    num_steps: int,
    generator: torch.Generator | None,
    recorded: Iterable[Tensor] | None,
) -> Iterator[Tensor]:
    """The noise of each step, drawn like `like` when it is asked for, or as recorded.

    Raises:
        ValueError: fewer are recorded than there are steps.
    """
    given = None if recorded is None else iter(recorded)
    for k in range(num_steps):
        drawn = standard_normal(like, generator) if given is None else next(given, None)
        if drawn is None:
            raise ValueError(f"noise has {k} entries, expected {num_steps}: one per step")
        yield drawn


def standard_normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise like `like`, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    draw = torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype)
    return draw.to(like.device)
