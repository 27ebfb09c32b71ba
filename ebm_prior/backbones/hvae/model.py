r"""A small hierarchical VAE: a bottom-up pass over the image, ONE top-down walk over the latents.

The "simple 3-layer hierarchical VAE" of the paper's Figure 8, built as in the contract
(settings.md, "HVAE backbone"). As in a ladder, the posterior of a layer adds to its prior:

.. math:: q(z_i | z_{<i}, x) = N(\mu_i + \sigma_i \Delta\mu_i,\ \log\sigma_i + \Delta\ell_i)

Callers of the walk differ only in how a layer's z is chosen. Layers are listed top first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.backbones.hvae import pixels
from ebm_prior.backbones.hvae.config import HVAEConfig
from ebm_prior.backbones.hvae.pixels import soft_clamp


class Normal(NamedTuple):
    """A diagonal normal distribution."""

    mean: Tensor
    raw: Tensor  # the network's output for log std

    @property
    def log_std(self) -> Tensor:
        """Bounded, never beyond 5."""
        return soft_clamp(self.raw)

    @property
    def std(self) -> Tensor:
        return self.log_std.exp()

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise."""
        noise = torch.randn(
            self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype
        )
        return self.mean + self.std * noise


#: (layer, prior of its z, state before z is added (None at the top)) -> z
Choose = Callable[[int, Normal, "Tensor | None"], Tensor]


class Forward(NamedTuple):
    """Result of a posterior pass over B images."""

    output: Tensor
    kl: list[Tensor]  # per layer (B, C), summed over pixels


def kl_divergence(q: Normal, p: Normal) -> Tensor:
    """KL(q || p), element by element."""
    shift = (q.mean - p.mean) / p.std
    log_ratio = q.log_std - p.log_std
    return 0.5 * (shift.square() + (2 * log_ratio).exp() - 1) - log_ratio


class HVAE(nn.Module):
    """The network of a configuration.

    Args:
        config: see there.
    """

    def __init__(self, config: HVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths, sides, groups = config.widths, config.sides, config.groups
        layers = range(len(widths))
        channels, image_side, _ = config.image_shape
        fold = image_side // sides[-1]

        def cells(width: int, count: int = config.cells) -> list[nn.Module]:
            return [Cell(width, groups) for _ in range(count)]

        first = config.image_width
        if first:
            stem = [nn.Conv2d(channels, first, 3, padding=1), *cells(first)]
            self.stem = nn.Sequential(*stem, _shrink(first, widths[-1], fold))
        else:
            folded = nn.Conv2d(channels * fold**2, widths[-1], 3, padding=1)
            self.stem = nn.Sequential(nn.PixelUnshuffle(fold), folded)
        # `encoder[i]` makes the features of layer i of those of layer i + 1 (or of the stem).
        self.encoder = nn.ModuleList(
            nn.Sequential(
                *([] if i == layers[-1] else _move_up(config, i)),
                *cells(widths[i]),
            )
            for i in layers
        )
        self.start = nn.Parameter(torch.randn(widths[0], sides[0], sides[0]) / 10)
        # `descend[i - 1]`: from the resolution of layer i - 1 to that of layer i.
        self.descend = nn.ModuleList(nn.Sequential(*_move_down(config, i)) for i in layers[1:])
        self.prior = nn.ModuleList(
            nn.Sequential(
                Cell(widths[i], groups), nn.SiLU(), _zero(nn.Conv2d(widths[i], 2 * c, 1))
            )
            for i, (c, _, _) in list(enumerate(config.latents))[1:]
        )
        self.posterior = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(widths[i] * (2 if i else 1), widths[i], 1),
                nn.SiLU(),
                nn.Conv2d(widths[i], 2 * c, 1),
            )
            for i, (c, _, _) in enumerate(config.latents)
        )
        self.add = nn.ModuleList(
            nn.Conv2d(c, widths[i], 1) for i, (c, _, _) in enumerate(config.latents)
        )
        self.cells = nn.ModuleList(nn.Sequential(*cells(width)) for width in widths)
        outputs = pixels.parameters(config)
        if first:
            self.image = nn.Sequential(
                *_grow(widths[-1], first, fold),
                *cells(first, config.cells + 1),
                *_normalised(first, groups),
                nn.Conv2d(first, outputs, 3, padding=1),
            )
        else:
            self.image = nn.Sequential(
                *_normalised(widths[-1], groups),
                nn.Conv2d(widths[-1], outputs * fold**2, 3, padding=1),
                nn.PixelShuffle(fold),
            )
        if config.likelihood == "gaussian":
            self.pixel_log_std = nn.Parameter(torch.tensor(-1.0))

    # --- the two passes -------------------------------------------------------------------

    def encode(self, x: Tensor) -> list[Tensor]:
        """Bottom-up pass over images (B, C, H, W) in [0, 1]: features per layer, top first."""
        h = self.stem(2 * x - 1)
        features: list[Tensor] = []
        for stage in reversed(self.encoder):
            h = stage(h)
            features.append(h)
        return features[::-1]

    def walk(self, batch_size: int, choose: Choose, *, image: bool = True) -> Tensor | None:
        """The top-down walk: ask `choose` for each layer's z, top first.

        Args:
            choose: gets the layer, the prior of its z given the layers above (N(0, I) at the top)
                and the state before z is added (None at the top); returns z.
            image: if False, stop when the last z is chosen: nothing after it is computed.

        Returns:
            The parameters of the pixels' distribution, or None.
        """
        h = self.start.expand(batch_size, -1, -1, -1)
        zeros = h.new_zeros(batch_size, *self.config.latents[0])
        for i, add in enumerate(self.add):
            if i == 0:
                z = choose(0, Normal(zeros, zeros), None)
            else:
                h = self.descend[i - 1](h)
                z = choose(i, _moments(self.prior[i - 1](h)), h)
            if not image and i == len(self.add) - 1:
                return None
            h = self.cells[i](h + add(z))
        return _at_least_float(self.image(h))

    def posterior_of(self, i: int, prior: Normal, h: Tensor | None, feature: Tensor) -> Normal:
        """The posterior of layer i: what it saw of the image adds to the prior."""
        seen = feature if h is None else torch.cat([feature, h], dim=1)
        shift, raw = _moments(self.posterior[i](seen))
        return Normal(prior.mean + prior.std * shift, prior.raw + raw)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Forward:
        """Posterior pass over images (B, C, H, W) in [0, 1], with the analytic KL."""
        features = self.encode(x)
        kl: list[Tensor] = []

        def choose(i: int, prior: Normal, h: Tensor | None) -> Tensor:
            posterior = self.posterior_of(i, prior, h, features[i])
            kl.append(kl_divergence(posterior, prior).sum(dim=(2, 3)))
            return posterior.sample(generator)

        output = self.walk(len(x), choose)
        assert output is not None
        return Forward(output, kl)

    def log_prob(self, output: Tensor, x: Tensor) -> Tensor:
        """log p(x | z) in nats, (B,), of images in [0, 1] on the configuration's levels."""
        log_std = getattr(self, "pixel_log_std", None)
        return pixels.log_prob(self.config, output, x, log_std)

    def mean(self, output: Tensor) -> Tensor:
        """The pixels' means in [0, 1]: what is shown as the image."""
        return pixels.mean(self.config, output)


