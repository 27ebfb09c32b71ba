"""The energy networks f_i(z_i, t), one per latent layer, shared over t (contract, networks.md).

f is a log density ratio: bigger = more probable, the energy is -f. The convolutional variants A
and B have no biases and take maps of 8 to 128 pixels a side, as published; smaller and non-square
maps keep the number of layers and trade stride-2 convolutions for 3x3 ones that keep the size.

Attribute names that hold weights are the file format (`netE0.conv_start.weight_orig`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ebm_prior.coupling import Coupling
from ebm_prior.spectral_norm import SNConv2d, SNLinear, in_shares

if TYPE_CHECKING:
    from ebm_prior.config import PriorConfig

EMBEDDING = 128  # values of the time embedding


def time_embedding(t: Tensor, size: int = EMBEDDING) -> Tensor:
    r"""(B,) -> (B, size): cosines, then sines, of t at geometric frequencies.

    .. math:: w_j = 10000^{-j/h}, \; j = 0..h-1, \; h = \lfloor size/2 \rfloor

    In float32; an odd size gets a trailing zero.
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angle = t.float().unsqueeze(1) * torch.exp(-math.log(10000.0) / half * steps)
    parts = [angle.cos(), angle.sin(), *([torch.zeros_like(angle[:, :1])] if size % 2 else [])]
    return torch.cat(parts, dim=1)


def linear(size_in: int, size_out: int, spectral_norm: bool, bias: bool = False) -> nn.Module:
    """A dense layer, under spectral normalisation or not."""
    return (SNLinear if spectral_norm else nn.Linear)(size_in, size_out, bias=bias)


def conv(size_in: int, size_out: int, halve: tuple[bool, bool], spectral_norm: bool) -> nn.Module:
    """Padding 1 and, per side, 4 wide with stride 2 where it halves, else 3 wide with stride 1."""
    kernel, stride = (tuple(4 if h else 3 for h in halve), tuple(2 if h else 1 for h in halve))
    layer = SNConv2d if spectral_norm else nn.Conv2d
    return layer(size_in, size_out, kernel, stride, padding=1, bias=False)  # type: ignore[arg-type]


def halvings(
    shape: Sequence[int], final: int, at_least: int
) -> tuple[list[tuple[bool, bool]], int]:
    """Which convolutions halve which side of a map until each is min(side, `final`).

    Returns:
        Per convolution (height halved, width halved), at least `at_least` of them, and the number
        of pixels of the last map.
    """
    if len(shape) != 3 or any(side & (side - 1) for side in shape[1:]):
        raise ValueError(
            f"latents of shape {tuple(shape)} do not suit a convolutional energy, which needs"
            " (C, H, W) with H and W powers of two; use network 'mlp'"
        )
    height, width = shape[1:]
    plan: list[tuple[bool, bool]] = []
    while height > final or width > final or len(plan) < at_least:
        plan.append((height > final, width > final))
        height, width = (side // 2 if side > final else side for side in (height, width))
    return plan, height * width


class Energy(nn.Module):
    """A network f(z, t) in two parts: what it makes of t, and the rest, which takes that."""

    def timed(self, embedding: Tensor) -> list[Tensor]:
        """Everything that t enters by, made of its embedding (B, 128); `f` takes it."""
        raise NotImplementedError

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        """z (B, \\*shape) -> f (B, outputs)."""
        raise NotImplementedError

    def forward(self, z: Tensor, t: Tensor) -> Tensor:
        """z (B, \\*shape), t (B,) -> f (B, outputs)."""
        return self.f(z, self.timed(time_embedding(t).to(z.dtype)))


class TimedNet(Energy):
    """What variants A and B share: SiLU-first layers and dense residual pairs that see time.

    Attributes:
        forks: pairs of children that get the same input.
        merged: for the first of a pair, a module that gives what both give, side by side.
    """

    forks: tuple[tuple[str, str], ...] = ()

    def __init__(self, spectral_norm: bool) -> None:
        super().__init__()
        self.spectral_norm = spectral_norm
        self.merged: dict[str, nn.Module] = {}

    def fork(self, first: str, second: str, x: Tensor) -> tuple[Tensor, ...]:
        """What both children make of x; one of `forks`."""
        if first in self.merged:
            return self.merged[first](x).chunk(2, dim=1)
        return self.get_submodule(first)(x), self.get_submodule(second)(x)

    def silu_linear(self, size_in: int, size_out: int) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), linear(size_in, size_out, self.spectral_norm))

    def silu_conv(
        self, size_in: int, size_out: int, halve: tuple[bool, bool] = (False, False)
    ) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), conv(size_in, size_out, halve, self.spectral_norm))

    def time_mlp(self, size: int) -> nn.Sequential:
        return nn.Sequential(
            linear(EMBEDDING, size, self.spectral_norm),
            nn.SiLU(),
            linear(size, size, self.spectral_norm),
        )

    def add_pair(self, name: str, size_in: int, size_out: int) -> None:
        self.add_module(f"{name}_x", self.silu_linear(size_in, size_out))
        self.add_module(f"{name}_t", self.silu_linear(EMBEDDING, size_out))
        self.add_module(f"{name}_all", self.silu_linear(size_out, size_out))
        self.add_module(f"{name}_short", self.silu_linear(size_in, size_out))

    def pair(self, name: str, v: Tensor, timed: Tensor) -> Tensor:
        x, short = self.fork(f"{name}_x", f"{name}_short", v)
        return self.get_submodule(f"{name}_all")(x + timed) + short


