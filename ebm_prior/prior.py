r"""The diffusion EBM prior on the latents of a hierarchical VAE (paper, Sections 3.1 and 3.2).

The data of a step, :math:`u_{t+1}`, is a noisier u; the model is the conditional

.. math::
    \log \pi(u_t | u_{t+1}) = F(T(u_t), t) - \tfrac12 |u_t|^2
    - \frac{r_{t+1}}{2 \sigma_{t+1}^2} |\alpha_{t+1} u_t - u_{t+1}|^2 + \text{const}

with F the sum of the layers' f_i, divided by the step size e2(t) where the configuration says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone
from ebm_prior.base import LossInfo, Prior, frozen, in_mode, plain_numbers
from ebm_prior.config import PriorConfig
from ebm_prior.coupling import Coupling
from ebm_prior.energy import Columns, EnergyNets
from ebm_prior.schedule import Schedule, at, forward_pair

Record = Callable[[int, langevin.State, langevin.Info], None]


@dataclass(frozen=True, eq=False)
class Conditional:
    r"""The function u -> log pi(u | u_{t+1}), (B, D) -> (B,), up to a constant, with its gradient.

    .. math:: F(T(u), t) - \tfrac12 |u|^2 - \tfrac{w}{2} |\alpha u - u_{t+1}|^2

    Attributes:
        f: u -> F(T(u), t), (B,), differentiable; None is f = 0.
        u_next: u_{t+1}, (B, D).
        alpha: alpha_{t+1}, (B, 1).
        weight: w = r_{t+1} / sigma_{t+1}^2, (B, 1).
    """

    f: Force | None
    u_next: Tensor
    alpha: Tensor
    weight: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        log_gauss = self._gaussian(u)
        return log_gauss if self.f is None else log_gauss + self.f(u)

    def with_gradient(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log pi, (B,), and its gradient, (B, D), without a graph; the Gaussian terms' by hand."""
        with torch.no_grad():
            log_p = self._gaussian(u)
            off = self.alpha * u - self.u_next
            gradient = -u - self.weight * self.alpha * off
        if self.f is None:
            return log_p, gradient
        f, of_f = langevin.value_and_gradient(self.f, u)
        return log_p + f, gradient + of_f

    def tensors(self) -> list[Tensor]:
        """What differs from one conditional to the next of the same `key`."""
        own = [self.u_next, self.alpha, self.weight]
        return own if self.f is None else [*own, *self.f.tensors()]

    @property
    def key(self) -> Any:
        """Equal for conditionals that differ in their tensors alone."""
        return None if self.f is None else self.f.key

    def _gaussian(self, u: Tensor) -> Tensor:
        off = self.alpha * u - self.u_next
        return -0.5 * (u.square() + self.weight * off.square()).sum(1)


@dataclass(frozen=True, eq=False)
class Force:
    """The function u -> F(T(u), t), (B, D) -> (B,): what the energies add to a Gaussian.

    Attributes:
        to_z: T.
        columns: z -> what the networks give at t.
        scale: what that is divided by, (B, 1) or a number.
        labels, guidance: see `EBMPrior.log_density`.
    """

    to_z: Callable[[Tensor], list[Tensor]]
    columns: Columns
    coupling: Coupling
    scale: Tensor | float
    labels: Tensor | None = None
    guidance: float = 1.0

    def __call__(self, u: Tensor) -> Tensor:
        f = self.coupling.total(self.columns(self.to_z(u)), self.labels, self.guidance)
        return (f / self.scale).sum(1)

    def tensors(self) -> list[Tensor]:
        """See `Conditional`."""
        optional = [x for x in (self.scale, self.labels) if isinstance(x, Tensor)]
        return [*self.columns.tensors(), *optional]

    @property
    def key(self) -> Any:
        """See `Conditional`; a map that is made anew counts its copies."""
        backbone = getattr(self.to_z, "__self__", None)
        copies = getattr(backbone, "copies", 0)
        return id(backbone), copies, self.columns.key, self.labels is None, self.guidance


