"""Put a prior into a model's `sample`: the one hook, for our model or a live upstream one.

ebm_prior.attach(vae, "prior.safetensors")   # from now on vae.sample(n, t) draws from it
del vae.sample                               # and now from the Gaussian prior again
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior import checkpoint
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.base import Prior
from ebm_prior.fingerprint import backbone_fingerprint, check_fingerprint
from ebm_prior.frozen import fast
from ebm_prior.steps import Steps, precision_on
from nvae.arch import ModelConfig
from nvae.model import AutoEncoder


def attach(
    model: nn.Module,
    prior: str | os.PathLike[str] | Prior,
    *,
    args: Mapping[str, Any] | argparse.Namespace | None = None,
    block_size: int | None = None,
    precision: str = "auto",
    recompute: bool = False,
) -> Prior:
    """Replace `model.sample(num_samples, t)` on this instance by draws from the prior.

    Like upstream's it returns logits, and t is the temperature; it enters in the last map only.
    While the model is in training mode (re-adjustment of BatchNorm) it stays the Gaussian one.
    Statistics re-adjusted after `attach` replace those that came with the prior. Attaching again
    replaces the prior; `del model.sample` detaches it.

    Args:
        model: our `AutoEncoder`, or any live module with NVAE's state dict and `sample`.
        prior: a file, or a prior in memory.
        args: the `args` of the model's checkpoint; needed unless the model is ours.
        block_size: how many chains run at once; they need the memory of a backward pass, of which
            the caller of `sample` may know nothing. None: as many as samples are asked for.
        precision: of the model's cells inside a chain, float32 or bf16; auto: bf16 on CUDA, else
            float32.
        recompute: keep less for the backward passes, see `Steps`.

    Returns:
        The prior as attached, on a view of the model: its energies are those of a prior given.

    Raises:
        ValueError: a prior made for another backbone, or a model that is not what `args` say.
    """
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size is {block_size}, expected at least 1, or None for no limit")
    backbone = NVAEBackbone(model, config=_config(model, args))
    plain = _on(backbone, prior) if isinstance(prior, Prior) else checkpoint.load(prior, backbone)
    precision = precision_on(backbone.device.type, precision)
    attached = fast(plain, Steps(precision=precision, recompute=recompute))
    sample: Any = model.sample
    gaussian = getattr(sample, "gaussian", sample)
    sample = AttachedSample(model, attached, gaussian, block_size)
    model.sample = sample
    return attached


class AttachedSample:
    """What stands in for `model.sample`; `gaussian` is the method it stands for."""

    def __init__(
        self,
        model: nn.Module,
        prior: Prior,
        gaussian: Callable[..., Tensor],
        block_size: int | None = None,
    ) -> None:
        self.model, self.prior, self.gaussian = model, prior, gaussian
        self.block_size = block_size
        self._batches_seen = _batches_seen(model)

    @torch.no_grad()
    def __call__(
        self,
        num_samples: int,
        t: float,
        *,
        generator: torch.Generator | None = None,
        **others: Any,
    ) -> Tensor:
        """Logits of `num_samples` images at temperature t."""
        others = {name: value for name, value in others.items() if value is not None}
        if self.model.training or others:  # `others`: what only the model knows, a given u
            if generator is not None:
                others["generator"] = generator
            return self.gaussian(num_samples, t, **others)
        backbone = self.prior.backbone
        assert isinstance(backbone, NVAEBackbone)
        if backbone.bn_statistics and _batches_seen(self.model) != self._batches_seen:
            # The user asked for a re-adjustment after attaching: it wins over the file's.
            backbone.bn_statistics = None
        with torch.inference_mode(False), torch.autocast(backbone.device.type, enabled=False):
            backbone.refresh()
            self.prior.to(backbone.device)
            size = self.block_size or num_samples
            blocks = [
                self.prior.sample_u(min(size, num_samples - first), generator=generator)
                for first in range(0, num_samples, size)
            ]
            return backbone.logits(torch.cat(blocks), t)


def _config(model: nn.Module, args: Mapping[str, Any] | argparse.Namespace | None) -> ModelConfig:
    if isinstance(model, AutoEncoder):
        return model.config
    if args is None:
        raise ValueError(
            f"{type(model).__name__} is not an nvae.AutoEncoder: give attach(..., args=...), the"
            " `args` of the checkpoint it was loaded from, to say what it is"
        )
    return ModelConfig.from_args(vars(args) if isinstance(args, argparse.Namespace) else args)


def _on(backbone: NVAEBackbone, prior: Prior) -> Prior:
    """The same prior on another view of the same weights."""
    given = prior.backbone
    check_fingerprint("the prior", backbone_fingerprint(given), backbone.fingerprint())
    if isinstance(given, NVAEBackbone):
        backbone = backbone.with_bn_statistics(given.bn_statistics)
    return prior.on(backbone)


def _batches_seen(model: nn.Module) -> list[int]:
    """How many batches each BatchNorm layer has been trained on: a re-adjustment moves some."""
    counters = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    return torch.stack(counters).tolist() if counters else []


class _CallableModule(ModuleType):
    """`ebm_prior.attach` is this module as soon as somebody imports it; calling it works too."""

    __call__ = staticmethod(attach)


sys.modules[__name__].__class__ = _CallableModule
