r"""What parallel chains say about their own convergence: textbook formulas, nothing of priors.

R-hat and effective sample size are those of Gelman et al., *Bayesian Data Analysis*, 3rd edition,
Sections 11.4 and 11.5 (split chains, variogram; Geyer's initial positive sequence ends the sum).
They are pooled: variances are summed over all the scalars that a layer offers before the ratio is
taken, since a mean or a maximum of many noisy ratios is biased upwards when chains are few.
"""

from __future__ import annotations

import torch
from torch import Tensor


def mala_log_acceptance(
    log_p: Tensor,
    grad: Tensor,
    u: Tensor,
    log_p_new: Tensor,
    grad_new: Tensor,
    u_new: Tensor,
    step_size: float | Tensor,
) -> Tensor:
    r"""Log of the probability with which MALA would accept the unadjusted step u -> u'.

    The Metropolis-Hastings ratio (Roberts and Tweedie, 1996) of the proposal
    :math:`q(u'|u) = N(u + \tfrac{s}{2} g,\, s I)`, with the squares multiplied out so that no
    large terms cancel (d = u' - u):

    .. math:: \log\alpha = \min\left(0,\; \log p' - \log p - \tfrac12 d \cdot (g + g')
        + \tfrac{s}{8} (|g|^2 - |g'|^2) \right)

    Args:
        log_p, log_p_new: (B,), at both ends.
        grad, grad_new, u, u_new: (B, D), at both ends.
        step_size: s, a number or (B,).

    Returns:
        (B,), at most 0.
    """
    work = ((u_new - u) * (grad + grad_new)).sum(1) / 2
    kinetic = (grad.square() - grad_new.square()).sum(1) * step_size / 8
    return (log_p_new - log_p - work + kinetic).clamp(max=0.0)


def split_r_hat(draws: Tensor) -> float:
    r"""Split R-hat: :math:`\sqrt{\widehat{var}^+ / W}`, near 1 where halves and chains agree.

    Args:
        draws: (n, m, ...): n >= 4 states of m chains of the same target; further axes (targets,
            coordinates) are pooled.
    """
    _, within, total = _split(draws)
    return float((total / within).sqrt())


def effective_sample_size(draws: Tensor) -> float:
    r"""Independent draws that one chain of n states is worth; `draws` as in `split_r_hat`.

    .. math:: n_{\text{eff}} = \frac{n}{1 + 2 \sum_t \rho_t}, \qquad
        \rho_t = 1 - \frac{V_t}{2\, \widehat{var}^+}

    V_t is the mean squared difference of states t steps apart; the sum ends before the first
    negative pair :math:`\rho_{2j} + \rho_{2j+1}`. A chain that never forgets is worth 1.
    """
    halves, _, total = _split(draws)
    n = len(halves)
    rho = [1.0]
    for lag in range(1, n):
        variogram = (halves[lag:] - halves[:-lag]).square().mean()
        rho.append(float(1 - variogram / (2 * total)))
    pairs = [a + b for a, b in zip(rho[::2], rho[1::2], strict=False)]
    positive = next((j for j, pair in enumerate(pairs) if pair < 0), len(pairs))
    return 2 * n / max(2 * sum(pairs[:positive]) - 1, 1 / (2 * n))


def _split(draws: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Half chains (n/2, 2m, ...), W and var+, the two variances pooled over the further axes."""
    if draws.ndim < 2 or len(draws) < 4:
        raise ValueError(
            f"draws have shape {tuple(draws.shape)}, expected (n, chains, ...) with n of at least"
            " 4: R-hat compares the halves of a chain"
        )
    half = len(draws) // 2
    halves = torch.cat([draws[-2 * half : -half], draws[-half:]], dim=1).double()
    within = halves.var(0).mean()
    between = halves.mean(0).var(0).mean()
    return halves, within, (half - 1) / half * within + between
