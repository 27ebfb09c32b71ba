r"""The marginal joint EBM, the predecessor of the diffusion prior and its baseline.

.. math:: p(u) \propto \exp(F(T(u)))\, N(u; 0, I) \;=\; p(z) \propto \exp(F(z))\, p_\beta(z)

in the coordinates of u and of z = T(u): the log-determinants of T cancel (contract, baselines.md,
section 2). It is the diffusion prior with N = 1 and without the kernel term, so all but what
follows is `EBMPrior`'s; the positives of learning are the clean posterior draws.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone, Moments
from ebm_prior.base import frozen
from ebm_prior.config import PriorConfig
from ebm_prior.moments import log_prior, log_std, smallest_std, with_moments
from ebm_prior.prior import EBMPrior, Record


class JointPrior(EBMPrior):
    r"""exp(F) times the VAE's own prior, with a choice of samplers (`config.sampler`).

    * `u`: Langevin in u-space on F(T(u)) - |u|^2 / 2, exact. With `joint_logdet` "released" on
      F(T(u)) + log p_beta(T(u)), as the predecessor's code has it: a missing log-determinant
      leaves the further term - sum_i log sigma_i(z_{>i}).
    * `z`: Langevin in z-space on F(z) + log p_beta(z), started at T(u), u ~ N(0, I). z-space is
      multi-scale: a step on coordinates of deviation sigma neither overshoots nor diverges while
      e2 < 2 sigma^2, so the narrowest layer sets the pace of all.

    The step size is e2 = b2 sigma_1^2, which is b2 but for 4e-5 of it. z_{>i} is z
    above layer i in the paper's numbers, which grow towards the top; our lists are top first.

    It knows no labels: arguments that `EBMPrior` has for them are refused.

    Raises:
        ValueError: a backbone without `moments` for the samplers that need them.
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__(backbone, config)
        released = config.joint_logdet == "released"
        if released or config.sampler == "z":
            what = "joint_logdet 'released'" if released else "the joint prior's sampler 'z'"
            with_moments(backbone, what)

    def _moments(self, z: list[Tensor]) -> list[Moments]:
        return with_moments(self.backbone, "the joint prior").moments(z)

    def log_density(
        self, t: int | Tensor, u_next: Tensor, *, zero_energy: bool = False, **labelled: Any
    ) -> langevin.LogDensity:
        """The function u -> log p(u), (B, D) -> (B,), up to a constant; `u_next` gives shapes."""
        log_p = super().log_density(t, u_next, zero_energy=zero_energy, **labelled)
        if self.config.joint_logdet == "exact":
            return log_p
        return lambda u: log_p(u) - log_std(self._moments(self.backbone.to_z(u)))

    def log_density_z(self, *, zero_energy: bool = False) -> langevin.LogDensity:
        """The function z -> F(z) + log p_beta(z), (B, D) -> (B,), z joined to one tensor."""

        def log_p(flat: Tensor) -> Tensor:
            z = self.layout.split(flat)
            log_p_beta = log_prior(z, self._moments(z))
            if zero_energy:
                return log_p_beta
            t = self._index(0, flat)
            return log_p_beta + (self.energies(z, t) / self.scale(t, flat)).sum(1)

        return log_p

    def chain(
        self, t: int, u_next: Tensor, *, zero_energy: bool = False
    ) -> tuple[Tensor, langevin.LogDensity]:
        """Start and density of the chain, in u or, joined to one tensor, in z."""
        if self.config.sampler == "u":
            return super().chain(t, u_next, zero_energy=zero_energy)
        start = self.layout.join(self.backbone.to_z(u_next))
        return start, self.log_density_z(zero_energy=zero_energy)

    def reverse(
        self,
        t: int | Tensor,
        u_next: Tensor,
        *,
        num_steps: int | None = None,
        generator: torch.Generator | None = None,
        noise: Iterable[Tensor] | None = None,
        mask: Tensor | None = None,
        init: Tensor | None = None,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        zero_energy: bool = False,
        on_step: Record | None = None,
    ) -> Tensor:
        """K Langevin steps from `init`, else from `u_next`; u in, u out with either sampler.

        With the sampler `z`, `on_step` sees the chain in z, and `mask` holds whole upper layers,
        where a held z is a held u.

        Raises:
            ValueError: labels, or in z-space a step size that the narrowest layer does not stand.
        """
        if labels is not None:
            self.coupling.check_labels(labels, len(u_next))
        if self.config.sampler == "u":
            return super().reverse(
                t,
                u_next,
                num_steps=num_steps,
                generator=generator,
                noise=noise,
                mask=mask,
                init=init,
                zero_energy=zero_energy,
                on_step=on_step,
            )
        start = u_next if init is None else init
        if mask is not None and (mask[..., 1:] & ~mask[..., :-1]).any():
            raise ValueError(
                "the mask holds coordinates below free ones, which move them in z-space: hold"
                " layers from the top on, or take the sampler 'u'"
            )
        with frozen(self.energies):
            with torch.no_grad():
                z = self.backbone.to_z(start)
                self._check_step_size(smallest_std(self._moments(z)))
            flat = langevin.run(
                self.layout.join(z),
                self.log_density_z(zero_energy=zero_energy),
                step_size=float(self.step_sizes[0]),
                num_steps=self.config.num_steps if num_steps is None else num_steps,
                generator=generator,
                noise=noise,
                mask=mask,
                callback=on_step,
            )
            u = self.backbone.to_u(self.layout.split(flat))
        return u if mask is None else torch.where(mask, start, u)  # held: the same bits

    def _check_step_size(self, sigma: float) -> None:
        e2 = float(self.step_sizes[0])
        if not e2 < 2 * sigma**2:
            raise ValueError(
                f"the step size {e2:.3g} is too large for z-space, expected less than 2 sigma^2 ="
                f" {2 * sigma**2:.3g} with the smallest deviation {sigma:.3g} of the layers'"
                " priors: set a smaller b2, or take the sampler 'u'"
            )

    def training_pair(
        self, u: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """t = 0, the posterior draws u themselves, and N(0, I), where their chains start."""
        return self._index(0, u), u, langevin.standard_normal(u, generator)
