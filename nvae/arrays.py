"""Data sets that fit into memory: CIFAR-10, MNIST and what is made of it, Omniglot, the digits.

Each function gives integer levels (n, C, H, W), mostly with labels (n,), of one half of a set.
"""

from __future__ import annotations

import gzip
import itertools
import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from nvae import lmdb_io, pickles
from nvae.pictures import contents

DIGITS_TRAIN = 1500  # of scikit-learn's 1797 digits


def _python_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """One file of `cifar-10-batches-py`: levels (n, 3, 32, 32) uint8 and labels (n,)."""
    try:
        batch = pickles.read(path)
        return batch["data"].reshape(-1, 3, 32, 32), np.array(batch["labels"], np.int64)
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


def cifar10(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels (n, 3, 32, 32) and labels, from the python batches or from packs."""
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
                f" and cifar10-test-first8000.npz; {contents(root)}"
            )
    read = [(_python_batch if batches else _packed)(f) for f in files]
    pixels, labels = (np.concatenate(parts) for parts in zip(*read, strict=True))
    if pixels.shape != (len(labels), 3, 32, 32):
        raise ValueError(
            f"{root}: images of shape {pixels.shape} with {len(labels)} labels; expected CIFAR-10"
        )
    return pixels, labels


def _idx(root: Path, name: str, ndim: int) -> np.ndarray:
    """An idx file of bytes: two zeros, type 8, ndim, then big-endian sizes, then the values."""
    candidates = [d / (name + end) for d in (root, root / "MNIST" / "raw") for end in ("", ".gz")]
    path = next((c for c in candidates if c.is_file()), None)
    if path is None:
        raise ValueError(f"no MNIST file {name} or {name}.gz in {root}; {contents(root)}")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:4] != bytes((0, 0, 8, ndim)):
            raise ValueError("wrong magic number")
        shape = np.frombuffer(raw, ">u4", ndim, 4).astype(int)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is no whole idx file of {ndim} dimensions: {error}") from None


def _padded(pixels: np.ndarray) -> np.ndarray:
    return np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[:, None]


def mnist(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Levels (n, 1, 32, 32), two pixels of padding on each side, and labels."""
    prefix = "train" if train else "t10k"
    pixels = _idx(root, f"{prefix}-images-idx3-ubyte", 3)
    labels = _idx(root, f"{prefix}-labels-idx1-ubyte", 1)
    return _padded(pixels), labels.astype(np.int64)


def omniglot(root: Path, train: bool) -> np.ndarray:
    """Levels (n, 1, 32, 32) from `chardata.mat`, the file of the IWAE's authors: 24345 and 8070.

    Its arrays `data` and `testdata` are (784, n), in [0, 1], each picture column by column.
    """
    path = root / "chardata.mat"
    if not path.is_file():
        raise ValueError(
            f"no chardata.mat in {root}; it is a file of the repository yburda/iwae"
            f" (datasets/OMNIGLOT); {contents(root)}"
        )
    from scipy.io import loadmat

    key = "data" if train else "testdata"
    try:
        columns = loadmat(path, variable_names=[key])[key]
        if columns.ndim != 2 or len(columns) != 784 or columns.dtype.kind not in "fui":
            raise ValueError(f"{key} is of shape {columns.shape}, expected (784, n)")
        if not (columns.min() >= 0 and columns.max() <= 1):
            raise ValueError(f"{key} has values outside of [0, 1]")
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(
            f"{path} is not the Omniglot file: {type(error).__name__}: {error}"
        ) from None
    pixels = columns.reshape(28, 28, -1).transpose(2, 1, 0)
    return _padded((255 * pixels).astype(np.uint8))


def stacked_mnist(root: Path, train: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNIST's digits, and which three of them make each colour image.

    Each channel takes all digits twice, in two random orders; the class is the number that the
    three write, 0 to 999. Upstream draws the orders anew in each run, here they are fixed.

    Returns:
        Levels (n, 1, 32, 32), choice (2 n, 3), labels (2 n,).
    """
    levels, labels = mnist(root, train)
    draw = np.random.RandomState(0 if train else 1)  # its stream is frozen by numpy
    twice = lambda: np.concatenate([draw.permutation(len(labels)) for _ in range(2)])  # noqa: E731
    choice = np.stack([twice() for _ in range(3)], 1)
    return levels, choice, labels[choice] @ np.array([100, 10, 1])


def digits(train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1797 scanned digits, levels 0..16, in a fixed shuffled order."""
    found = find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ValueError("the digits come with scikit-learn: pip install scikit-learn")
    path = Path(found.submodule_search_locations[0], "datasets", "data", "digits.csv.gz")
    if path.is_file():  # the import of scikit-learn takes a second of every process
        table = np.loadtxt(path, delimiter=",")  # 64 levels and the class
        images, targets = table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    else:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        images, targets = bunch.images, bunch.target
    # RandomState's stream is frozen by numpy, so the split is the same everywhere.
    order = np.random.RandomState(0).permutation(len(targets))
    chosen = order[:DIGITS_TRAIN] if train else order[DIGITS_TRAIN:]
    return images[chosen].astype(np.uint8)[:, None], targets[chosen].astype(np.int64)
