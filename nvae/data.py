"""Data-set name and folder in, images as float tensors (C, H, W) in [0, 1] out.

Every set is a `torch.utils.data.Dataset` of images alone; class labels, where the source has them,
are in `.labels`. Reducing the bit depth is the model's business. Randomness (flips, crops,
binarisation of training images) comes from PyTorch's generator of the process, which a
`DataLoader` seeds in its workers from its own generator.
"""

from __future__ import annotations

import gzip
import itertools
import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from nvae import arch, lmdb_io

if TYPE_CHECKING:
    from nvae.arch import ModelConfig

DIGITS_TRAIN = 1500  # of scikit-learn's 1797 digits
CELEBA_BOX = (15, 40, 163, 188)  # left, top, right, bottom in an aligned 178x218 photograph
RAW_LMDB = ("celeba_256", "ffhq", "imagenet_32", "imagenet_64")
LSUN = {"bedroom": "bedroom", "church": "church_outdoor"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm", ".pgm")


class ImageSet(Dataset[Tensor]):
    """Images by position: `load_image(i)` brings one, `prepare` makes the tensor of it."""

    def __init__(
        self,
        length: int,
        load_image: Callable[[int], Any],
        prepare: Callable[[Any], Tensor],
        labels: Tensor | None = None,
    ) -> None:
        self.length, self.load_image, self.prepare = length, load_image, prepare
        self.labels = labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Tensor:
        if not -self.length <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        return self.prepare(self.load_image(index % self.length))


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
        short, long = sorted(image.size)
        if short != self.size:
            long = int(self.size * long / short)
            wide = image.width >= image.height
            shape = (long, self.size) if wide else (self.size, long)
            image = image.resize(shape, Image.Resampling.BILINEAR)
        room = (image.width - self.size, image.height - self.size)
        if self.augment and self.random_crop:
            left, top = (int(torch.randint(r + 1, ())) for r in room)
        else:
            left, top = (round(r / 2) for r in room)
        image = image.crop((left, top, left + self.size, top + self.size)).convert(self.mode)
        pixels = torch.from_numpy(np.array(image)).view(self.size, self.size, -1)
        return _flipped(pixels.permute(2, 0, 1).float() / 255, self.augment)


@dataclass(frozen=True)
class Levels:
    """Integer levels (C, H, W) to [0, 1]."""

    maximum: int = 255
    augment: bool = False

    def __call__(self, levels: Tensor) -> Tensor:
        return _flipped(levels.float() / self.maximum, self.augment)


@dataclass(frozen=True)
class _At:
    """The i-th entry of a tensor, as a function that can be pickled."""

    tensor: Tensor

    def __call__(self, index: int) -> Tensor:
        return self.tensor[index]


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


def celeba_face(record: bytes) -> Image.Image:
    """An aligned CelebA photograph, cropped to its 148x148 face."""
    image = lmdb_io.encoded_image(record)
    if image.width < CELEBA_BOX[2] or image.height < CELEBA_BOX[3]:
        raise ValueError(
            f"a photograph of {image.width}x{image.height}; expected CelebA's aligned 178x218"
        )
    return image.crop(CELEBA_BOX)


def _lmdb(
    root: Path,
    directory: str,
    decode: Callable[[bytes], Image.Image],
    fit: Fit,
    *,
    numbered: bool = True,
) -> ImageSet:
    path = root / directory
    if not (path / "data.mdb").is_file():
        kind = (
            "keys 0, 1, ... in ASCII; values "
            + ("raw RGB bytes" if decode is lmdb_io.raw_image else "image files")
            if numbered
            else "LSUN's own layout"
        )
        raise ValueError(
            f"no LMDB {directory}/data.mdb in {root} ({kind}); {_contents(root)}."
            " Name the folder that holds it"
        )
    records = lmdb_io.Records(path, numbered=numbered)
    return ImageSet(len(records), _FromRecord(records, decode), fit)


# --- a folder of pictures


@dataclass(frozen=True)
class _FromFile:
    files: tuple[Path, ...]

    def __call__(self, index: int) -> Image.Image:
        path = self.files[index]
        try:
            with Image.open(path) as file:
                if file.mode[0] in "IF":
                    raise ValueError(f"{path} has more than 8 bits per channel; convert it first")
                image = ImageOps.exif_transpose(file)
                if image.has_transparency_data:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"{path} cannot be read as an image: {error}") from None


