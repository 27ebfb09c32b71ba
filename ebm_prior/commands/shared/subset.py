"""Chosen images of a data set, and posterior draws of them, never all in memory at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nvae.data import ImageSet

MEMORY = 4 * 2**30  # bytes that the posterior draws of a fit may take


class Subset:
    """Images read when they are asked for; in most places as good as their tensor (N, C, H, W).

    Args:
        whole: the data set.
        index: (N,), which of it.
    """

    def __init__(self, whole: ImageSet, index: Tensor) -> None:
        self.whole, self.index = whole, index
        self.shape = torch.Size([len(index), *whole[int(index[0])].shape])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: slice | Tensor) -> Tensor:
        """(n, C, H, W) on the CPU."""
        return torch.stack([self.whole[int(i)] for i in self.index[which]])


#: What the measures and the rows of a report take.
Images = Tensor | Subset


def draws_of(num: int, times: int, dim: int) -> Tensor:
    """Of which image each posterior draw of a fit is, (N,): `times` each, as memory holds.

    The draws of an image stand together: a fit of low rank takes halves of different images.
    """
    return torch.arange(num).repeat_interleave(times)[: MEMORY // (4 * dim)]


@torch.no_grad()
def posterior(backbone: Any, images: Images, which: Tensor, generator: torch.Generator) -> Tensor:
    """Draws u (n, D) of the images at the positions `which` (n,), on the generator's device."""
    return backbone.infer(images[which].to(generator.device), generator)
