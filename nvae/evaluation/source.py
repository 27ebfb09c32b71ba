"""The images that a mode reads from --data, as the model is to see them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from nvae import data, flags, losses
from nvae.arch import ModelConfig
from nvae.seeds import derived


@dataclass(frozen=True)
class Source(Dataset[Tensor]):
    """Images (C, H, W) with the values that the model knows; `name` says what they are."""

    images: data.ImageSet
    config: ModelConfig
    name: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        x = self.images[index]
        output = self.config.data.output
        if output == "bernoulli":
            # Grey values are drawn, the same ones each time; black and white stays.
            return torch.bernoulli(x, generator=torch.Generator().manual_seed(derived(index)))
        if output == "grey":
            return (x * (self.config.levels - 1)).round() / (self.config.levels - 1)
        return losses.reduce_bits(x, self.config.num_x_bits)


def load(root: str, config: ModelConfig, *, train: bool) -> Source:
    """The pictures below `root` if there are any, else the data set the model was made for.

    Args:
        train: the training images of that data set, not those held out.

    Raises:
        ValueError: neither is there.
    """
    folder = Path(root)
    if folder.is_file():
        raise ValueError(f"--data {root} is a file; give the folder that holds the pictures")
    fit = data.Fit(config.image_size, "RGB" if config.data.channels == 3 else "L")
    if folder.is_dir():
        with contextlib.suppress(ValueError):  # no pictures
            return Source(data.folder(folder, fit), config, f"pictures in {root}")
    digits = config.dataset == "digits"  # they come with scikit-learn, not from a folder
    if digits and root != flags.NO_DATA:
        raise ValueError(f"--data {root}: no pictures there; without --data the digits are read")
    images = data.load(config.dataset, None if digits else root, train, config=config)
    return Source(
        images, config, f"{config.dataset}, {'training' if train else 'held-out'} images"
    )
