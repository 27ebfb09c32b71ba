r"""The diffusion EBM prior on the latents of a hierarchical VAE (paper, Sections 3.1 and 3.2).

The data of a step, :math:`u_{t+1}`, is a noisier u; the model is the conditional

.. math::
    \log \pi(u_t | u_{t+1}) = F(T(u_t), t) - \tfrac12 |u_t|^2
    - \frac{r_{t+1}}{2 \sigma_{t+1}^2} |\alpha_{t+1} u_t - u_{t+1}|^2 + \text{const}

with F the sum of the layers' f_i, divided by the step size e2(t) where the configuration says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone
from ebm_prior.config import PriorConfig
from ebm_prior.energy import EnergyNets
from ebm_prior.schedule import Schedule, at, forward_pair


class LossInfo(NamedTuple):
    """What a training step shows; tensors without a graph, so that reading them is a choice."""

    difference: Tensor  # (), mean over the batch of sum_i f_i(u-) - f_i(u+), not divided by e2
    u_std: Tensor  # (), deviation of all coordinates of the negatives
    layer_loss: Tensor  # (L,), the loss of each layer
    positive: Tensor  # (L,), mean f_i(u+)
    negative: Tensor  # (L,), mean f_i(u-)


class EBMPrior(nn.Module):
    """The energy-based prior of one backbone.

    The networks are in eval mode except inside `loss`, so spectral norm is frozen whenever the
    prior is used and advances only where it learns.

    Attributes:
        backbone: the VAE; not a submodule, so neither its parameters nor its mode follow ours.
        energies: the trainable part, (z, t) -> (B, L).
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__()
        if backbone.layout.shapes != config.shapes:
            raise ValueError(
                f"the prior is for latents {config.shapes}, the backbone has"
                f" {backbone.layout.shapes}: they do not belong together"
            )
        self._held = (backbone,)  # a tuple hides it from nn.Module's registration
        self.config = config
        self.layout = backbone.layout
        self.schedule = Schedule(config.max_T, config.last_step_kernel)
        self.step_sizes = self.schedule.step_size(config.b2, config.step_rule)  # e2(t), (N,)
        self.energies: nn.Module = EnergyNets.build(config)
        self.eval()

    @property
    def backbone(self) -> Backbone:
        return self._held[0]

    # --- the model ------------------------------------------------------------------------

    def scale(self, t: Tensor, like: Tensor) -> Tensor | float:
        """What network outputs are divided by to be log densities: e2(t), (B, 1), or 1.

        The released code reads f as energy times step; this is the only place that knows.
        """
        return at(self.step_sizes, t, like) if self.config.energy_scale == "step" else 1.0

    def layer_energy(self, u: Tensor, t: int | Tensor) -> Tensor:
        """(B, L): -f_i, the energy of each layer, at u (B, D)."""
        t = self._index(t, u)
        return -self.energies(self.backbone.to_z(u), t) / self.scale(t, u)

    def energy(self, u: Tensor, t: int | Tensor) -> Tensor:
        """(B,): -F, low where the aggregate posterior has more mass than the Gaussian prior."""
        return self.layer_energy(u, t).sum(1)

    def log_density(
        self, t: int | Tensor, u_next: Tensor, *, zero_energy: bool = False
    ) -> langevin.LogDensity:
        """The function u_t -> log pi(u_t | u_next), (B, D) -> (B,), up to a constant.

        Args:
            t: diffusion index 0..N-1, one for all or (B,).
            u_next: u_{t+1}, (B, D).
            zero_energy: leave F out, the control any claim about samples must face.
        """
        t = self._index(t, u_next)
        schedule = self.schedule
        alpha = at(schedule.alpha, t + 1, u_next)
        precision = at(schedule.recovery / schedule.sigma.square(), t + 1, u_next)
        scale = self.scale(t, u_next)

        def log_pi(u: Tensor) -> Tensor:
            off = alpha * u - u_next
            log_gauss = -0.5 * (u.square() + precision * off.square()).sum(1)
            if zero_energy:
                return log_gauss
            return log_gauss + (self.energies(self.backbone.to_z(u), t) / scale).sum(1)

        return log_pi

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
        zero_energy: bool = False,
    ) -> Tensor:
        """u_t from u_{t+1}: K Langevin steps on log pi(. | u_next), started at u_next itself.

        The networks' parameters are frozen meanwhile. `noise` and `mask` are `langevin.run`'s.
        """
        with frozen(self.energies):
            return langevin.run(
                u_next,
                self.log_density(t, u_next, zero_energy=zero_energy),
                step_size=at(self.step_sizes, self._index(t, u_next), u_next).squeeze(1),
                num_steps=self.config.num_steps if num_steps is None else num_steps,
                generator=generator,
                noise=noise,
                mask=mask,
            )

    def sample_u(
        self,
        num: int,
        *,
        generator: torch.Generator | None,
        num_steps: int | None = None,
        zero_energy: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw u_0, (num, D): from noise u_N down t = N-1..0 (paper, Algorithm 2).

        Args:
            num_steps: K, if not the configured one.
            zero_energy: the control with f = 0.
            callback: called with (k, u_k) for k = N, the noise, down to 0.

        Raises:
            ValueError: the chain left the finite numbers.
        """
        max_T = self.config.max_T
        weight = next(self.energies.parameters())
        with in_mode(self.energies, training=False), _plain_numbers(weight.device.type):
            u = langevin.standard_normal(weight.new_empty(num, self.layout.dim), generator)
            if callback is not None:
                callback(max_T, u)
            for t in reversed(range(max_T)):
                u = self.reverse(
                    t, u, num_steps=num_steps, generator=generator, zero_energy=zero_energy
                )
                if not u.isfinite().all():  # once per t: asking waits for the device
                    lost = [i for i, part in enumerate(self.layout.split(u)) if not _finite(part)]
                    raise ValueError(
                        f"the chain left the finite numbers within the Langevin steps of t = {t}"
                        f" (step size {float(self.step_sizes[t]):.3g}), layers {lost}: the"
                        " energies are untrained or have diverged; train from an earlier state,"
                        " with a smaller learning rate or spectral norm"
                    )
                if callback is not None:
                    callback(t, u)
        return u

    @torch.no_grad()
    def sample(
        self,
        num: int,
        temperature: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw images, (num, C, H, W) in [0, 1].

        The temperature enters only in the last map u_0 -> z -> x; the chain runs at 1.

        Args:
            seed: for a generator of its own; or give the `generator`; or neither, and PyTorch's
                own generator draws.
        """
        if seed is not None:
            if generator is not None:
                raise ValueError("sample got a seed and a generator; give one of them")
            device = next(self.energies.parameters()).device
            generator = torch.Generator(device).manual_seed(seed)
        u = self.sample_u(num, generator=generator)
        return self.backbone.decode(u, temperature, generator)

    # --- learning -------------------------------------------------------------------------

    def loss(
        self, u: Tensor, *, generator: torch.Generator | None, squared_penalty: float = 0.0
    ) -> tuple[Tensor, LossInfo]:
        """One training step's loss for posterior draws u, (B, D) (paper, Algorithm 1).

        Train mode throughout, the chain included: every network is called K + 2 times, and each
        call advances its spectral norm.
        """
        u = u.detach()
        device = u.device if generator is None else generator.device
        t = torch.randint(self.config.max_T, (len(u),), generator=generator, device=device)
        t = t.to(u.device)
        noise, noise_next = (langevin.standard_normal(u, generator) for _ in range(2))
        positive, u_next = forward_pair(u, t, self.schedule, noise, noise_next)
        with in_mode(self.energies, training=True):
            negative = self.reverse(t, u_next, generator=generator)
            return self.contrast(positive, negative, t, squared_penalty=squared_penalty)

    def contrast(
        self, positive: Tensor, negative: Tensor, t: Tensor, *, squared_penalty: float = 0.0
    ) -> tuple[Tensor, LossInfo]:
        r"""The contrastive loss of u+ = u_t and u-, (B, D) each (paper, Eqs. 11 and 12).

        .. math::
            \sum_i \text{mean}_b \left[ f_i(z^-_i, t) - f_i(z^+_i, t)
            + c\,(f_i(z^-_i, t)^2 + f_i(z^+_i, t)^2) \right] / e^2(t)

        without the division where energies are unscaled; c = `squared_penalty`, ours, published 0.
        """
        with torch.no_grad():
            z_positive, z_negative = map(self.backbone.to_z, (positive, negative))
        f_positive = self.energies(z_positive, t)
        f_negative = self.energies(z_negative, t)
        contrast = f_negative - f_positive
        if squared_penalty:
            contrast = contrast + squared_penalty * (f_negative.square() + f_positive.square())
        layer_loss = (contrast / self.scale(t, contrast)).mean(0)
        means = f_positive.detach().mean(0), f_negative.detach().mean(0)
        difference = (means[1] - means[0]).sum()
        return layer_loss.sum(), LossInfo(difference, negative.std(), layer_loss.detach(), *means)


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module requires a gradient inside; afterwards each as before."""
    before = [(p, p.requires_grad) for p in module.parameters()]
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, requires_grad in before:
            parameter.requires_grad_(requires_grad)


@contextlib.contextmanager
def in_mode(module: nn.Module, *, training: bool) -> Iterator[None]:
    """Train or eval mode inside; afterwards each submodule as before."""
    before = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for submodule, mode in before:
            submodule.training = mode


@contextlib.contextmanager
def _plain_numbers(device: str) -> Iterator[None]:
    """Outside a caller's autocast and inference mode: chains need float32 and gradients."""
    with torch.inference_mode(False), torch.autocast(device, enabled=False):
        yield


def _finite(x: Tensor) -> bool:
    return bool(x.isfinite().all())
