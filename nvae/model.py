"""The auto-encoder: a bottom-up pass over the image, and the ONE top-down walk over the latents.

NVAE paper, section 3. Callers of the walk differ only in how a layer's z is chosen: from the
posterior, from the prior, given z, given u. Attribute names that hold weights are upstream's: they
are the file format. z is a list, the top layer (lowest resolution) first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nvae.arch import ModelConfig
from nvae.cells import Cell, DecoderCombiner, EncoderCombiner
from nvae.distributions import (
    Bernoulli,
    ImageDistribution,
    MixtureOfLogistics,
    Normal,
    NormalDecoder,
)
from nvae.flows import Flow
from nvae.layers import Conv2d, PlainConv2d, SyncedBatchNorm2d

#: (layer, prior of its z, decoder state before z is added (None at the top)) -> z
Choose = Callable[[int, Normal, Tensor | None], Tensor]


class BottomUp(NamedTuple):
    """What the encoder saw: the top features, and for layer i >= 1 `taps[i - 1]`."""

    top: Tensor
    taps: list[Tensor]


class LayerRecord(NamedTuple):
    """One layer of a posterior walk; z before and after the flows."""

    posterior: Normal
    prior: Normal
    z_before_flow: Tensor
    z: Tensor


class Forward(NamedTuple):
    """Result of a posterior pass over B images with L layers."""

    logits: Tensor
    log_q: Tensor  # (B,), summed over layers, channels, pixels; z before the flows
    log_p: Tensor  # (B,), z after the flows
    kl_all: list[Tensor]  # per layer (B,), summed over channels and pixels
    kl_diag: list[Tensor]  # per layer (nz,), summed over pixels, averaged over the batch
    z: list[Tensor]
    layers: list[LayerRecord]


class AutoEncoder(nn.Module):
    """NVAE of a given configuration, with upstream's state-dict names, shapes and order."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        enc, dec = config.num_channels_enc, config.num_channels_dec
        nz, top = config.num_latent_per_group, config.top_level
        levels = config.levels_of_groups
        top_size = config.image_size >> top

        # Registration order is the order of the keys in files.
        self.prior_ftr0 = nn.Parameter(torch.rand(dec << top, top_size, top_size))
        self.stem = Conv2d(config.image_shape[0], enc, 3, padding=1)
        self.pre_process = nn.ModuleList(self._pre_cells())
        # Decoder layer i >= 1 uses combiner `_combiners[i - 1]` of the encoder's tower.
        self._combiners: list[int] = []
        if not config.vanilla:
            self.enc_tower = nn.ModuleList(self._encoder_cells())
            self._combiners = [
                index
                for index, cell in enumerate(self.enc_tower)
                if isinstance(cell, EncoderCombiner)
            ][::-1]
        self.enc0 = nn.Sequential(nn.ELU(), Conv2d(enc << top, enc << top, 1), nn.ELU())
        self.enc_sampler = nn.ModuleList(
            Conv2d(enc << level, 2 * nz, 3, padding=1) for level in levels
        )
        self.dec_sampler = nn.ModuleList(
            nn.Sequential(nn.ELU(), Conv2d(dec << level, 2 * nz, 1)) for level in levels[1:]
        )
        self.nf_cells = nn.ModuleList(Flow(nz) for _ in range(config.num_groups * config.num_nf))
        if config.vanilla:
            self.stem_decoder = Conv2d(nz, enc << top, 1)
        else:
            self.dec_tower = nn.ModuleList(self._decoder_cells())
        self.post_process = nn.ModuleList(self._post_cells())
        self.image_conditional = nn.Sequential(
            nn.ELU(), Conv2d(dec, config.output_channels, 3, padding=1)
        )

    @property
    def latent_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of each z, the top layer first."""
        return self.config.latent_shapes

    def _cell(self, kind: str, channels: int) -> Cell:
        stride = {"normal": 1, "down": 2, "up": -1}[kind.split("_")[0]]
        return Cell(self.config.cells[kind], channels, stride, self.config.use_se)

    def _pre_cells(self) -> Iterator[nn.Module]:
        config = self.config
        for level in range(config.num_preprocess_blocks):
            width = config.num_channels_enc << level
            for _ in range(config.num_preprocess_cells - 1):
                yield self._cell("normal_pre", width)
            yield self._cell("down_pre", width)

    def _encoder_cells(self) -> Iterator[nn.Module]:
        config = self.config
        last_scale = config.num_latent_scales - 1
        for scale, groups in enumerate(config.groups_per_scale):
            level = config.num_preprocess_blocks + scale
            enc, dec = config.num_channels_enc << level, config.num_channels_dec << level
            for group in range(groups):
                for _ in range(config.num_cell_per_cond_enc):
                    yield self._cell("normal_enc", enc)
                if scale < last_scale or group < groups - 1:  # the top layer needs none
                    yield EncoderCombiner(enc, dec)
            if scale < last_scale:
                yield self._cell("down_enc", enc)

    def _decoder_cells(self) -> Iterator[nn.Module]:
        config = self.config
        for scale in reversed(range(config.num_latent_scales)):
            level = config.num_preprocess_blocks + scale
            width = config.num_channels_dec << level
            for group in range(config.groups_per_scale[scale]):
                if level < config.top_level or group > 0:  # the learned start precedes the first
                    for _ in range(config.num_cell_per_cond_dec):
                        yield self._cell("normal_dec", width)
                yield DecoderCombiner(width, config.num_latent_per_group)
            if scale > 0:
                yield self._cell("up_dec", width)

    def _post_cells(self) -> Iterator[nn.Module]:
        config = self.config
        for level in reversed(range(config.num_postprocess_blocks)):
            width = config.num_channels_dec << level
            yield self._cell("up_post", 2 * width)
            for _ in range(config.num_postprocess_cells - 1):
                yield self._cell("normal_post", width)

    def encode(self, x: Tensor) -> BottomUp:
        """Bottom-up pass over images (B, C, H, W) in [0, 1]: all the posterior needs of them."""
        h = self.stem(2 * x - 1)
        for cell in self.pre_process:
            h = cell(h)
        taps: list[Tensor] = []
        if not self.config.vanilla:
            for cell in self.enc_tower:
                if isinstance(cell, EncoderCombiner):
                    taps.append(h)
                else:
                    h = cell(h)
        return BottomUp(self.enc0(h), taps[::-1])

    def walk(self, batch_size: int, choose: Choose, *, image: bool = True) -> Tensor | None:
        """The top-down walk: ask `choose` for each layer's z, top first.

        Args:
            choose: gets the layer, the prior of its z given the layers above (before any
                temperature; at the top mean 0 and deviation 1.01), and the decoder state before z
                is added (None at the top); returns z.
            image: if False, stop when the last z is chosen: nothing after it is computed.

        Returns:
            The logits of the image distribution, or None.
        """
        last = self.config.num_groups - 1
        start = self.prior_ftr0.expand(batch_size, -1, -1, -1)
        zeros = start.new_zeros(batch_size, *self.latent_shapes[0])
        z = choose(0, Normal.from_raw(zeros, zeros), None)
        if self.config.vanilla:
            if not image:
                return None
            h = self.stem_decoder(z)
        else:
            h, layer = start, 0
            for cell in self.dec_tower:
                if not isinstance(cell, DecoderCombiner):
                    h = cell(h)
                    continue
                if layer > 0:
                    mean, log_std = self.dec_sampler[layer - 1](h).chunk(2, dim=1)
                    z = choose(layer, Normal.from_raw(mean, log_std), h)
                if layer == last and not image:
                    return None
                h = cell(h, z)
                layer += 1
        for cell in self.post_process:
            h = cell(h)
        return self.image_conditional(h)

    def posterior_choice(
        self,
        bottom_up: BottomUp,
        eps: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
        record: list[LayerRecord] | None = None,
    ) -> Choose:
        """Choose each z from the posterior of the encoded images, flows applied.

        Args:
            eps: noise per layer, shaped like z; zeros give the posterior's mean, flowed.
            record: receives one entry per layer.
        """
        if eps is not None:
            self._check_latents("eps", eps, bottom_up.top.shape[0])

        def choose(layer: int, prior: Normal, h: Tensor | None) -> Tensor:
            features = bottom_up.top
            if h is not None:
                combine = self.enc_tower[self._combiners[layer - 1]]
                features = combine(bottom_up.taps[layer - 1], h)
            mean, log_std = self.enc_sampler[layer](features).chunk(2, dim=1)
            if self.config.res_dist and h is not None:
                # The raw outputs are added; the soft clamp comes after.
                assert prior.raw is not None
                mean, log_std = prior.raw[0] + mean, prior.raw[1] + log_std
            posterior = Normal.from_raw(mean, log_std)
            z = z_before_flow = posterior.sample(generator, None if eps is None else eps[layer])
            flows = self.config.num_nf
            for flow in self.nf_cells[layer * flows : (layer + 1) * flows]:
                z = flow(z)
            if record is not None:
                record.append(LayerRecord(posterior, prior, z_before_flow, z))
            return z

        return choose

    def forward(
        self,
        x: Tensor,
        eps: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Forward:
        """Posterior pass over images (B, C, H, W) in [0, 1].

        The KL is analytic; with flows it is the one-sample estimate log q - log p, which may be
        negative.
        """
        if x.shape[1:] != self.config.image_shape:
            raise ValueError(
                f"images of shape {tuple(x.shape)}, expected (B, "
                f"{', '.join(map(str, self.config.image_shape))}) for {self.config.dataset}"
            )
        return self.posterior_pass(self.encode(x), eps, generator)

    def posterior_pass(
        self,
        bottom_up: BottomUp,
        eps: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Forward:
        """`forward` from what the encoder saw: repeated draws need the encoder only once."""
        layers: list[LayerRecord] = []
        choose = self.posterior_choice(bottom_up, eps, generator, layers)
        logits = self.walk(bottom_up.top.shape[0], choose)
        assert logits is not None
        log_q = [layer.posterior.log_prob(layer.z_before_flow) for layer in layers]
        log_p = [layer.prior.log_prob(layer.z) for layer in layers]
        if self.config.num_nf:
            kl = [q - p for q, p in zip(log_q, log_p, strict=True)]
        else:
            kl = [layer.posterior.kl(layer.prior) for layer in layers]
        return Forward(
            logits=logits,
            log_q=torch.stack([q.sum(dim=(1, 2, 3)) for q in log_q]).sum(0),
            log_p=torch.stack([p.sum(dim=(1, 2, 3)) for p in log_p]).sum(0),
            kl_all=[k.sum(dim=(1, 2, 3)) for k in kl],
            kl_diag=[k.sum(dim=(2, 3)).mean(0) for k in kl],
            z=[layer.z for layer in layers],
            layers=layers,
        )

    def sample(
        self,
        num_samples: int,
        t: float,
        *,
        u: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Logits of `num_samples` images from the prior, :math:`z_i = \mu_i + t \sigma_i u_i`.

        Args:
            t: temperature of the latents (upstream's name); the pixels have their own.
            u: noise per layer, shaped like z; drawn layer by layer if not given.
        """
        if u is not None:
            self._check_latents("u", u, num_samples)

        def choose(layer: int, prior: Normal, h: Tensor | None) -> Tensor:
            return prior.tempered(t).sample(generator, None if u is None else u[layer])

        logits = self.walk(num_samples, choose)
        assert logits is not None
        return logits

    def decoder_output(self, logits: Tensor) -> ImageDistribution:
        """The distribution of images in [0, 1] that the logits stand for, at least in float32."""
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        if self.config.data.output == "bernoulli":
            return Bernoulli(logits)
        if self.config.data.output == "grey":
            return MixtureOfLogistics(logits, self.config.levels, channels=1)
        if self.config.num_mixture_dec == 1:
            return NormalDecoder(logits)
        return MixtureOfLogistics(logits, self.config.levels)

    def conv_layers(self) -> list[Conv2d | PlainConv2d]:
        """Every convolution, in module order: what the spectral regulariser looks at."""
        return [m for m in self.modules() if isinstance(m, (Conv2d, PlainConv2d))]

    def batch_norms(self) -> list[tuple[str, SyncedBatchNorm2d]]:
        """Every BatchNorm with its state-dict prefix, in module order."""
        return [(n, m) for n, m in self.named_modules() if isinstance(m, SyncedBatchNorm2d)]

    def _check_latents(self, name: str, values: Sequence[Tensor], batch_size: int) -> None:
        expected = [(batch_size, *shape) for shape in self.latent_shapes]
        got = [tuple(value.shape) for value in values]
        if got != expected:
            raise ValueError(f"{name}: got shapes {got}, expected {expected}, the top layer first")
