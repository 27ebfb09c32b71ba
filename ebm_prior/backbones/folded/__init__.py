"""NVAE with its map T on a frozen, folded copy of the top-down walk; all else as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior.backbones.folded.walk import Walk
from ebm_prior.backbones.nvae import NVAEBackbone
from ebm_prior.steps import Steps
from nvae.arch import ModelConfig


class FoldedNVAE(NVAEBackbone):
    """A view like `NVAEBackbone`, the same to rounding, whose `to_z` costs a half or less.

    `to_z` is differentiable once. The frozen copy is made when it is first needed, and anew after
    a `refresh` that finds other weights or BatchNorm statistics: call it when the model has been
    changed in place.

    Args:
        steps: what the copy does, see there.

    Attributes:
        copies: how many models have been seen: what was captured of one serves no other.
    """

    def __init__(
        self,
        model: nn.Module,
        bn_statistics: Mapping[str, Tensor] | None = None,
        *,
        config: ModelConfig | None = None,
        steps: Steps,
    ) -> None:
        self.steps = steps
        self.copies = 0
        self._walk: Walk | None = None
        self._made_of: Any = None
        super().__init__(model, bn_statistics, config=config)

    def with_bn_statistics(self, statistics: Mapping[str, Tensor] | None) -> FoldedNVAE:
        return FoldedNVAE(self.live, statistics, config=self.config, steps=self.steps)

    def to_z(self, u: Tensor, temperature: float = 1.0) -> list[Tensor]:
        """T, differentiable in u once; at another temperature than 1 the plain walk."""
        if temperature != 1:
            return super().to_z(u, temperature)
        return self.layout.split(self.walk()(u))

    def refresh(self) -> None:
        super().refresh()
        now = _state(self.model)
        if now != self._made_of:
            self._walk, self._made_of = None, now
            self.copies += 1

    def walk(self) -> Walk:
        """The frozen copy."""
        if self._walk is None:
            with torch.no_grad():
                self._walk = Walk(self.model, self.steps)
        return self._walk


def _state(model: nn.Module) -> list[Any]:
    """What changes when a weight or a statistic does, without reading them all.

    PyTorch counts the changes of a tensor in place, but for those of BatchNorm's statistics, which
    come with one of their own counter of batches.
    """
    tensors = [*model.parameters(), *model.buffers()]
    batches = [b for name, b in model.named_buffers() if name.endswith("num_batches_tracked")]
    counts = torch.stack(batches).tolist() if batches else []
    return [*((x.data_ptr(), x._version) for x in tensors), *counts]