PAIRS = tuple((f"linear{i}_x", f"linear{i}_short") for i in (1, 2))


class ResidualBlock(TimedNet):
    """y -> conv'(SiLU y) + conv3(SiLU(conv(SiLU y) + s)), half the size; s = Lin(SiLU e)."""

    forks = (("conv2d_1", "conv2d_shortcut"),)

    def __init__(self, width: int, halve: tuple[bool, bool], spectral_norm: bool) -> None:
        super().__init__(spectral_norm)
        self.conv2d_1 = self.silu_conv(width, width, halve)
        self.conv2d_2 = self.silu_conv(width, width)
        self.conv2d_shortcut = self.silu_conv(width, width, halve)
        self.linear = self.silu_linear(EMBEDDING, width)

    def timed(self, embedding: Tensor) -> list[Tensor]:
        return [self.linear(embedding)[..., None, None]]

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        g, short = self.fork("conv2d_1", "conv2d_shortcut", z)
        return short + self.conv2d_2(g + timed[0])


class ResidualEnergy(TimedNet):
    """Variant A, the paper's for CIFAR-10: residual blocks down to 2x2, time enters everywhere.

    Args:
        shape: (C, H, W) of the layer; `width` is the contract's ch, published 128.
    """

    forks = (("conv_start", "conv_short"), *PAIRS)

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        spectral_norm: bool = True,
        outputs: int = 1,
    ) -> None:
        super().__init__(spectral_norm)
        (first, *rest), pixels = halvings(shape, final=2, at_least=2)
        channels, hid = shape[0], width * pixels
        # The order of these lines is the order of the optimiser state in checkpoints.
        self.t_ebm_model1 = self.time_mlp(channels)
        self.t_ebm_model2 = self.time_mlp(EMBEDDING)
        self.conv_start = conv(channels, width, first, spectral_norm)
        self.t_linear = self.silu_linear(EMBEDDING, width)
        self.conv_all = self.silu_conv(width, width)
        self.conv_short = conv(channels, width, first, spectral_norm)
        self.res_blocks = nn.ModuleList(ResidualBlock(width, h, spectral_norm) for h in rest)
        self.add_pair("linear1", hid, 2 * width)
        self.add_pair("linear2", 2 * width, width)
        self.out = self.silu_linear(width, outputs)

    def timed(self, embedding: Tensor) -> list[Tensor]:
        e = self.t_ebm_model2(embedding)
        maps = [self.t_ebm_model1(embedding), self.t_linear(e)]
        return [
            *(part[..., None, None] for part in maps),
            *(part for block in self.res_blocks for part in _energy(block).timed(e)),
            *(self.get_submodule(f"linear{i}_t")(e) for i in (1, 2)),
        ]

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        shift, start, *blocks, first, second = timed
        x = z + shift
        g, short = self.fork("conv_start", "conv_short", x)
        y = self.conv_all(g + start) + short
        for block, part in zip(self.res_blocks, blocks, strict=True):
            y = _energy(block).f(y, [part])
        return self.out(self.pair("linear2", self.pair("linear1", y.flatten(1), first), second))


