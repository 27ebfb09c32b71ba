"""Training loss and its schedules as pure functions (NVAE paper, section 3.2; contract chapter 6).

The one object with a memory is `SpectralNorm`: it carries its power iterations along.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nvae.distributions import ImageDistribution, standard_normal
from nvae.layers import Conv2d, PlainConv2d, normalised
from nvae.model import AutoEncoder


def reduce_bits(x: Tensor, num_bits: int) -> Tensor:
    r"""Images in [0, 1] with :math:`2^b` values per pixel instead of 256.

    .. math:: \lfloor 255 x / 2^{8-b} \rfloor / (2^b - 1)
    """
    if num_bits == 8:
        return x
    return torch.floor(x * 255 / 2 ** (8 - num_bits)) / (2**num_bits - 1)


def reconstruction_loss(output: ImageDistribution, x: Tensor, border: int = 0) -> Tensor:
    """-log p(x | z) per image, (B,), without `border` pixels of padding on each side."""
    log_prob = output.log_prob(x)
    if border:
        log_prob = log_prob[..., border:-border, border:-border]
    return -log_prob.flatten(1).sum(1)


def log_importance_weight(reconstruction: Tensor, log_q: Tensor, log_p: Tensor) -> Tensor:
    """log p(x, z) - log q(z | x) per image, (B,)."""
    return -reconstruction - log_q + log_p


def kl_coefficient(
    step: int,
    num_total_iter: int,
    anneal_portion: float,
    const_portion: float,
    const_coeff: float,
) -> float:
    """beta: flat at `const_coeff`, then a ramp to 1; portions are of all iterations."""
    start, length = const_portion * num_total_iter, anneal_portion * num_total_iter
    if length == 0:
        return 1.0 if step >= start else const_coeff
    return max(min((step - start) / length, 1.0), const_coeff)


def kl_alpha(groups_per_scale: Sequence[int], rule: str = "square") -> Tensor:
    """alpha_i per layer, the top first: how much KL a layer is expected to carry (section 6.3).

    Args:
        groups_per_scale: highest resolution first, as in the configuration.
        rule: `square` is the one used in training; `equal`, `linear` and `sqrt` exist too.
    """
    growth = {
        "equal": lambda scale, groups: 1.0,
        "linear": lambda scale, groups: 2.0**scale,
        "sqrt": lambda scale, groups: 2.0 ** (scale / 2),
        "square": lambda scale, groups: 4.0**scale / groups,
    }[rule]
    alpha = torch.tensor(
        [
            growth(scale, groups)
            for scale, groups in enumerate(reversed(groups_per_scale))
            for _ in range(groups)
        ]
    )
    return alpha / alpha.min()


class BalancedKL(NamedTuple):
    total: Tensor  # (B,), with the coefficient beta
    weights: Tensor  # (L,), w_i; without gradient
    values: Tensor  # (L,), batch mean of each layer's KL; without gradient


def balance_kl(
    kl_all: Sequence[Tensor],
    beta: float,
    alpha: Tensor | None = None,
    pool: Callable[[Tensor], Tensor] = lambda size: size,
) -> BalancedKL:
    r"""beta times the sum of the layers' KL; while beta < 1, layers with little KL are spared.

    .. math:: w_i \propto \frac{a_i}{\alpha_i} \sum_j a_j, \quad
              a_i = \mathrm{mean}_b |KL_i(b)| + 0.01, \quad \mathrm{mean}_i\, w_i = 1

    Args:
        kl_all: per layer (B,).
        alpha: (L,), from `kl_alpha`; None turns balancing off.
        pool: makes the mean over this process's batch that of all processes; upstream does not.
    """
    kl = torch.stack(list(kl_all))
    values = kl.detach().mean(1)
    if alpha is None or beta >= 1:
        return BalancedKL(beta * kl.sum(0), torch.ones_like(values), values)
    size = pool(kl.detach().abs().mean(1)) + 0.01
    weights = size / alpha.to(size) * size.sum()
    weights = weights / weights.mean()
    return BalancedKL(beta * (weights[:, None] * kl).sum(0), weights, values)


def norm_coefficient(beta: float, final: float, initial: float | None = None) -> float:
    """lambda of the regularisers: `final`, or geometric from `initial` to it as beta goes to 1."""
    if initial is None:
        return final
    if initial <= 0 or final <= 0:
        raise ValueError(
            "weight_decay_norm_anneal needs weight_decay_norm and weight_decay_norm_init above 0,"
            f" got {final} and {initial}"
        )
    return math.exp((1 - beta) * math.log(initial) + beta * math.log(final))


def learning_rate(
    step: int,
    *,
    iterations_per_epoch: int,
    epochs: int,
    warmup_epochs: int,
    peak: float,
    floor: float,
) -> float:
    r"""The rate of an iteration: linear warm-up, one epoch at its last value L, cosine by epoch.

    .. math:: L = peak\,(W-1)/W, \quad
              lr(e) = floor + (L - floor)\,(1 + \cos(\pi k / T)) / 2

    with W warm-up iterations, k = e - warmup_epochs and T = epochs - warmup_epochs - 1. L is not
    the peak: upstream's scheduler continues from the last rate the warm-up has set.
    """
    warmup = iterations_per_epoch * warmup_epochs
    if step < warmup:
        return peak * step / warmup
    start = peak * (warmup - 1) / warmup if warmup else peak
    k = step // iterations_per_epoch - warmup_epochs
    if k == 0:
        return start
    return floor + (start - floor) * (1 + math.cos(math.pi * k / (epochs - warmup_epochs - 1))) / 2


def batch_norm_term(model: AutoEncoder) -> Tensor:
    """Sum over all BN layers of the largest |gamma|."""
    gammas = [layer.weight.abs().max() for _, layer in model.batch_norms()]
    return torch.stack(gammas).sum() if gammas else model.prior_ftr0.new_zeros(())


class SpectralNorm:
    r"""Sum over all convolutions of the largest singular value of the effective kernel.

    Kernels of equal matrix shape (C_out, rest) are stacked, in module order. Each call runs 4
    power iterations from where the last one stopped (40 the first time), without gradient,

    .. math:: v \leftarrow W^T u / |W^T u|, \quad u \leftarrow W v / |W v|,

    and returns the sum of :math:`u^T W v`. Runs outside autocast: upstream's half-precision
    products are a side effect.

    Args:
        start: (rows, columns) -> (u (n, rows), v (n, columns)) to start from; else drawn.
        generator: for the start.
    """

    def __init__(
        self,
        model: AutoEncoder,
        *,
        start: Mapping[tuple[int, int], tuple[Tensor, Tensor]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.groups: dict[tuple[int, int], list[Conv2d | PlainConv2d]] = {}
        for layer in model.conv_layers():
            rows = layer.weight.shape[0]
            self.groups.setdefault((rows, layer.weight.numel() // rows), []).append(layer)
        self.vectors: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        for size, layers in self.groups.items():
            like = layers[0].weight
            if start is None:
                u, v = (standard_normal((len(layers), n), like, generator) for n in size)
            else:
                u, v = (vector.to(like) for vector in start[size])
            self.vectors[size] = (_unit(u), _unit(v))
        self.num_calls = 0

    def __call__(self) -> Tensor:
        iterations = 4 if self.num_calls else 40
        self.num_calls += 1
        terms = []
        for size, layers in self.groups.items():
            with torch.autocast(layers[0].weight.device.type, enabled=False):
                kernels = _stacked_kernels(layers)
                with torch.no_grad():
                    u, v = (vector.to(kernels) for vector in self.vectors[size])
                    for _ in range(iterations):
                        v = _unit(torch.einsum("nr,nrc->nc", u, kernels))
                        u = _unit(torch.einsum("nrc,nc->nr", kernels, v))
                    self.vectors[size] = (u, v)
                terms.append(torch.einsum("nr,nrc,nc->", u, kernels, v))
        return torch.stack(terms).sum()

    def state_dict(self) -> dict[str, Any]:
        """The vectors, by matrix shape, and the number of calls; upstream loses both."""
        return {"vectors": dict(self.vectors), "num_calls": self.num_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for size, vectors in state["vectors"].items():
            u, v = (vector.to(self.groups[size][0].weight) for vector in vectors)
            self.vectors[size] = (u, v)
        self.num_calls = state["num_calls"]


def _stacked_kernels(layers: Sequence[Conv2d | PlainConv2d]) -> Tensor:
    """Effective kernels (n, C_out, rest), normalised all at once."""
    kernels = [layer.weight.flatten(1) for layer in layers]
    scaled = {i: layer for i, layer in enumerate(layers) if isinstance(layer, Conv2d)}
    if scaled:
        raw = torch.stack([layer.kernel.flatten(1) for layer in scaled.values()])
        log_norm = torch.stack([layer.log_weight_norm.flatten() for layer in scaled.values()])
        for i, kernel in zip(scaled, normalised(raw, log_norm), strict=True):
            kernels[i] = kernel
    return torch.stack(kernels)


def _unit(y: Tensor) -> Tensor:
    """y / max(|y|, 1e-3), row by row."""
    return F.normalize(y, dim=1, eps=1e-3)
