"""The small hierarchical VAE as a backbone: the map between x, u and z of a frozen `HVAE`.

Coordinates as in the paper's Sec. 3.1: z_i = mu_i(z above) + temperature * sigma_i(z above) u_i.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebm_prior.backbones.base import Moments
from ebm_prior.backbones.hvae.model import HVAE, Choose, Normal
from ebm_prior.fingerprint import fingerprint
from ebm_prior.latents import Layout


class HVAEBackbone:
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
        return self._standardised(x, lambda i, posterior: posterior.sample(generator))

    @torch.no_grad()
    def infer_with(self, x: Tensor, eps: Sequence[Tensor]) -> Tensor:
        """`infer` with its noise given, one (B, \\*shape) tensor per layer."""
        return self._standardised(x, lambda i, posterior: posterior.mean + posterior.std * eps[i])

    def _standardised(self, x: Tensor, draw: Callable[[int, Normal], Tensor]) -> Tensor:
        if x.ndim != 4 or tuple(x.shape[1:]) != self.config.image_shape:
            raise ValueError(
                f"images have shape {tuple(x.shape)}, expected (B,"
                f" {', '.join(map(str, self.config.image_shape))}) with values in [0, 1]"
            )
        features = self.model.encode(x)
        u: list[Tensor] = []

        def choose(i: int, prior: Normal, h: Tensor | None) -> Tensor:
            z = draw(i, self.model.posterior_of(i, prior, h, features[i]))
            u.append((z - prior.mean) / prior.std)
            return z

        self.model.walk(len(x), choose, image=False)
        return self.layout.join(u)

    def to_z(self, u: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """T, differentiable in u; the walk ends at the last latent, no image is made."""
        z: list[Tensor] = []
        self.model.walk(len(u), self._given(u, temperature, z), image=False)
        return z

    @torch.no_grad()
    def to_u(self, z: Sequence[Tensor]) -> Tensor:
        """T^-1: no temperature, moments computed from the given z."""
        pairs = zip(z, self.moments(z), strict=True)
        return self.layout.join([(z_i - layer.mean) / layer.std for z_i, layer in pairs])

    def moments(self, z: Sequence[Tensor]) -> list[Moments]:
        """Per layer the prior's moments, and the state before z_i is added."""
        found: list[Moments] = []

        def choose(i: int, prior: Normal, h: Tensor | None) -> Tensor:
            found.append(Moments(prior.mean, prior.std, h))
            return z[i]

        self.model.walk(len(z[0]), choose, image=False)
        return found

    @torch.no_grad()
    def decode(
        self, u: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> Tensor:
        """The mean image at T(u), (B, C, H, W) in [0, 1]; nothing is drawn.

        The noise is independent from pixel to pixel: a draw is the mean with grain on it.
        `generator` is taken for the protocol's sake.
        """
        output = self.model.walk(len(u), self._given(u, temperature, []))
        assert output is not None
        return self.model.mean(output)

    def _given(self, u: Tensor, temperature: float, z: list[Tensor]) -> Choose:
        """A `choose` that takes z_i from u and notes it in `z`."""
        parts = self.layout.split(u)

        def choose(i: int, prior: Normal, h: Tensor | None) -> Tensor:
            z.append(prior.mean + temperature * prior.std * parts[i])
            return z[-1]

        return choose
