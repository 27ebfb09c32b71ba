"""The foreign images that `ood` takes: constructed shifts, files and folders.

Every set is a `nvae.data.ImageSet` of images like those the model takes, read one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from nvae.data import ImageSet

SHIFTS = ("inverted", "shuffled", "strokes", "rotated", "flipped", "noise", "blurred")
DEFAULT = ("inverted", "shuffled", "strokes", "rotated")
OWN = "own"  # the name of the model's own held-out images among the sets
ARRAYS = ("images", "samples")  # keys of an .npz


@dataclass(frozen=True)
class Source:
    """What `--ood NAME[=PATH]` asks for."""

    name: str
    path: Path | None

    @classmethod
    def parse(cls, text: str) -> Source:
        """Check what needs no reading: the name of a shift, or that the path exists."""
        name, equals, path = text.partition("=")
        if not equals and name not in SHIFTS and name != "digits":
            raise ValueError(
                f"--ood {text}: expected NAME=PATH, or one of the shifts {', '.join(SHIFTS)}"
            )
        if equals and not (name and path and Path(path).exists()):
            raise ValueError(f"--ood {text}: expected NAME=PATH, and there is no {path or 'path'}")
        return cls(name, Path(path) if equals else None)


def opened(source: Source, own: Tensor, config: Any, seed: int) -> ImageSet:
    """The set of a source.

    Args:
        own: the model's own held-out images, (n, C, H, W), which shifts are made of.
        config: the model's, for the size of images.
        seed: of the shifts.

    Raises:
        ValueError: what the path holds are no images, or none that fit the model.
    """
    from nvae import arch, data

    shape = tuple(config.image_shape)
    if source.path is None and source.name in SHIFTS:
        return shifted(source.name, own, seed)
    if source.path is None or (source.name in arch.DATA_SETS and source.path.is_dir()):
        return data.load(source.name, source.path, train=False, config=config)
    if source.path.suffix == ".mat":
        return _levels(source, _svhn(source.path), shape)
    if source.path.suffix == ".npz":
        return _levels(source, _npz(source.path), shape)
    if source.name == "cifar100":
        return _levels(source, _cifar100(source.path), shape)
    mode = "RGB" if shape[0] == 3 else "L"
    return data.folder(source.path, data.Fit(shape[1], mode))


def shifted(name: str, own: Tensor, seed: int) -> ImageSet:
    """A constructed shift of images; each draws from a generator of its own."""
    from ebm_prior.seeds import seeded
    from ebm_prior.shifts import SHIFTS
    from nvae.data import ImageSet

    def load(index: int) -> Tensor:
        return SHIFTS[name](own[index], seeded("cpu", seed, index))

    return ImageSet(len(own), load, lambda image: image)


def _levels(source: Source, values: np.ndarray, shape: tuple[int, ...]) -> ImageSet:
    """Images of an array (n, C, H, W), levels 0..255 or values in [0, 1]."""
    import numpy as np
    import torch

    from nvae.data import ImageSet

    if values.shape[1:] != shape:
        raise ValueError(
            f"--ood {source.name}={source.path}: images of shape {values.shape[1:]}, the model"
            f" takes {shape}; give a folder of images, which are fitted, or another set"
        )
    maximum = 1.0
    if values.dtype == np.uint8:
        maximum = 255.0
    elif values.dtype.kind != "f" or not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            f"--ood {source.name}={source.path}: expected levels (uint8) or numbers in [0, 1],"
            f" got {values.dtype} from {values.min():g} to {values.max():g}"
        )
    tensor = torch.from_numpy(np.array(values, order="C"))  # files can be read-only
    prepare: Callable[[Tensor], Tensor] = lambda image: image.float() / maximum  # noqa: E731
    return ImageSet(len(tensor), tensor.__getitem__, prepare)


def _svhn(path: Path) -> np.ndarray:
    """Street view house numbers, `test_32x32.mat`: X (32, 32, 3, n)."""
    from scipy.io import loadmat

    try:
        return loadmat(path, variable_names=["X"])["X"].transpose(3, 2, 0, 1)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"{path} is not SVHN's file: {_told(error)}") from None


def _npz(path: Path) -> np.ndarray:
    """An archive's `images` or `samples`, channels first or last; or a pack like CIFAR-10's."""
    import numpy as np

    from nvae import arrays

    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            key = next((name for name in (*ARRAYS, "webp") if name in archive), None)
            names = archive.files
            values = archive[key] if key in ARRAYS else None
    except Exception as error:  # zip and npy, each with its own kinds
        raise ValueError(f"{path} is no .npz of arrays: {_told(error)}") from None
    if key == "webp":
        return arrays._packed(path)[0]
    if values is None or values.ndim != 4 or not len(values):
        raise ValueError(
            f"{path} holds {', '.join(names)}; expected {' or '.join(ARRAYS)} of shape"
            " (n, C, H, W) or (n, H, W, C)"
        )
    return values if values.shape[1] in (1, 3) else values.transpose(0, 3, 1, 2)


def _cifar100(path: Path) -> np.ndarray:
    """`cifar-100-python/test`: levels (n, 3, 32, 32); or packs of it in a folder."""
    import numpy as np

    from nvae import arrays, pickles
    from nvae.pictures import contents

    files = [path] if path.is_file() else [path / "test", path / "cifar-100-python" / "test"]
    file = next((file for file in files if file.is_file()), None)
    if file is not None:
        try:
            return pickles.read(file)["data"].reshape(-1, 3, 32, 32)
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise ValueError(f"{file} is no CIFAR-100 python file: {_told(error)}") from None
    packs = sorted(path.glob("cifar100-test-*.npz"))
    if not packs:
        raise ValueError(
            f"no CIFAR-100 in {path}; expected cifar-100-python/test or cifar100-test-*.npz;"
            f" {contents(path)}"
        )
    return np.concatenate([arrays._packed(pack)[0] for pack in packs])


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
