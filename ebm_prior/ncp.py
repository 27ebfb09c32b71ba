r"""The noise-contrastive prior, a baseline without chains in its training.

.. math:: p(z) \propto \prod_i r_i(z_i, z_{>i})\, p_\beta(z_i | z_{>i}), \qquad
    r_i = \frac{D_i}{1 - D_i} = e^{f_i}

D_i tells posterior draws of a layer from draws of the VAE's own prior, given the decoder's state
before that layer; f_i is its logit (contract, baselines.md, section 3). z_{>i} is z above layer i
in the paper's numbers, which grow towards the top; our lists are top first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone, Moments
from ebm_prior.base import LossInfo, Prior, frozen, in_mode, plain_numbers
from ebm_prior.config import PriorConfig
from ebm_prior.energy import EnergyNets
from ebm_prior.moments import ancestral, with_moments
from ebm_prior.spectral_norm import in_shares

PURPOSE = "the noise-contrastive prior"
CHUNK = 16  # proposals evaluated at once


class NCPPrior(Prior):
    """Reweighted layers: a classifier per layer, and ancestral sampling from the top.

    Args:
        config: `contexts` says what each classifier sees beside z_i, see `context_shapes`; None:
            nothing, which is the paper's exp(f_i(z_i)). `sampler`: `sir`, out of `proposals` draws
            of p_beta one with probability proportional to r_i, or `langevin`, `num_steps` steps
            of size e2 = b2 in the layer's own u_i.

    Attributes:
        classifiers: the trainable part, a network of `energy.py` per layer, at t = 0.
        last_ess: (num, L), the effective sample sizes of the last `sample_u` by `sir`.
    """

    def __init__(self, backbone: Backbone, config: PriorConfig) -> None:
        super().__init__(backbone, config)
        with_moments(backbone, PURPOSE)
        if config.contexts is not None and config.contexts != (found := context_shapes(backbone)):
            raise ValueError(
                f"the prior's classifiers see decoder states of shapes {config.contexts}, the"
                f" backbone's are {found}: they do not belong together"
            )
        self.classifiers = self.networks(config)
        self.last_ess: Tensor | None = None
        self.eval()

    @classmethod
    def networks(cls, config: PriorConfig) -> EnergyNets:
        contexts = config.contexts or (None,) * len(config.shapes)
        pairs = zip(config.shapes, contexts, strict=True)
        shapes = tuple(_input_shape(shape, context, config.network) for shape, context in pairs)
        return EnergyNets.build(replace(config, shapes=shapes, contexts=None))

    @property
    def learned(self) -> nn.Module:
        return self.classifiers

    # --- the model ------------------------------------------------------------------------

    def moments(self, z: list[Tensor]) -> list[Moments]:
        """Of every layer given those above it; without a graph."""
        with torch.no_grad():
            return with_moments(self.backbone, PURPOSE).moments(z)

    def logit(self, i: int, z: Tensor, context: Tensor | None) -> Tensor:
        """(B,): log D_i - log (1 - D_i) at z_i (B, *shape) in the context h_i."""
        if self.config.contexts is None or self.config.contexts[i] is None:
            context = None
        t = torch.zeros(len(z), dtype=torch.long, device=z.device)
        net = self.classifiers.layer(i)
        return net(_input(z, context, self.config.network), t).squeeze(1)

    def logits(self, z: Sequence[Tensor], moments: Sequence[Moments]) -> Tensor:
        """(B, L): every layer's, in the contexts of `moments`."""
        triples = enumerate(zip(z, moments, strict=True))
        return torch.stack([self.logit(i, part, m.h) for i, (part, m) in triples], dim=1)

    def layer_energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B, L): -f_i; there is no diffusion, t is not looked at."""
        z = self.backbone.to_z(u)
        return -self.logits(z, with_moments(self.backbone, PURPOSE).moments(z))

    def energy(self, u: Tensor, t: int | Tensor = 0) -> Tensor:
        """(B,): -sum_i f_i."""
        return self.layer_energy(u, t).sum(1)

    # --- sampling -------------------------------------------------------------------------

    def sample_u(
        self,
        num: int,
        *,
        generator: torch.Generator | None,
        zero_energy: bool = False,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """Draw u, (num, D), layer by layer from the top.

        Args:
            zero_energy: the control with f = 0.
            callback: called with (1, noise), where the chains start and the first of the
                proposals, and (0, u).
        """
        backbone, sir = with_moments(self.backbone, PURPOSE), self.config.sampler == "sir"
        sizes: list[Tensor] = []

        def choose(i: int, layer: Moments) -> Tensor:
            def f(u_i: Tensor) -> Tensor:
                """(B n, *shape), n proposals of the first sample first -> (B n,)."""
                if zero_energy:
                    return u_i.new_zeros(len(u_i))
                n = len(u_i) // num
                mean, std = layer.mean.repeat_interleave(n, 0), layer.std.repeat_interleave(n, 0)
                h = None if layer.h is None else layer.h.repeat_interleave(n, 0)
                return self.logit(i, mean + std * u_i, h)

            if not sir:
                return self._by_langevin(starts[i], f, generator)
            u_i, ess = importance_resample(starts[i], f, self.config.proposals, generator)
            sizes.append(ess)
            return u_i

        training_off = in_mode(self.classifiers, training=False)
        with training_off, frozen(self.classifiers), plain_numbers(self.device.type):
            like = self.weight.new_empty(num, self.layout.dim)
            noise = langevin.standard_normal(like, generator)
            starts = self.layout.split(noise)
            u = ancestral(backbone, noise, choose)
        self.last_ess = torch.stack(sizes, dim=1) if sir else None
        # Of ratios that are not numbers no proposal wins: the sizes tell.
        if not (u if self.last_ess is None else self.last_ess).isfinite().all():
            raise ValueError(
                f"sampling by {self.config.sampler} left the finite numbers: the classifiers have"
                " diverged, or b2 is too large for their gradients; train from an earlier state,"
                " or set a smaller b2"
            )
        if callback is not None:
            callback(1, noise)
            callback(0, u)
        return u

    def _by_langevin(
        self, start: Tensor, f: Callable[[Tensor], Tensor], generator: torch.Generator | None
    ) -> Tensor:
        """K Langevin steps in u_i on f_i(mu_i + sigma_i u_i) - |u_i|^2 / 2."""

        def log_density(flat: Tensor) -> Tensor:
            return f(flat.view_as(start)) - 0.5 * flat.square().sum(1)

        return langevin.run(
            start.flatten(1),
            log_density,
            step_size=self.config.b2,
            num_steps=self.config.num_steps,
            generator=generator,
        ).view_as(start)

    # --- learning -------------------------------------------------------------------------

    def loss(
        self, u: Tensor, *, generator: torch.Generator | None, squared_penalty: float = 0.0
    ) -> tuple[Tensor, LossInfo]:
        r"""The classifiers' cross-entropies at posterior draws u, (B, D), all layers in parallel.

        .. math::
            \sum_i - E[\log D_i(z_i^+, h_i)] - E[\log(1 - D_i(z_i^-, h_i))]
            + c\,E[f_i(z_i^+, h_i)^2 + f_i(z_i^-, h_i)^2]

        z_i^- ~ p_beta(z_i | z_{>i}) with the layers above from the posterior, so that h_i is the
        same in both terms. c = `squared_penalty`, ours; the contract has none.
        """
        u = u.detach()
        noise = langevin.standard_normal(u, generator)
        with torch.no_grad():
            positive = self.backbone.to_z(u)
        moments = self.moments(positive)
        parts = zip(moments, self.layout.split(noise), strict=True)
        negative = [m.mean + m.std * part for m, part in parts]
        both = [torch.cat(pair) for pair in zip(positive, negative, strict=True)]
        contexts = [m._replace(h=None if m.h is None else torch.cat([m.h, m.h])) for m in moments]
        with in_mode(self.classifiers, training=True), in_shares(self.classifiers, 2):
            f_positive, f_negative = self.logits(both, contexts).chunk(2)
        terms = F.softplus(-f_positive) + F.softplus(f_negative)
        if squared_penalty:
            terms = terms + squared_penalty * (f_positive.square() + f_negative.square())
        layer_loss = terms.mean(0)
        means = f_positive.detach().mean(0), f_negative.detach().mean(0)
        unlabelled = torch.zeros(2, dtype=torch.long, device=u.device)
        return layer_loss.sum(), LossInfo(
            (means[1] - means[0]).sum(), noise.std(), layer_loss.detach(), *means, unlabelled
        )


def importance_resample(
    start: Tensor,
    log_ratio: Callable[[Tensor], Tensor],
    proposals: int,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    r"""Draw from r(u) N(u; 0, I) by sampling-importance-resampling, for B targets at once.

    Of M proposals u_m ~ N(0, I) the one with the largest log r(u_m) + g_m is picked, g_m standard
    Gumbel: that is one draw with probabilities w_m = r(u_m) / sum r, of which no more than `CHUNK`
    proposals need to be in memory.

    Args:
        start: (B, *shape), the first of the proposals.
        log_ratio: (B n, *shape), n proposals of the first target first, -> (B n,); any constant
            per target may be missing.
        proposals: M.

    Returns:
        (B, *shape), and (B,) the effective sample sizes 1 / sum_m w_m^2, from 1 to M.
    """
    num, picked, log_w = len(start), start, []
    best = start.new_full((num,), -math.inf, dtype=torch.float64)
    rows = torch.arange(num, device=start.device)
    with torch.no_grad():
        for first in range(0, proposals, CHUNK):
            n = min(CHUNK, proposals - first)
            u = langevin.standard_normal(start.new_empty(num, n, *start.shape[1:]), generator)
            if first == 0:
                u[:, 0] = start
            value = log_ratio(u.flatten(0, 1)).view(num, n).double()
            top, m = (value + _gumbel(value, generator)).max(1)
            better = top > best
            picked = torch.where(better.view(-1, *(1,) * (start.ndim - 1)), u[rows, m], picked)
            best = torch.where(better, top, best)
            log_w.append(value)
    log_w_all = torch.cat(log_w, dim=1)
    ess = (2 * log_w_all.logsumexp(1) - (2 * log_w_all).logsumexp(1)).exp()
    return picked, ess


def context_shapes(backbone: Backbone) -> tuple[tuple[int, ...] | None, ...]:
    """Per layer the shape of the decoder's state before z_i is added, None where there is none.

    What a configuration with contexts says, found by one call of the backbone.
    """
    like = {name: getattr(backbone, name, None) for name in ("device", "dtype")}
    u = torch.zeros(1, backbone.layout.dim, **like)
    with torch.no_grad():
        found = with_moments(backbone, PURPOSE).moments(backbone.to_z(u))
    return tuple(None if m.h is None else tuple(m.h.shape[1:]) for m in found)


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard Gumbel noise, drawn on the generator's device."""
    device = like.device if generator is None else generator.device
    uniform = torch.rand(like.shape, generator=generator, device=device, dtype=like.dtype)
    return -(-uniform.log()).log().to(like.device)


def _input_shape(
    shape: tuple[int, ...], context: tuple[int, ...] | None, network: str
) -> tuple[int, ...]:
    """What the network of a layer sees: see `_input`."""
    if context is None:
        return shape
    if network == "mlp":
        return (math.prod(shape) + math.prod(context),)
    return (shape[0] + context[0], *shape[1:])


def _input(z: Tensor, context: Tensor | None, network: str) -> Tensor:
    """z_i beside its context: flattened for dense networks, else as channels at z_i's size."""
    if context is None:
        return z
    if network == "mlp":
        return torch.cat([z.flatten(1), context.flatten(1)], dim=1)
    if context.ndim == 2:
        context = context[..., None, None]
    # Averages a larger map, repeats a smaller one, leaves one of z_i's size.
    return torch.cat([z, F.adaptive_avg_pool2d(context, (z.shape[2], z.shape[3]))], dim=1)