class ConvEnergy(TimedNet):
    """Variant B, the paper's for CelebA-HQ-256: plain convolutions to 4x4, time in the dense part.

    Args:
        shape: (C, H, W) of the layer; `width` is the contract's ch, published 64.
    """

    forks = PAIRS

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 64,
        spectral_norm: bool = True,
        outputs: int = 1,
    ) -> None:
        super().__init__(spectral_norm)
        (*early, last), pixels = halvings(shape, final=4, at_least=1)
        channels, hid = shape[0], width * pixels
        self.t_ebm_model1 = self.time_mlp(EMBEDDING)
        self.conv2d = nn.Sequential()
        for number, halve in enumerate(early, start=1):
            self.conv2d.add_module(f"conv{number}", conv(channels, width, halve, spectral_norm))
            self.conv2d.add_module(f"silu{number}", nn.SiLU())
            channels = width
        self.downsample = conv(channels, width, last, spectral_norm)
        self.add_pair("linear1", hid, 8 * width)
        self.add_pair("linear2", 8 * width, 4 * width)
        self.out = self.silu_linear(4 * width, outputs)

    def timed(self, embedding: Tensor) -> list[Tensor]:
        e = self.t_ebm_model1(embedding)
        return [self.get_submodule(f"linear{i}_t")(e) for i in (1, 2)]

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        v = self.downsample(self.conv2d(z)).flatten(1)
        return self.out(self.pair("linear2", self.pair("linear1", v, timed[0]), timed[1]))


