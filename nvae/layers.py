"""Layers below the cells: weight-normalised, plain and masked convolutions, BatchNorm, SE.

Attribute names that hold weights are upstream's: they are the file format.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm

from nvae import distributed


def normalised(kernel: Tensor, log_norm: Tensor) -> Tensor:
    r"""The effective kernel of a weight-normalised convolution (contract 1.1).

    .. math:: W_{eff} = e^{g} \, W / (\|W\| + 10^{-5})

    Args:
        kernel: (..., C_out, rest); the norm is taken per output channel.
        log_norm: g, (..., C_out).
    """
    norm = torch.linalg.vector_norm(kernel, dim=-1, keepdim=True)
    return log_norm.exp().unsqueeze(-1) * kernel / (norm + 1e-5)


class Conv2d(nn.Conv2d):
    """Weight-normalised convolution; each output channel's scale is learned as a logarithm."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.log_weight_norm = nn.Parameter(self.initial_log_norm())

    @property
    def kernel(self) -> Tensor:
        """The learned kernel before normalisation."""
        return self.weight

    @torch.no_grad()
    def initial_log_norm(self) -> Tensor:
        if self.kernel.is_meta:  # values will come from a file
            return self.kernel.new_empty(self.out_channels, 1, 1, 1)
        norm = torch.linalg.vector_norm(self.kernel, dim=(1, 2, 3), keepdim=True)
        return (norm + 1e-2).log()

    def effective_weight(self) -> Tensor:
        kernel = normalised(self.kernel.flatten(1), self.log_weight_norm.flatten())
        return kernel.view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.effective_weight(), self.bias)


class DataInitConv2d(Conv2d):
    """Convolution that sets its bias and scale from the first batch it sees (`res_elu`).

    Files do not say whether that has happened. Upstream repeats it after loading and so
    overwrites the loaded values; here a loaded layer counts as initialised (contract 1.1).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.initialised = False

    @torch.no_grad()
    def _initialise(self, x: Tensor) -> None:
        kernel = normalised(self.weight.flatten(1), self.weight.new_zeros(self.out_channels))
        out = self._conv_forward(x, kernel.view_as(self.weight), None).to(self.weight.dtype)
        mean, std = out.mean(dim=(0, 2, 3)), 5 * out.std(dim=(0, 2, 3))
        mean, std = distributed.mean(torch.stack([mean, std]))
        assert self.bias is not None
        self.bias.copy_(-mean / (std + 1e-5))
        self.log_weight_norm.copy_(-(std + 1e-5).log().view(-1, 1, 1, 1))
        self.initialised = True

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialised:
            self._initialise(x)
        return super().forward(x)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self.initialised = True


class PlainConv2d(nn.Conv2d):
    """Convolution without weight norm and bias: those of the inverted residual.

    The file format has its kernel under two names, `weight` and `weight_normalized`. Here they are
    one parameter; files that lack the second name load too, files where they differ do not.
    """

    def __init__(self, c_in: int, c_out: int, kernel_size: int, **kwargs: Any) -> None:
        super().__init__(c_in, c_out, kernel_size, bias=False, **kwargs)
        self.weight_normalized = self.weight

    def effective_weight(self) -> Tensor:
        return self.weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any
    ) -> None:
        weight, alias = prefix + "weight", prefix + "weight_normalized"
        if weight in state_dict:
            second = state_dict.setdefault(alias, state_dict[weight])
            if second is not state_dict[weight] and not torch.equal(second, state_dict[weight]):
                args[-1].append(f"{alias} differs from {weight}")  # the list of errors
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.weight_normalized = self.weight  # `assign=True` made two parameters of it


class MaskedConv2d(Conv2d):
    """Autoregressive convolution: the kernel is masked, then normalised (contract 1.9).

    Args:
        zero_diag: the centre position does not see its own channel block.
        mirror: reverse the order of the pixels (not of the channels).
    """

    mask: Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        zero_diag: bool = False,
        mirror: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, **kwargs
        )
        mask = autoregressive_mask(
            kernel_size, in_channels, out_channels, self.groups, zero_diag=zero_diag, mirror=mirror
        )
        if self.weight.is_meta:  # weights will come from a file; the mask is in none
            self.register_buffer("mask", mask, persistent=False)
        else:
            self.register_buffer("mask", mask.to(self.weight.device), persistent=False)
            self.log_weight_norm = nn.Parameter(self.initial_log_norm())

    @property
    def kernel(self) -> Tensor:
        mask = getattr(self, "mask", None)  # not there yet while the base class initialises
        return self.weight if mask is None else self.weight * mask


def autoregressive_mask(
    kernel_size: int, c_in: int, c_out: int, groups: int, *, zero_diag: bool, mirror: bool
) -> Tensor:
    """0/1 mask (C_out, C_in / groups, k, k): pixels before the centre, and at it earlier channels.

    Always on the CPU, with values, also when the model is built on the meta device.
    """
    centre = kernel_size // 2
    mask = torch.zeros(c_out, c_in // groups, kernel_size, kernel_size, device="cpu")
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    if groups > 1:
        channels = torch.full((c_out, c_in // groups), float(not zero_diag), device="cpu")
    else:
        out_index = torch.arange(c_out, device="cpu")[:, None] // max(c_out // c_in, 1)
        in_index = torch.arange(c_in, device="cpu")[None] // max(c_in // c_out, 1)
        channels = (in_index < out_index if zero_diag else in_index <= out_index).float()
    mask[:, :, centre, centre] = channels
    return mask.flip(2, 3) if mirror else mask


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with momentum 0.05 whose training statistics span all processes."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-5, momentum=0.05)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not distributed.several():
            return super().forward(x)
        assert self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        return self._fused(x) if x.is_cuda else self._over_processes(x)

    def _fused(self, x: Tensor) -> Tensor:
        """What `nn.SyncBatchNorm` does; as a module it would replace this one and its name."""
        return SyncBatchNorm.apply(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            self.momentum,
            torch.distributed.group.WORLD,
            distributed.world_size(),
        )

    def _over_processes(self, x: Tensor) -> Tensor:
        """Each process fills its row of (world, 2 C + 1); the sum over processes gathers them.

        PyTorch's own refuses CPU tensors.
        """
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
        row = torch.cat([mean, var, mean.new_full((1,), x.numel() // x.shape[1])])
        rows = [torch.zeros_like(row)] * distributed.world_size()
        rows[distributed.rank()] = row
        means, variances, counts = distributed.total(torch.stack(rows)).split(
            [len(mean), len(mean), 1], 1
        )
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (counts * (variances + (means - mean).square())).sum(0) / total
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.momentum is not None
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * total / (total - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


class BatchNormSwish(SyncedBatchNorm2d):
    """swish(BN(x)); keys directly below the prefix."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(super().forward(x))


class BatchNorm(nn.Module):
    """BN alone; its keys have the extra level `bn.`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = SyncedBatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the channels' means (contract 1.3)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.se(x.mean(dim=(2, 3)))[:, :, None, None]


def nearest_x2() -> nn.Module:
    """Up-sampling of the main path."""
    return nn.Upsample(scale_factor=2, mode="nearest")


def bilinear_x2() -> nn.Module:
    """Up-sampling of the skip path: it differs from the main path's."""
    return nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)
