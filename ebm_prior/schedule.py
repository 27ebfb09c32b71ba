r"""The forward diffusion of u: signal and noise of each step, and the Langevin step sizes.

Paper, Section 3.2 (Eqs. 6 and 7). State 0 is the clean u with 1% of noise, state N is noise.
Entry 0 of every array leads from the data to state 0, entry t+1 from state t to state t+1.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINE = 1000  # steps of the underlying linear line of betas, 1e-4 to 2e-2
STEP_RULES = ("cumulative", "plain")
LONGEST = LINE // 2 + 1  # beyond it neighbouring knots fall together


class Schedule:
    r"""Signal and noise coefficients for N = `max_T` diffusion steps.

    .. math::
        \bar\alpha_k = \prod_{j=0}^{n_k} \sqrt{1-\beta_j}, \quad
        \alpha_k = \bar\alpha_k / \bar\alpha_{k-1}, \quad
        \sigma_k^2 = 1 - \alpha_k^2, \quad \bar\sigma_k^2 = 1 - \bar\alpha_k^2

    with knots n_k = k floor(1000 / (2 (N-1))) for k < N and n_N = 999: N entries cover the first
    half of the line, the last jumps over the second. N = 1, which divides by zero in the
    reference, has the knots (0, 999).

    Args:
        max_T: N, at least 1.
        last_step_kernel: keep the term |alpha_N u - u_N|^2 at the last index, as the paper's
            Eq. 9 does. The reference drops it (recovery flag 0), and so does the default.

    Attributes:
        alpha, sigma, alpha_bar, sigma_bar: (N+1,) float64 on the CPU; cast where used.
        recovery: (N+1,), the flag r_k of the kernel term.
        knots: the n_k.
    """

    def __init__(self, max_T: int, last_step_kernel: bool = False) -> None:
        if type(max_T) is not int or not 1 <= max_T <= LONGEST:
            raise ValueError(
                f"max_T is {max_T!r}, expected a whole number of diffusion steps from 1 to"
                f" {LONGEST}"
            )
        self.max_T = max_T
        stride = LINE // (2 * (max_T - 1)) if max_T > 1 else 0
        self.knots = [k * stride for k in range(max_T)] + [LINE - 1]
        beta = torch.linspace(1e-4, 2e-2, LINE, dtype=torch.float64)
        self.alpha_bar = torch.cumprod((1 - beta).sqrt(), dim=0)[self.knots]
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])
        self.alpha = self.alpha_bar / before
        self.sigma = (1 - self.alpha.square()).sqrt()
        self.sigma_bar = (1 - self.alpha_bar.square()).sqrt()
        self.recovery = torch.ones_like(self.alpha)
        self.recovery[-1] = float(last_step_kernel)

    def step_size(self, b2: float, rule: str = "cumulative") -> Tensor:
        r"""(N,): the Langevin step size e2(t) of every diffusion index t = 0..N-1.

        .. math::
            e^2(t) = b^2\, \frac{\bar\sigma_t}{\bar\sigma_0}\, \sigma_{t+1}^2
            \;\text{("cumulative")}, \qquad e^2(t) = b^2 \sigma_{t+1}^2 \;\text{("plain")}

        The first is the reference's; its ratio is not squared, although the reference's variable
        is called a squared constant. The second suits latents of fewer than about 1e4
        coordinates, which the first does not move.
        """
        if rule not in STEP_RULES:
            raise ValueError(f"step rule is {rule!r}, expected one of {', '.join(STEP_RULES)}")
        plain = b2 * self.sigma[1:].square()
        return plain * self.sigma_bar[:-1] / self.sigma_bar[0] if rule == "cumulative" else plain


def at(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """(B, 1): `values[index]` per sample, on the device and in the precision of `like`."""
    return values.to(like.dtype).to(like.device)[index].unsqueeze(1)


def forward_pair(
    u: Tensor, t: Tensor, schedule: Schedule, noise: Tensor, noise_next: Tensor
) -> tuple[Tensor, Tensor]:
    r"""Draw the pair (u_t, u_{t+1}) a training step contrasts (paper, Algorithm 1).

    .. math::
        u_t = \bar\alpha_t u + \bar\sigma_t \epsilon, \qquad
        u_{t+1} = \alpha_{t+1} u_t + \sigma_{t+1} \epsilon'

    Args:
        u: clean, (B, D).
        t: (B,) whole numbers 0..N-1, drawn per sample.
        noise, noise_next: the two independent standard normals, (B, D) each.
    """
    u_t = at(schedule.alpha_bar, t, u) * u + at(schedule.sigma_bar, t, u) * noise
    u_next = at(schedule.alpha, t + 1, u) * u_t + at(schedule.sigma, t + 1, u) * noise_next
    return u_t, u_next
