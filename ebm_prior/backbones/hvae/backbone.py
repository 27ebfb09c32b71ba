"""The small hierarchical VAE as a backbone: the map between x, u and z of a frozen `HVAE`.

Coordinates as in the paper's Sec. 3.1: z_i = mu_i(z above) + temperature * sigma_i(z above) u_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebm_prior.backbones.hvae.model import HVAE, Choose, Normal
from ebm_prior.backbones.top_down import TopDown
from ebm_prior.fingerprint import fingerprint
from ebm_prior.latents import Layout


class HVAEBackbone(TopDown):
    """A frozen view of a network: the same memory, no gradient to it.

    The network itself keeps its mode and its `requires_grad`.
    """

    def __init__(self, model: HVAE) -> None:
        self.config = model.config
        self.layout = Layout(model.config.latents)
        with torch.device("meta"):
            view = HVAE(model.config)
        view.load_state_dict(model.state_dict(), assign=True)
        self.model = view.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        return self.model.start.device

    def fingerprint(self) -> str:
        """The parameters' name: `ebm_prior.fingerprint.fingerprint`."""
        return fingerprint(self.model.state_dict())

    @torch.no_grad()
    def infer(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Draw from the posterior and standardise by the prior, in one pass.

        Args:
            x: (B, C, H, W) in [0, 1].

        Returns:
            u, (B, D).
        """
        return self._drawn(x, lambda i, posterior: posterior.sample(generator))

    @torch.no_grad()
    def infer_with(self, x: Tensor, eps: Sequence[Tensor]) -> Tensor:
        """`infer` with its noise given, one (B, \\*shape) tensor per layer."""
        return self._drawn(x, lambda i, posterior: posterior.mean + posterior.std * eps[i])

    def _drawn(self, x: Tensor, draw: Callable[[int, Normal], Tensor]) -> Tensor:
        def posterior() -> Choose:
            features = self.model.encode(x)
            return lambda i, prior, h: draw(i, self.model.posterior_of(i, prior, h, features[i]))

        return self.standardised(x, posterior)

    @torch.no_grad()
    def decode(
        self, u: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean image at T(u), (B, C, H, W) in [0, 1]; nothing is drawn.

        The noise is independent from pixel to pixel: a draw is the mean with grain on it.
        `generator` is taken for the protocol's sake.
        """
        return self.model.mean(self.logits(u, temperature))
