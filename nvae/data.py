"""Data-set name and folder in, images as float tensors (C, H, W) in [0, 1] out.

Every set is a `torch.utils.data.Dataset` of images alone; class labels, where the source has them,
are in `.labels`. Reducing the bit depth is the model's business. Randomness (flips, crops,
binarisation of training images) comes from PyTorch's generator of the process, which a
`DataLoader` seeds in its workers from its own generator.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nvae import arch, arrays, lmdb_io, pictures


class Model(Protocol):
    """What images are fitted to: an `arch.ModelConfig`, or another model's."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...


class ImageSet(Dataset[Tensor]):
    """Images by position: `load_image(i)` brings one, `prepare` makes the tensor of it.

    Attributes:
        in_memory: whether reading one costs next to nothing.
    """

    def __init__(
        self,
        length: int,
        load_image: Callable[[int], Any],
        prepare: Callable[[Any], Tensor],
        labels: Tensor | None = None,
        in_memory: bool = False,
    ) -> None:
        self.length, self.load_image, self.prepare = length, load_image, prepare
        self.labels, self.in_memory = labels, in_memory

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not -self.length <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        return self.prepare(self.load_image(index % self.length))

    def many(self, positions: Tensor) -> Tensor:
        """(n,) positions -> (n, C, H, W), the images that indexing gives one by one."""
        load, prepare = self.load_image, self.prepare
        if (
            isinstance(load, _At | _Stacked)
            and isinstance(prepare, Levels)
            and not prepare.augment
        ):
            return prepare(load(positions))
        return torch.stack([self[i] for i in positions.tolist()])


# --- from a picture, or from levels, to the tensor


def _flipped(image: Tensor, augment: bool) -> Tensor:
    return image.flip(-1) if augment and torch.rand(()) < 0.5 else image


@dataclass(frozen=True)
class Fit:
    """PIL image to tensor: crop box, shorter side to `size` (antialiased bilinear), square crop.

    With `augment` a random horizontal flip; with `random_crop` as well the square is taken
    anywhere, otherwise from the centre.
    """

    size: int
    mode: str = "RGB"
    augment: bool = False
    random_crop: bool = False

    def __call__(self, image: Image.Image) -> Tensor:
        image = pictures.shorter_side(image, self.size)
        if self.augment and self.random_crop:
            left, top = (int(torch.randint(side - self.size + 1, ())) for side in image.size)
            image = image.crop((left, top, left + self.size, top + self.size))
        else:
            image = pictures.centre(image, self.size)
        image = image.convert(self.mode)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, -1)
        return _flipped(pixels.permute(2, 0, 1).float() / 255, self.augment)


@dataclass(frozen=True)
class Levels:
    """Integer levels (C, H, W), of one image or of several, to [0, 1]; flips only one."""

    maximum: int = 255
    augment: bool = False

    def __call__(self, levels: Tensor) -> Tensor:
        return _flipped(levels.float() / self.maximum, self.augment)


@dataclass(frozen=True)
class _At:
    """The i-th entry of a tensor, or several, as a function that can be pickled."""

    tensor: Tensor

    def __call__(self, index: int | Tensor) -> Tensor:
        return self.tensor[index]


@dataclass(frozen=True)
class _Stacked:
    """One grey picture for each colour channel."""

    levels: Tensor  # (n, H, W)
    choice: Tensor  # (m, 3)

    def __call__(self, index: int | Tensor) -> Tensor:
        return self.levels[self.choice[index]]


@dataclass(frozen=True)
class _Binarised:
    """Draw binary pixels, P(1) = level / 255: anew for training, the same ones each time for
    evaluation (upstream draws anew in both)."""

    levels: Tensor
    train: bool

    def __call__(self, index: int) -> Tensor:
        generator = None if self.train else torch.Generator().manual_seed(index)
        return torch.bernoulli(self.levels[index].float() / 255, generator=generator)


# --- LMDB


@dataclass(frozen=True)
class _FromRecord:
    """Decode the i-th record; a record that cannot be one is named by its key."""

    records: lmdb_io.Records
    decode: Callable[[bytes], Image.Image]

    def __call__(self, index: int) -> Image.Image:
        try:
            return self.decode(self.records[index])
        except ValueError as error:
            raise ValueError(f"{self.records.name(index)}: {error}") from None