# --- parts


class Cell(nn.Module):
    """Residual cell: twice [GroupNorm] - SiLU - conv3; the last convolution starts at zero."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *_normalised(width, groups),
            nn.Conv2d(width, width, 3, padding=1),
            *_normalised(width, groups),
            _zero(nn.Conv2d(width, width, 3, padding=1)),
        )

    def forward(self, h: Tensor) -> Tensor:
        return h + self.body(h)


def _normalised(width: int, groups: int) -> list[nn.Module]:
    return [*([nn.GroupNorm(groups, width)] if groups else []), nn.SiLU()]


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _shrink(before: int, after: int, factor: int) -> nn.Module:
    """A convolution that divides the side by the factor."""
    return nn.Conv2d(before, after, 2 * factor - 1, stride=factor, padding=factor - 1)


def _grow(before: int, after: int, factor: int) -> list[nn.Module]:
    """A 1x1 convolution and nearest up-sampling: in this order the same for less."""
    return [nn.Conv2d(before, after, 1), nn.Upsample(scale_factor=factor, mode="nearest")]


def _move_up(config: HVAEConfig, i: int) -> list[nn.Module]:
    """Features of layer i + 1 to the resolution and width of layer i."""
    before, after, factor = *config.widths[i : i + 2][::-1], config.sides[i + 1] // config.sides[i]
    return [] if factor == 1 and before == after else [_shrink(before, after, factor)]


def _move_down(config: HVAEConfig, i: int) -> list[nn.Module]:
    """The state of layer i - 1 to the resolution and width of layer i."""
    before, after, factor = *config.widths[i - 1 : i + 1], config.sides[i] // config.sides[i - 1]
    if factor == 1 and before == after:
        return []
    return [*_grow(before, after, factor), Cell(after, config.groups)]


def _at_least_float(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _moments(output: Tensor) -> Normal:
    return Normal(*_at_least_float(output).chunk(2, dim=1))
