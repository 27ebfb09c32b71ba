r"""Is an image from the training distribution? Scores from a prior's energies (paper, Sec. 5.2).

.. math:: E_{>k}(z) = -\sum_{i>k} f_i(z_i, t=0), \qquad k = 0..L-1

with the paper's numbers of layers: L is the top, so that E_{>k} takes the first L - k layers of
our top-first lists. Larger means further out. Two schemes say which z is scored (contract,
procedures.md, section 2):

* inference: a posterior draw z ~ q(z|x);
* diffusion: u_1 of x in the layers above k, of an independent prior chain in the others; the
  kernel of t = 0 makes u_0 of both, which is scored.

Scores are energies in units of log density, without a graph. Their random numbers belong to the
image's own number, so that neither batches nor other images change them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ebm_prior import langevin
from ebm_prior.backbones.base import Backbone, BackboneWithNoise
from ebm_prior.base import in_mode, plain_numbers
from ebm_prior.latents import Layout
from ebm_prior.prior import EBMPrior
from ebm_prior.seeds import seeded

PURPOSES = ("posterior", "perturbation", "chain", "kernel")


@dataclass(frozen=True)
class ImageNoise:
    """The random numbers of a block of images.

    The same for every k and for both schemes: what differs between two scores of an image is then
    the score, not the luck.

    Attributes:
        images: the number of each image in its set.
        draw: which of several draws per image.
    """

    seed: int
    images: Sequence[int]
    draw: int = 0

    def generators(self, purpose: str, device: torch.device) -> list[torch.Generator]:
        """One per image, at the beginning of its numbers for this purpose."""
        key = (self.seed, PURPOSES.index(purpose), self.draw)
        return [seeded(device, *key, image) for image in self.images]

    def rows(self, purpose: str, dim: int, like: Tensor) -> Iterator[Tensor]:
        """Standard normal (B, dim) tensors without end, in device and precision of `like`."""
        generators = self.generators(purpose, like.device)
        row = like.new_empty(dim)
        while True:
            yield torch.stack([langevin.standard_normal(row, own) for own in generators])


# --- which latents


@torch.no_grad()
def posterior(backbone: Backbone, x: Tensor, noise: ImageNoise) -> Tensor:
    """One standardised posterior draw of each image, (B, D), each with its own noise.

    A backbone with the optional method `infer_with` is asked once, any other image by image.
    """
    if callable(getattr(backbone, "infer_with", None)):
        eps = backbone.layout.split(next(noise.rows("posterior", backbone.layout.dim, x)))
        return cast(BackboneWithNoise, backbone).infer_with(x, eps)
    pairs = zip(x.split(1), noise.generators("posterior", x.device), strict=True)
    return torch.cat([backbone.infer(image, generator=generator) for image, generator in pairs])


def perturb(prior: EBMPrior, u: Tensor, state: int, noise: ImageNoise) -> Tensor:
    r"""State k of the forward process: :math:`\bar\alpha_k u + \bar\sigma_k \epsilon`, (B, D)."""
    schedule, drawn = prior.schedule, next(noise.rows("perturbation", u.shape[1], u))
    return float(schedule.alpha_bar[state]) * u + float(schedule.sigma_bar[state]) * drawn


def chain(prior: EBMPrior, state: int, noise: ImageNoise, like: Tensor) -> Tensor:
    """State `state` of a prior chain for each image: from noise u_N down t = N-1..state, (B, D).

    Raises:
        ValueError: the chain left the finite numbers.
    """
    rows = noise.rows("chain", prior.layout.dim, like)
    with _scoring(prior, like):
        u = next(rows)
        for t in reversed(range(state, prior.config.max_T)):
            u = prior.reverse(t, u, noise=rows)
            prior.check_finite(t, u)
    return u


def denoised(prior: EBMPrior, u: Tensor, state: int, noise: ImageNoise) -> Tensor:
    r"""u_0 from u_state by the kernel of t = 0 on all layers, (B, D).

    State 1 is where that kernel starts. From state 0 the chain starts at u itself, the kernel
    being the one towards :math:`u_1 = \alpha_1 u + \sigma_1 \epsilon`.
    """
    rows = noise.rows("kernel", u.shape[1], u)
    u_next = u
    if state == 0:
        alpha, sigma = (float(c[1]) for c in (prior.schedule.alpha, prior.schedule.sigma))
        u_next = alpha * u + sigma * next(rows)
    with _scoring(prior, u):
        u_0 = prior.reverse(0, u_next, init=u, noise=rows)
    prior.check_finite(0, u_0)
    return u_0


# --- what they score


def above(energies: Tensor) -> Tensor:
    """Energies per layer, (B, L) top first -> E_{>k} for every k = 0..L-1, (B, L)."""
    return energies.cumsum(1).flip(1)


def scores(prior: EBMPrior, u: Tensor) -> Tensor:
    """E_{>k}(T(u)) at t = 0 for every k = 0..L-1, (B, L)."""
    with _scoring(prior, u):
        return above(prior.layer_energy(u, 0))


def gaussian_scores(layout: Layout, u: Tensor) -> Tensor:
    """The control without a prior's energies: |u_i|^2 / 2 summed over the same layers, (B, L)."""
    return above(torch.stack([part.flatten(1).square().sum(1) / 2 for part in layout.split(u)], 1))


def diffusion_scores(
    prior: EBMPrior, u: Tensor, ks: Sequence[int], noise: ImageNoise, *, state: int = 1
) -> Tensor:
    """E_{>k} in the diffusion scheme for each of `ks`, (B, len(ks)).

    Args:
        u: posterior draws, (B, D).
        state: how far the layers above k are perturbed, and where the others leave the prior
            chain: 1, or 0 (hardly any noise, while state 1 can have a lot: 0.69 for N = 3).
    """
    if state not in (0, 1):
        raise ValueError(f"state is {state!r}, expected 0 or 1: the states next to t = 0")
    layers, found = prior.layout.num_layers, []
    for k in ks:
        if not 0 <= k < layers:
            raise ValueError(f"k is {k}, expected 0..{layers - 1}: E_>k sums the layers above k")
    mine = perturb(prior, u, state, noise)
    others = chain(prior, state, noise, u) if any(ks) else mine
    for k in ks:
        low = prior.layout.mask(range(layers - k, layers), u.device)
        mixed = torch.where(low, others, mine)
        found.append(scores(prior, denoised(prior, mixed, state, noise))[:, k])
    return torch.stack(found, 1)


@contextlib.contextmanager
def _scoring(prior: EBMPrior, like: Tensor) -> Iterator[None]:
    """Networks in eval mode, plain numbers, no graph; chains enable gradients for themselves."""
    with (
        in_mode(prior.learned, training=False),
        plain_numbers(like.device.type),
        torch.no_grad(),
    ):
        yield