def _lmdb(name: str, root: Path, train: bool, fit: Fit) -> ImageSet:
    directory = lmdb_io.directory(name, "train" if train else "validation")
    path, decode, lsun = root / directory, lmdb_io.decoder(name), name.startswith("lsun_")
    if not (path / "data.mdb").is_file():
        values = "raw RGB bytes" if decode is lmdb_io.raw_image else "image files"
        kind = "LSUN's own layout" if lsun else f"keys 0, 1, ... in ASCII; values {values}"
        raise ValueError(
            f"no LMDB {directory}/data.mdb in {root} ({kind}); {pictures.contents(root)}."
            " Name the folder that holds it, or make it: python -m nvae.lmdb_io --help"
        )
    records = lmdb_io.Records(path, numbered=not lsun)
    images = ImageSet(len(records), _FromRecord(records, decode), fit)
    if name.startswith("imagenet_"):  # the two sets differ in nothing else
        side, own = images.load_image(0).width, arch.DATA_SETS[name].image_size
        if side != own:
            raise ValueError(f"{path} holds images of {side} pixels; those of {name} have {own}")
    return images


# --- a folder of pictures


@dataclass(frozen=True)
class _FromFile:
    files: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        path = self.files[index]
        try:
            return pictures.open_rgb(path)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None


def folder(root: str | os.PathLike[str], fit: Fit, *, name: str | None = None) -> ImageSet:
    """All images below `root` (or `root/name`), in the order of their paths, of any size."""
    root = Path(root)
    base = root / name if name else root
    files = tuple(pictures.below(base))
    if not files:
        raise ValueError(
            f"no images below {base}; expected files ending in"
            f" {', '.join(pictures.SUFFIXES)}; {pictures.contents(root)}"
        )
    return ImageSet(len(files), _FromFile(files), fit)


# --- the door


def load(
    name: str,
    root: str | os.PathLike[str] | None,
    train: bool,
    *,
    augment: bool = False,
    config: Model | None = None,
) -> ImageSet:
    """Open one half of a data set.

    Args:
        name: a data set of `arch.DATA_SETS`, or "folder": pictures of any size, fitted to the
            model. A folder with the subfolders `train` and `validation` has two halves; without
            them all pictures are training images.
        root: the folder that holds the set; the digits need none.
        augment: random horizontal flips, and for LSUN random crops, as in upstream's training.
        config: the model the images are for; gives the size, which `name` gives otherwise.

    Raises:
        ValueError: what was expected in `root` and is not there, a damaged file, or images that
            do not fit the model.
    """
    known = arch.DATA_SETS.get(name)
    if name != "folder" and known is None:
        raise ValueError(
            f"data set {name!r}; expected folder or one of {', '.join(arch.DATA_SETS)}"
        )
    if config is not None:
        channels, size, _ = config.image_shape
    elif known is not None:
        channels, size = known.channels, known.image_size
    else:
        raise ValueError("a folder of images is fitted to a model: give its config")
    if name != "digits" and root is None:
        raise ValueError(f"data set {name!r} needs a folder to be read from, got none")
    base = Path(root or ".")
    if not base.is_dir():
        raise ValueError(f"{base} is not a folder; expected the one that holds {name}")

    fit = Fit(size, "RGB" if channels == 3 else "L", augment)
    half = "train" if train else "validation"
    if name == "folder":
        if (base / "train").is_dir() and (base / "validation").is_dir():
            return folder(base, fit, name=half)
        if not train:
            raise ValueError(
                f"{base} has no held-out half; make the subfolders train and validation, or use"
                " its training images"
            )
        return folder(base, fit)
    if name in lmdb_io.NAMES:
        fit = replace(fit, random_crop=name.startswith("lsun_"))
        return _lmdb(name, base, train, fit)
    return _small(name, base, train, augment, (channels, size, size))


def _small(
    name: str, root: Path, train: bool, augment: bool, shape: tuple[int, int, int]
) -> ImageSet:
    """A set that fits into memory. Written signs are never flipped."""
    labels: np.ndarray | None = None
    choice: np.ndarray | None = None
    to_image = Levels(255)
    if name == "cifar10":
        (pixels, labels), to_image = arrays.cifar10(root, train), Levels(255, augment)
    elif name == "mnist":
        (pixels, labels), to_image = arrays.mnist(root, train), Levels(1)
    elif name == "omniglot":
        pixels, to_image = arrays.omniglot(root, train), Levels(1)
    elif name == "stacked_mnist":
        pixels, choice, labels = arrays.stacked_mnist(root, train)
    else:
        (pixels, labels), to_image = arrays.digits(train), Levels(16)
    own = pixels.shape[1:] if choice is None else (3, *pixels.shape[2:])
    if own != shape:
        raise ValueError(
            f"{name} has images of shape {own}, the model takes {shape}; give a folder of images,"
            " which are fitted, or another set"
        )
    levels = torch.from_numpy(np.ascontiguousarray(pixels))
    source: Callable[[int], Tensor] = _At(levels)
    if choice is not None:
        source = _Stacked(levels[:, 0], torch.from_numpy(choice))
    elif to_image.maximum == 1:
        source = _Binarised(levels, train)
    return ImageSet(
        len(levels if choice is None else choice),
        source,
        to_image,
        None if labels is None else torch.from_numpy(labels),
        in_memory=True,
    )
