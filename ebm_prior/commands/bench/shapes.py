"""The shapes that are timed: VAEs and energies of published sizes with random weights.

No torch at import: the parser needs the names.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ebm_prior.presets import PRIOR_SETTINGS, resolved

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ebm_prior.backbones.files import Opened
    from ebm_prior.config import PriorConfig
    from ebm_prior.prior import EBMPrior

WARM = 10  # train-mode calls of a fresh spectral norm, after which its sigma is near the true one


@dataclass(frozen=True)
class Shape:
    """A VAE, the energies on it, and what a step of the reference-style path takes of a machine.

    Attributes:
        vae: arguments of the NVAE.
        preset: of the prior; `prior` are the settings in place of the preset's.
        cpu_batch, cuda_batch: images at once, unless told otherwise.
        gflop: what the reference-style step computes per image; says how long it will take.
        saved: bytes it keeps for its backward pass per image; says how many images fit.
        targets: what was set out to be reached: of the ratio to the reference-style step by device
            and precision, and, as `launches` and `saved_mb` per image, of the counts by path.
    """

    title: str
    vae: dict[str, Any]
    preset: str
    prior: dict[str, Any] = field(default_factory=dict)
    cpu_batch: int = 1
    cuda_batch: int = 1
    gflop: float = 0.0
    saved: float = 0.0
    targets: dict[str, dict[str, float]] = field(default_factory=dict)

    def batch_size(self, memory: int | None) -> int:
        """Images at once on the CPU (None), or on a GPU of so many bytes."""
        if memory is None:
            return self.cpu_batch
        # As much again for weights, gradients and the captured graphs of the fast paths.
        return max(1, min(self.cuda_batch, int(0.45 * memory / self.saved)))


_NVAE = {
    "num_latent_per_group": 20,
    "num_preprocess_blocks": 1,
    "num_postprocess_blocks": 1,
    "num_preprocess_cells": 2,
    "num_postprocess_cells": 2,
    "num_cell_per_cond_enc": 2,
    "num_cell_per_cond_dec": 2,
    "use_se": True,
    "res_dist": True,
    "arch_instance": "res_mbconv",
}


def _one_scale(groups: int, channels: int) -> dict[str, Any]:
    return {
        **_NVAE,
        "dataset": "cifar10",
        "num_latent_scales": 1,
        "num_groups_per_scale": groups,
        "num_channels_enc": channels,
        "num_channels_dec": channels,
        "num_nf": 1,
    }


def _scales(dataset: str, scales: int) -> dict[str, Any]:
    return {
        **_NVAE,
        "dataset": dataset,
        "num_x_bits": 5,
        "num_latent_scales": scales,
        "num_groups_per_scale": 16,
        "ada_groups": True,
        "min_groups_per_scale": 4,
        "num_channels_enc": 30,
        "num_channels_dec": 30,
        "num_nf": 2,
    }


SHAPES = {
    "a": Shape(
        "CIFAR-10 NVAE: 30 groups of 20x16x16, 128 channels",
        _one_scale(30, 128),
        "cifar10",
        cuda_batch=25,
        gflop=56,
        saved=641e6,
        targets={
            "cpu": {"float32": 1.5, "bf16": 2.5},
            "cuda": {"bf16": 4.5},
            "launches": {"fast float32": 2600},
            "saved_mb": {"fast float32": 230, "fast float32, recomputed": 50},
        },
    ),
    "b": Shape(
        "CelebA-HQ-256 NVAE: 36 groups of 8x8 to 128x128, 30 channels",
        _scales("celeba_256", 5),
        "celeba256",
        cuda_batch=8,
        gflop=292,
        saved=8.4e9,
        targets={
            "cuda": {"bf16": 5.0},
            "saved_mb": {"fast float32": 3100, "fast float32, recomputed": 1000},
        },
    ),
    "c": Shape(
        "small CIFAR-10 NVAE: 10 groups of 20x16x16, 32 channels",
        _one_scale(10, 32),
        "cifar10",
        {"width": 32},
        cpu_batch=4,
        cuda_batch=64,
        gflop=1.4,
        saved=51e6,
        targets={"cpu": {"float32": 2.4, "bf16": 4.0}},
    ),
    "q": Shape(
        "b at 128 pixels: 32 groups of 8x8 to 64x64, 30 channels",
        _scales("lsun_church_128", 4),
        "celeba256",
        cuda_batch=8,
        gflop=66,
        saved=1.93e9,
        targets={"cpu": {"float32": 1.8, "bf16": 3.0}},
    ),
    "tiny": Shape(
        "for tests: 4 groups of 2x4x4 and 2x2x2, 4 channels",
        {
            **_NVAE,
            "dataset": "digits",
            "num_latent_scales": 2,
            "num_groups_per_scale": 2,
            "num_latent_per_group": 2,
            "num_channels_enc": 4,
            "num_channels_dec": 4,
            "num_preprocess_cells": 1,
            "num_postprocess_cells": 1,
            "num_cell_per_cond_enc": 1,
            "num_cell_per_cond_dec": 1,
            "num_mixture_dec": 1,
        },
        "cifar10",
        {"width": 8},
        cpu_batch=2,
        cuda_batch=2,
        gflop=0.001,
        saved=1e6,
    ),
}


def config(
    preset: str, shapes: tuple[tuple[int, ...], ...], given: dict[str, Any] | None = None
) -> PriorConfig:
    """A prior as the preset has it, on latents of these shapes."""
    from ebm_prior.config import PriorConfig

    settings = resolved(preset, given or {})
    chosen = {name: settings[name] for name in PRIOR_SETTINGS}
    return PriorConfig(shapes=shapes, preset=preset, **chosen)


def build(shape: Shape, seed: int, device: torch.device) -> EBMPrior:
    """The shape's prior on its VAE, with the random weights of a seed."""
    import torch

    from ebm_prior.backbones.nvae import NVAEBackbone
    from nvae.arch import ModelConfig
    from nvae.model import AutoEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoEncoder(ModelConfig(**shape.vae))
        for _, norm in model.batch_norms():
            scatter(norm)
        return fresh(NVAEBackbone(model.to(device)), shape.preset, seed, shape.prior)


def fresh(
    backbone: Opened, preset: str, seed: int, given: dict[str, Any] | None = None
) -> EBMPrior:
    """An untrained prior of a preset whose spectral norms have settled."""
    import torch

    from ebm_prior.prior import EBMPrior
    from ebm_prior.spectral_norm import SpectralNorm

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        prior = EBMPrior(backbone, config(preset, backbone.layout.shapes, given))
        for module in prior.energies.modules():
            if isinstance(module, SpectralNorm):
                module.training = True
                for _ in range(WARM):
                    module.normalised_weight()
                module.training = False
    return prior.to(backbone.device)


def scatter(norm: nn.BatchNorm2d) -> None:
    """Give a BatchNorm statistics, scales and shifts like those that training leaves."""
    import torch

    with torch.no_grad():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.normal_(0.0, 0.1)
        norm.running_var.uniform_(0.5, 1.5)
        norm.weight.uniform_(0.8, 1.2)
        norm.bias.normal_(0.0, 0.1)