class MLPEnergy(Energy):
    """Variant C, for vector latents and small maps, which it flattens: dense, with biases.

    y = Lin(z) + E(t), `depth` times y <- y + Lin(SiLU(y)), f = Lin(SiLU(y)).
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 128,
        depth: int = 2,
        spectral_norm: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()

        def dense(size_in: int, size_out: int) -> nn.Module:
            return linear(size_in, size_out, spectral_norm, bias=True)

        self.input = dense(math.prod(shape), width)
        self.time = nn.Sequential(dense(EMBEDDING, width), nn.SiLU(), dense(width, width))
        self.layers = nn.ModuleList(
            nn.Sequential(nn.SiLU(), dense(width, width)) for _ in range(depth)
        )
        self.out = nn.Sequential(nn.SiLU(), dense(width, outputs))

    def timed(self, embedding: Tensor) -> list[Tensor]:
        return [self.time(embedding)]

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        y = self.input(z.flatten(1)) + timed[0]
        for layer in self.layers:
            y = y + layer(y)
        return self.out(y)


class MapEnergy(Energy):
    """Our own, for maps of any size, light and with biases; a vector counts as a map of 1x1.

    conv3 plus E(t), then a local head (conv1, summed over the map) beside strided convolutions to
    4x4, two residual conv3 and a dense head: local structure has a short way to the output
    (contract, experiments.md, "Small HVAE").
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 64,
        spectral_norm: bool = False,
        outputs: int = 1,
    ) -> None:
        super().__init__()

        def dense(size_in: int, size_out: int) -> nn.Module:
            return linear(size_in, size_out, spectral_norm, bias=True)

        convolution = SNConv2d if spectral_norm else nn.Conv2d

        def conv3(size_in: int, stride: tuple[int, int] = (1, 1)) -> nn.Module:
            return convolution(size_in, width, 3, stride, padding=1)

        channels, high, wide = self.shape = (*shape, 1, 1)[:3]
        self.time = nn.Sequential(dense(EMBEDDING, width), nn.SiLU(), dense(width, width))
        self.first = conv3(channels)
        self.local = nn.Sequential(nn.SiLU(), convolution(width, outputs, 1))
        self.down = nn.Sequential()
        while max(high, wide) > 4:
            stride = (2 if high > 4 else 1, 2 if wide > 4 else 1)
            self.down.extend([nn.SiLU(), conv3(width, stride)])
            high, wide = -(-high // stride[0]), -(-wide // stride[1])
        self.blocks = nn.ModuleList(nn.Sequential(nn.SiLU(), conv3(width)) for _ in range(2))
        self.out = nn.Sequential(
            nn.SiLU(), nn.Flatten(), dense(width * high * wide, 64), nn.SiLU(), dense(64, outputs)
        )

    def timed(self, embedding: Tensor) -> list[Tensor]:
        return [self.time(embedding)[..., None, None]]

    def f(self, z: Tensor, timed: list[Tensor]) -> Tensor:
        y = self.first(z.reshape(-1, *self.shape)) + timed[0]
        local = self.local(y).sum((2, 3)) / math.sqrt(math.prod(self.shape[1:]))
        y = self.down(y)
        for block in self.blocks:
            y = y + block(y)
        return self.out(y) + local


def _energy(module: nn.Module) -> Energy:
    """A child of a `ModuleList`, whose type is not told."""
    assert isinstance(module, Energy)
    return module


def net_of(config: PriorConfig, shape: Sequence[int], outputs: int = 1) -> nn.Module:
    """A fresh network as a prior's configuration asks for, on inputs of this shape."""
    width, sn = config.width, config.spectral_norm
    if config.network == "mlp":
        return MLPEnergy(shape, width, config.depth, sn, outputs)
    variant = {"residual": ResidualEnergy, "conv": ConvEnergy, "map": MapEnergy}[config.network]
    return variant(shape, width, sn, outputs)


class Columns:
    """The function z -> what the networks give at t, (B, columns), as a chain needs it."""

    def __init__(self, nets: nn.Module, t: Tensor) -> None:
        self.nets, self.t = nets, t

    def __call__(self, z: Sequence[Tensor]) -> Tensor:
        return self.nets(z, self.t)

    def tensors(self) -> list[Tensor]:
        """What differs from one chain to the next of the same `key`."""
        return [self.t]

    def own(self) -> Columns:
        """The same on tensors that nobody else has."""
        return Columns(self.nets, self.t.clone())

    def advancing(self) -> list[Tensor]:
        """What a call changes: the vectors of spectral norm in train mode."""
        return list(self.nets.buffers())

    @property
    def key(self) -> Any:
        """Equal for functions that differ in their tensors alone."""
        return id(self.nets), self.nets.training


class EnergyNets(nn.Module):
    """One network per layer; the state dict keys are `netE{i}.<key>`, 0 = top.

    Args:
        nets: modules (z_i, t) -> (B, outputs), top layer first; an output per class where labels
            are coupled to the layer, else one.
    """

    def __init__(self, nets: Iterable[nn.Module]) -> None:
        super().__init__()
        for i, net in enumerate(nets):
            self.add_module(f"netE{i}", net)

    @classmethod
    def build(cls, config: PriorConfig) -> EnergyNets:
        """Fresh networks as a prior's configuration asks for."""
        outputs = Coupling(len(config.shapes), config.attributes).widths
        return cls(net_of(config, s, o) for s, o in zip(config.shapes, outputs, strict=True))

    def layer(self, i: int) -> nn.Module:
        """The network of layer i."""
        return self.get_submodule(f"netE{i}")

    def at(self, t: Tensor) -> Columns:
        """The function z -> `self(z, t)` for the many calls of a chain."""
        return Columns(self, t)

    def forward(self, z: Sequence[Tensor], t: Tensor) -> Tensor:
        """z: one (B, \\*shape) per layer, t (B,) -> the f_i, (B, L); more columns if coupled."""
        nets = self.children()
        return torch.cat([net(part, t) for net, part in zip(nets, z, strict=True)], dim=1)

    def pair(self, z: Sequence[Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
        """What two calls give, the first on the first half of z (2B, \\*shape), in one call.

        Spectral norm advances twice, as in two calls. t (B,) is that of both halves.
        """
        with in_shares(self, 2):
            first, second = self(z, torch.cat([t, t])).chunk(2)
        return first, second