class EBMPrior(Prior):
    """The energy-based prior of one backbone.

    The networks are in eval mode except inside `loss`, so spectral norm is frozen whenever the
    prior is used and advances only where it learns.

    Attributes:
        energies: the trainable part, (z, t) -> (B, L); coupled layers give a column per class.
        sampler: what runs a chain on the conditional: `langevin.run`, or another like it, also
            one for every diffusion index.
        coupling: what makes f and the classes' logits of those columns.
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__(backbone, config)
        self.schedule = Schedule(config.max_T, config.last_step_kernel)
        self.step_sizes = self.schedule.step_size(config.b2, config.step_rule)  # e2(t), (N,)
        self.coupling = Coupling(len(config.shapes), config.attributes, config.per_layer_classes)
        self.energies: Any = self.networks(config)
        self.sampler: langevin.Sampler | langevin.PerIndex = langevin.run
        self.eval()

    @classmethod
    def networks(cls, config: PriorConfig) -> nn.Module:
        return EnergyNets.build(config)

    @property
    def learned(self) -> nn.Module:
        return self.energies

    # --- the model ------------------------------------------------------------------------

    def scale(self, t: Tensor, like: Tensor) -> Tensor | float:
        """What network outputs are divided by to be log densities: e2(t), (B, 1), or 1.

        The released code reads f as energy times step; this is the only place that knows.
        """
        return at(self.step_sizes, t, like) if self.config.energy_scale == "step" else 1.0

    def layer_energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B, L): -f_i, the energy of each layer, at u (B, D).

        A coupled layer's is minus the log-sum-exp over its own classes.
        """
        t = self._index(t, u)
        columns = self.energies(self.backbone.to_z(u), t)
        return -self.coupling.own(columns) / self.scale(t, u)

    def energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B,): -F, low where the aggregate posterior has more mass than the Gaussian prior.

        With attributes minus F^, the log-sum-exp over their classes.
        """
        t = self._index(t, u)
        columns = self.energies(self.backbone.to_z(u), t)
        return -(self.coupling.total(columns) / self.scale(t, u)).sum(1)

    def class_logits(self, u: Tensor, t: int | Tensor = 0) -> list[Tensor]:
        """Per attribute (B, classes): softmax of it is p(y | u_0) (paper, Section 3.3)."""
        return self.coupling.logits(self.energies(self.backbone.to_z(u), self._index(t, u)))

    def perturb(self, u: Tensor, k: int, generator: torch.Generator | None) -> Tensor:
        """State k of the forward process from clean u: A_k u + S_k e, (B, D)."""
        noise = langevin.standard_normal(u, generator)
        return float(self.schedule.alpha_bar[k]) * u + float(self.schedule.sigma_bar[k]) * noise

    def log_density(
        self,
        t: int | Tensor,
        u_next: Tensor,
        *,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        zero_energy: bool = False,
    ) -> langevin.LogDensity:
        """The function u_t -> log pi(u_t | u_next), (B, D) -> (B,), up to a constant.

        Args:
            t: diffusion index 0..N-1, one for all or (B,).
            u_next: u_{t+1}, (B, D).
            labels: (B, attributes) class numbers, -1 = not specified: F[y] in place of F^.
            guidance: factor of log p(y | u_0) in F[y] = F^ + log p(y | u_0).
            zero_energy: leave F out, the control any claim about samples must face.
        """
        t = self._index(t, u_next)
        if labels is not None:
            self.coupling.check_labels(labels, len(u_next))
        schedule, f = self.schedule, None
        if not zero_energy:
            columns, scale = self.energies.at(t), self.scale(t, u_next)
            f = Force(self.backbone.to_z, columns, self.coupling, scale, labels, guidance)
        return Conditional(
            f,
            u_next,
            alpha=at(schedule.alpha, t + 1, u_next),
            weight=at(schedule.recovery / schedule.sigma.square(), t + 1, u_next),
        )

    def chain(
        self, t: int, u_next: Tensor, *, zero_energy: bool = False
    ) -> tuple[Tensor, langevin.LogDensity]:
        """Start and density of the chain of `reverse`, in the coordinates it runs in: here u."""
        return u_next, self.log_density(t, u_next, zero_energy=zero_energy)

    def _index(self, t: int | Tensor, u: Tensor) -> Tensor:
        if isinstance(t, Tensor):
            if t.shape != u.shape[:1]:
                raise ValueError(
                    f"t has shape {tuple(t.shape)}, expected ({len(u)},): one index per sample"
                )
            return t.to(u.device)
        if not 0 <= t < self.config.max_T:
            raise ValueError(f"t is {t}, expected a diffusion index 0..{self.config.max_T - 1}")
        return torch.full((len(u),), t, device=u.device)

    # --- sampling -------------------------------------------------------------------------

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
        """u_t from u_{t+1}: K Langevin steps on log pi(. | u_next), started at u_next itself.

        The networks' parameters are frozen meanwhile. `noise` and `mask` are `langevin.run`'s.

        Args:
            init: start here instead, (B, D).
            on_step: called with (k, state, info) after each step; costs no random numbers.
        """
        log_density = self.log_density(
            t, u_next, labels=labels, guidance=guidance, zero_energy=zero_energy
        )
        sampler = self.sampler
        with frozen(self.energies):
            run = sampler.at(t) if isinstance(sampler, langevin.PerIndex) else sampler
            return run(
                u_next if init is None else init,
                log_density,
                step_size=at(self.step_sizes, self._index(t, u_next), u_next).squeeze(1),
                num_steps=self.config.num_steps if num_steps is None else num_steps,
                generator=generator,
                noise=noise,
                mask=mask,
                callback=on_step,
            )

    def sample_u(
        self,
        num: int,
        *,
        generator: torch.Generator | None,
        num_steps: int | None = None,
        zero_energy: bool = False,
        labels: Tensor | None = None,
        guidance: float = 1.0,
        label_steps: int | None = None,
        stop: int = 0,
        callback: Callable[[int, Tensor], None] | None = None,
        on_step: Callable[[int, int, langevin.State, langevin.Info], None] | None = None,
    ) -> Tensor:
        """Draw u_0, (num, D): from noise u_N down t = N-1..0 (paper, Algorithm 2).

        Args:
            num_steps: K, if not the configured one.
            zero_energy: the control with f = 0.
            labels: (num, attributes) class numbers, -1 = not specified.
            guidance: factor of their log probability.
            label_steps: they act at t below this, if not the configured number.
            stop: end with the state u_stop.
            callback: called with (k, u_k) for k = N, the noise, down to `stop`.
            on_step: called with (t, k, state, info) after every Langevin step.

        Raises:
            ValueError: labels that do not exist or never act, or a chain that left the finite
                numbers.
        """
        max_T, labelled = self.config.max_T, 0
        if labels is not None:
            self.coupling.check_labels(labels, num)
            self.coupling.check_classes(labels)
            labelled = self.label_steps(label_steps)
        with in_mode(self.energies, training=False), plain_numbers(self.device.type):
            self.refresh_backbone()
            u = langevin.standard_normal(self.weight.new_empty(num, self.layout.dim), generator)
            if callback is not None:
                callback(max_T, u)
            for t in reversed(range(stop, max_T)):
                u = self.reverse(
                    t,
                    u,
                    num_steps=num_steps,
                    generator=generator,
                    zero_energy=zero_energy,
                    labels=labels if t < labelled else None,
                    guidance=guidance,
                    on_step=None if on_step is None else functools.partial(on_step, t),
                )
                self.check_finite(t, u)
                if callback is not None:
                    callback(t, u)
        return u

    def label_steps(self, given: int | None = None) -> int:
        """How many of the last diffusion steps see labels: as given, else as configured.

        Raises:
            ValueError: none, or more than there are.
        """
        max_T = self.config.max_T
        steps = min(self.config.label_steps, max_T) if given is None else given
        if not 1 <= steps <= max_T:
            raise ValueError(
                f"label_steps is {steps}, expected 1 to {max_T}, the diffusion steps of this"
                " prior; give another number for labels to act"
            )
        return steps

    def check_finite(self, t: int, u: Tensor) -> None:
        """Refuse a chain that left the finite numbers; once per t: asking waits for the device."""
        if u.isfinite().all():
            return
        parts = self.layout.split(u)
        lost = [i for i, part in enumerate(parts) if not part.isfinite().all()]
        raise ValueError(
            f"the chain left the finite numbers within the Langevin steps of t = {t} (step size"
            f" {float(self.step_sizes[t]):.3g}), layers {lost}: the energies are untrained or have"
            " diverged; train from an earlier state, with a smaller learning rate or spectral norm"
        )

    # --- learning -------------------------------------------------------------------------

    def loss(
        self,
        u: Tensor,
        *,
        generator: torch.Generator | None,
        labels: Tensor | None = None,
        label_weight: float = 1.0,
        squared_penalty: float = 0.0,
    ) -> tuple[Tensor, LossInfo]:
        """One training step's loss for posterior draws u, (B, D) (paper, Algorithm 1).

        Train mode throughout, the chain included: spectral norm advances K + 2 times, once for
        each step, for u+ and for u-. The further arguments are those of `contrast`.
        """
        if labels is not None:
            self.coupling.check_labels(labels, len(u))
        t, positive, u_next = self.training_pair(u.detach(), generator)
        with in_mode(self.energies, training=True):
            negative = self.reverse(t, u_next, generator=generator)
            return self.contrast(
                positive,
                negative,
                t,
                labels=labels,
                label_weight=label_weight,
                squared_penalty=squared_penalty,
            )

    def training_pair(
        self, u: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A random t per sample, (B,), with u_t and u_{t+1} of posterior draws u, (B, D) each."""
        device = u.device if generator is None else generator.device
        t = torch.randint(self.config.max_T, (len(u),), generator=generator, device=device)
        t = t.to(u.device)
        noise, noise_next = (langevin.standard_normal(u, generator) for _ in range(2))
        return t, *forward_pair(u, t, self.schedule, noise, noise_next)

    def contrast(
        self,
        positive: Tensor,
        negative: Tensor,
        t: Tensor,
        *,
        labels: Tensor | None = None,
        label_weight: float = 1.0,
        squared_penalty: float = 0.0,
    ) -> tuple[Tensor, LossInfo]:
        r"""The contrastive loss of u+ = u_t and u-, (B, D) each (paper, Eqs. 11, 12, 20, 21).

        .. math::
            \sum_i \text{mean}_b \left[ f_i(z^-_i, t) - f_i(z^+_i, t)
            + c\,(f_i(z^-_i, t)^2 + f_i(z^+_i, t)^2)
            - \lambda\,[t = 0] \log p(y | z^+) \right] / e^2(t)

        without the division where energies are unscaled; c = `squared_penalty`, ours, published 0.

        Args:
            labels: (B, attributes) class numbers of u+, -1 = unlabelled; they count at t = 0.
            label_weight: lambda.
        """
        with torch.no_grad():
            z = self.backbone.to_z(torch.cat([positive, negative]))
        columns, columns_negative = self.energies.pair(z, t)
        f_positive = self.coupling.total(columns)
        f_negative = self.coupling.total(columns_negative)
        contrast = f_negative - f_positive
        if squared_penalty:
            contrast = contrast + squared_penalty * (f_negative.square() + f_positive.square())
        classified = torch.zeros(2, dtype=torch.long, device=t.device)
        if labels is not None:
            self.coupling.check_labels(labels, len(positive))
            labels = torch.where((t == 0).unsqueeze(1), labels, -1)
            contrast = contrast + label_weight * self.coupling.cross_entropy(columns, labels)
            predicted = torch.stack([x.argmax(1) for x in self.coupling.logits(columns)], dim=1)
            classified = torch.stack([(predicted == labels).sum(), (labels >= 0).sum()])
        layer_loss = (contrast / self.scale(t, contrast)).mean(0)
        means = f_positive.detach().mean(0), f_negative.detach().mean(0)
        difference = (means[1] - means[0]).sum()
        return layer_loss.sum(), LossInfo(
            difference, negative.std(), layer_loss.detach(), *means, classified
        )
