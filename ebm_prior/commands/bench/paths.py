"""The paths of a Langevin chain that are compared, each with a state of its own to go on from."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.commands.bench.reference import Reference
from ebm_prior.prior import Conditional, EBMPrior
from ebm_prior.schedule import at
from ebm_prior.seeds import seeded


class Path(Protocol):
    """A chain on log pi(u_t | u_{t+1}) that is moved on from wherever it is."""

    @property
    def u(self) -> Tensor:
        """The state, (B, D)."""
        ...

    def advance(self, num_steps: int, *, eager: bool = False) -> None:
        """Take so many Langevin steps; eagerly: operation by operation, for counting."""
        ...

    def chain(self, num_steps: int) -> None:
        """A whole chain of its own, with what it does before its first step."""
        ...

    def state(self) -> list[Tensor]:
        """The tensors that the path itself keeps u in."""
        ...

    def force(self, leaves: list[Tensor]) -> Tensor:
        """F, (B,), at tensors like `state`, with the graph that its backward pass needs."""
        ...


class Plain:
    """The chain of a prior, plain or fast: what `EBMPrior.reverse` does between start and end."""

    def __init__(self, prior: EBMPrior, t: int, u_next: Tensor, seed: int) -> None:
        self.prior, self.t, self.u_next, self.u = prior, t, u_next, u_next
        self.generator = seeded(u_next.device, seed)
        self.step_size = at(prior.step_sizes, torch.full((len(u_next),), t), u_next).squeeze(1)
        self.prepare()

    def prepare(self) -> None:
        """What every chain does before its first step."""
        density = self.prior.log_density(self.t, self.u_next)
        assert isinstance(density, Conditional)
        self.density = density

    def advance(self, num_steps: int, *, eager: bool = False) -> None:
        sampler = langevin.run if eager else self.prior.sampler
        assert not isinstance(sampler, langevin.PerIndex)
        self.u = sampler(
            self.u,
            self.density,
            step_size=self.step_size,
            num_steps=num_steps,
            generator=self.generator,
        )

    def chain(self, num_steps: int) -> None:
        self.prior.reverse(self.t, self.u_next, num_steps=num_steps, generator=self.generator)

    def step(self, u: Tensor, noise: Tensor) -> Tensor:
        """One step from u with this noise; the state stays."""
        state, _ = langevin.step(langevin.init(u), self.density, self.step_size, noise)
        return state.u

    def state(self) -> list[Tensor]:
        return [self.u]

    def force(self, leaves: list[Tensor]) -> Tensor:
        assert self.density.f is not None
        with torch.enable_grad():
            return self.density.f(*leaves)

    def gradient_of_f(self, u: Tensor) -> Tensor:
        """Of F at u, (B, D): the density's gradient less that of the Gaussian terms."""
        others = self.prior.log_density(self.t, self.u_next, zero_energy=True)
        whole, gaussian = (
            langevin.value_and_gradient(density, u)[1] for density in (self.density, others)
        )
        return whole - gaussian


class InReferenceStyle:
    """The chain of `reference.Reference`."""

    def __init__(self, prior: EBMPrior, t: int, u_next: Tensor, seed: int) -> None:
        self.reference = Reference(prior, t, u_next)
        self.generator = seeded(u_next.device, seed)
        self.layers = self.reference.u_next

    @property
    def u(self) -> Tensor:
        return self.reference.layout.join(self.layers)

    def advance(self, num_steps: int, *, eager: bool = False) -> None:
        for _ in range(num_steps):
            noise = self.reference.noise(self.generator)
            self.layers = self.reference.step(self.layers, noise)

    def chain(self, num_steps: int) -> None:
        self.advance(num_steps)

    def state(self) -> list[Tensor]:
        return self.layers

    def force(self, leaves: list[Tensor]) -> Tensor:
        with torch.enable_grad():
            return self.reference.energies(leaves)
