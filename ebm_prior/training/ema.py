"""An exponential moving average of a module's weights, for evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class Average:
    r"""Shadow weights: :math:`\bar w \leftarrow d \bar w + (1 - d) w` after every update.

    Only parameters are averaged. Buffers (the vectors of spectral norm) keep the module's values:
    unit vectors have no average of use, and a slowly moving weight fits the latest ones best.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay = module, decay
        self.shadow = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self) -> None:
        live: list[Tensor] = list(self.module.parameters())
        torch._foreach_lerp_(list(self.shadow.values()), live, 1 - self.decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The module has the averaged weights inside, its own again afterwards, to the bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.data, self.shadow[name] = self.shadow[name], parameter.data

    def state_dict(self) -> dict[str, Tensor]:
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.shadow.items():
            average.copy_(state[name])
