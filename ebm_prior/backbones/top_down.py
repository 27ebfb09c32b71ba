"""The maps between u and z of any model with a top-down walk; each is one walk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ebm_prior.backbones.base import Moments
from ebm_prior.latents import Layout


class Prior(Protocol):
    """The prior of a layer's z, given the layers above."""

    @property
    def mean(self) -> Tensor: ...

    @property
    def std(self) -> Tensor: ...


#: (layer, prior of its z, state before z is added (None at the top)) -> z
Choose = Callable[[int, Any, "Tensor | None"], Tensor]


class TopDown:
    """What the adapters share.

    Attributes:
        model: has `walk(batch_size, choose, image=)`, which asks `choose` for each layer's z.
        config: has the `image_shape`.
    """

    model: Any
    config: Any
    layout: Layout

    def standardised(self, x: Tensor, posterior: Callable[[], Choose]) -> Tensor:
        """u (B, D) of the z that the posterior of checked images x chooses, in one walk."""
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self.config.image_shape):
            raise ValueError(
                f"images have shape {tuple(x.shape)}, expected (B,"
                f" {', '.join(map(str, self.config.image_shape))}) with values in [0, 1]"
            )
        draw = posterior()
        u: list[Tensor] = []

        def choose(i: int, prior: Prior, h: Tensor | None) -> Tensor:
            z = draw(i, prior, h)
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
        """Per layer the prior's moments, and the decoder state before z_i is added."""
        found: list[Moments] = []

        def choose(i: int, prior: Prior, h: Tensor | None) -> Tensor:
            found.append(Moments(prior.mean, prior.std, h))
            return z[i]

        self.model.walk(len(z[0]), choose, image=False)
        return found

    def logits(self, u: Tensor, temperature: float = 1.0) -> Tensor:
        """The decoder's raw output at T(u), differentiable in u."""
        logits = self.model.walk(len(u), self._given(u, temperature, []))
        assert logits is not None
        return logits

    def _given(self, u: Tensor, temperature: float, z: list[Tensor]) -> Choose:
        """A `choose` that takes z_i from u and notes it in `z`."""
        parts = self.layout.split(u)

        def choose(i: int, prior: Prior, h: Tensor | None) -> Tensor:
            z.append(prior.mean + temperature * prior.std * parts[i])
            return z[-1]

        return choose