def folder(root: str | os.PathLike[str], fit: Fit, *, name: str | None = None) -> ImageSet:
    """All images below `root` (or `root/name`), in the order of their paths, of any size."""
    root = Path(root)
    base = root / name if name else root
    files = tuple(
        sorted(
            f
            for f in (base.rglob("*") if base.is_dir() else ())
            if f.suffix.lower() in SUFFIXES and not f.name.startswith(".") and f.is_file()
        )
    )
    if not files:
        raise ValueError(
            f"no images below {base}; expected files ending in {', '.join(SUFFIXES)};"
            f" {_contents(root)}"
        )
    return ImageSet(len(files), _FromFile(files), fit)


# --- CIFAR-10


class _Dtype:
    """Stands for a numpy dtype in the CIFAR-10 pickles: only its name is kept."""

    def __init__(self, name: bytes | str = "", *_: Any) -> None:
        self.name = name.decode() if isinstance(name, bytes) else name

    def __setstate__(self, _: Any) -> None:
        pass


class _Array:
    """Stands for a numpy array in the CIFAR-10 pickles; `value` is built from plain bytes."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty((0, 0), np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, raw = state
        if not isinstance(dtype, _Dtype) or dtype.name not in ("u1", "uint8") or column_major:
            raise ValueError("an array that is not of bytes in row order")
        self.value = np.frombuffer(raw, np.uint8).reshape(shape)


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and byte arrays. Nothing a pickle names is imported or called."""

    known: Mapping[tuple[str, str], type] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }

    def find_class(self, module: str, name: str) -> type:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of `cifar-10-batches-py`: levels (n, 3, 32, 32) uint8 and labels (n,)."""
    try:
        with open(path, "rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        batch = {k.decode() if isinstance(k, bytes) else k: v for k, v in batch.items()}
        return batch["data"].value.reshape(-1, 3, 32, 32), np.array(batch["labels"], np.int64)
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise ValueError(
            f"{path} is no CIFAR-10 python batch: {type(error).__name__}: {error}"
        ) from None


def _packed(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One archive of lossless WebP mosaics: levels (n, C, H, W) uint8 and labels (n,).

    Keys: `webp` all mosaics' bytes, `offsets` where each begins (and the end), `grid` tiles per
    side, `shape` (n, H, W, C), `labels`. The last mosaic is padded.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            (n, h, w, c), g = (int(v) for v in archive["shape"]), int(archive["grid"])
            webp, offsets = archive["webp"].tobytes(), archive["offsets"].tolist()
            labels = archive["labels"].astype(np.int64)
        tiles = [
            np.asarray(lmdb_io.encoded_image(webp[start:end]))
            .reshape(g, h, g, w, c)
            .transpose(0, 2, 4, 1, 3)
            .reshape(g * g, c, h, w)
            for start, end in itertools.pairwise(offsets)
        ]
        return np.concatenate(tiles)[:n], labels
    except Exception as error:  # zip, npz, WebP: each has its own kinds
        raise ValueError(f"{path} is no CIFAR-10 pack: {error}") from None


def _cifar10(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    batches = next(
        (d for d in (root, root / "cifar-10-batches-py") if (d / "test_batch").is_file()), None
    )
    if batches:
        names = [f"data_batch_{i}" for i in range(1, 6)] if train else ["test_batch"]
        files = [batches / name for name in names]
    else:
        files = sorted(root.glob(f"cifar10-{'train' if train else 'test'}-*.npz"))
        parts = {m[1] for f in files if (m := re.search(r"of(\d+)\.npz$", f.name))}
        if not files or (parts and parts != {str(len(files))}):
            raise ValueError(
                f"no CIFAR-10 in {root}; expected the folder cifar-10-batches-py (unpacked from"
                " cifar-10-python.tar.gz) or all of cifar10-train-1of2.npz, cifar10-train-2of2.npz"
                f" and cifar10-test-first8000.npz; {_contents(root)}"
            )
    read = [(_python_batch if batches else _packed)(f) for f in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
    if pixels.shape != (len(labels), 3, 32, 32):
        raise ValueError(
            f"{root}: images of shape {pixels.shape} with {len(labels)} labels; expected CIFAR-10"
        )
    return pixels, labels


# --- MNIST and the digits


def _idx(root: Path, name: str, ndim: int) -> np.ndarray:
    """An idx file of bytes: two zeros, type 8, ndim, then big-endian sizes, then the values."""
    candidates = [d / (name + end) for d in (root, root / "MNIST" / "raw") for end in ("", ".gz")]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        raise ValueError(f"no MNIST file {name} or {name}.gz in {root}; {_contents(root)}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:4] != bytes((0, 0, 8, ndim)):
            raise ValueError("wrong magic number")
        shape = np.frombuffer(raw, ">u4", ndim, 4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole idx file of {ndim} dimensions: {error}") from None


def _mnist(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    prefix = "train" if train else "t10k"
    pixels = _idx(root, f"{prefix}-images-idx3-ubyte", 3)
    labels = _idx(root, f"{prefix}-labels-idx1-ubyte", 1)
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None], labels.astype(np.int64)


def _digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1797 scanned digits, levels 0..16, in a fixed shuffled order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError(
            'the digits come with scikit-learn: pip install "nvae-ebm-prior[demo]"'
        ) from None
    bunch = load_digits()
    # RandomState's stream is frozen by numpy, so the split is the same everywhere.
    order = np.random.RandomState(0).permutation(len(bunch.target))
    chosen = order[:DIGITS_TRAIN] if train else order[DIGITS_TRAIN:]
    return bunch.images[chosen].astype(np.uint8)[:, None], bunch.target[chosen].astype(np.int64)


# --- the door


def load(
    name: str,
    root: str | os.PathLike[str] | None,
    train: bool,
    *,
    augment: bool = False,
    config: ModelConfig | None = None,
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
    if name in RAW_LMDB:
        return _lmdb(base, f"{half}.lmdb", lmdb_io.raw_image, fit)
    if name == "celeba_64":
        return _lmdb(base, f"{half}.lmdb", celeba_face, fit)
    if name.startswith("lsun_"):
        directory = f"{LSUN[name.split('_')[1]]}_{'train' if train else 'val'}_lmdb"
        fit = Fit(size, fit.mode, augment, random_crop=True)
        return _lmdb(base, directory, lmdb_io.encoded_image, fit, numbered=False)

    if name == "cifar10":
        (pixels, labels), levels_to_image = _cifar10(base, train), Levels(255, augment)
    elif name == "mnist":  # written digits are never flipped
        (pixels, labels), levels_to_image = _mnist(base, train), Levels(1)
    elif name == "digits":
        (pixels, labels), levels_to_image = _digits(train), Levels(16)
    else:
        raise ValueError(f"data set {name!r} cannot be read yet; use a folder of images instead")
    if pixels.shape[1:] != (channels, size, size):
        raise ValueError(
            f"{name} has images of shape {pixels.shape[1:]}, the model takes"
            f" {(channels, size, size)}; give a folder of images, which are fitted, or another set"
        )
    levels = torch.from_numpy(np.ascontiguousarray(pixels))
    source = _Binarised(levels, train) if name == "mnist" else _At(levels)
    return ImageSet(len(levels), source, levels_to_image, torch.from_numpy(labels))


def _contents(root: Path) -> str:
    """What is there instead, for messages."""
    names = sorted(p.name for p in root.iterdir())[:8] if root.is_dir() else []
    return f"the folder holds {', '.join(names)}" if names else "the folder is empty"
