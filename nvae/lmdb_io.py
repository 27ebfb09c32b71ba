"""Read-only access to NVAE's LMDB files and to LSUN's, with names in every complaint.

`python -m nvae.lmdb_io convert` makes such files (`nvae/convert`).

An environment is opened anew in each process that reads it (data loader workers may be forked or
spawned), so objects of this module hold a path and no handle, and can be pickled.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nvae import arch, lmdb_pages

RAW = ("celeba_256", "ffhq", "imagenet_32", "imagenet_64")
LSUN = {"bedroom": "bedroom", "church": "church_outdoor", "tower": "tower"}
#: The data sets that are kept in LMDB.
NAMES = ("celeba_64", *RAW, *(n for n in arch.DATA_SETS if n.startswith("lsun_")))
CELEBA_BOX = (15, 40, 163, 188)  # left, top, right, bottom in an aligned 178x218 photograph


def directory(name: str, split: str) -> str:
    """The environment's name below the data folder; `split` is train, validation or test."""
    if name.startswith("lsun_"):
        return f"{LSUN[name.split('_')[1]]}_{'val' if split == 'validation' else split}_lmdb"
    return f"{split}.lmdb"


# path -> (process, environment). LMDB allows one handle per file and process, and a forked child
# inherits a handle that it may only close.
_open: dict[Path, tuple[int, Any]] = {}


def _environment(path: Path) -> Any:
    import lmdb

    process, environment = _open.get(path, (0, None))
    if process == os.getpid():
        return environment
    if environment is not None:
        environment.close()
    try:
        environment = lmdb.open(
            str(path), readonly=True, lock=False, max_readers=1, readahead=False, meminit=False
        )
    except lmdb.Error as error:
        raise ValueError(f"{path} is not a readable LMDB environment: {error}") from None
    try:
        _refuse_truncated(path, environment)
    except ValueError:
        environment.close()
        raise
    _open[path] = (os.getpid(), environment)
    return environment


def close(path: str | os.PathLike[str]) -> None:
    """Close the environment if this process reads it, so that it can be written or renamed."""
    _, environment = _open.pop(Path(path).resolve(), (0, None))
    if environment is not None:
        environment.close()


def _refuse_truncated(path: Path, environment: Any) -> None:
    """Compare the file's size to the last page that its header claims.

    LMDB maps the file into memory; touching a page past its end kills the process (SIGBUS), so
    this comes before the first read. The header lies in the first two pages.
    """
    data = path / "data.mdb"
    there = data.stat().st_size
    claimed = (environment.info()["last_pgno"] + 1) * environment.stat()["psize"]
    if there < claimed:
        raise ValueError(
            f"{data} is truncated: {there} bytes are there, its header speaks of {claimed};"
            " copy or download it again"
        )


class Records:
    """The records of one LMDB environment by position, 0 to `len - 1`.

    Args:
        path: the environment, a directory holding `data.mdb`.
        numbered: keys are decimal indices (NVAE's layout); otherwise they are arbitrary and taken
            in sorted order (LSUN).
        may_be_empty: one without records is fine.

    Raises:
        ValueError: missing, truncated, empty, or keys of the other layout.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, numbered: bool, may_be_empty: bool = False
    ) -> None:
        self.path = Path(path).resolve()
        if not (self.path / "data.mdb").is_file():
            raise ValueError(f"no LMDB environment (a directory holding data.mdb) at {path}")
        self._keys: list[bytes] | None = None
        leaves = self._leaves()
        if numbered:
            self._length = sum(map(len, leaves))
        else:
            self._keys = [key for leaf in leaves for key in leaf]
            self._length = len(self._keys)
        if not self._length and may_be_empty:
            return
        if not self._length:
            raise ValueError(f"{path} holds no records")
        with self._reading() as transaction:
            if any(transaction.get(self.key(i)) is None for i in (0, self._length - 1)):
                first = next(self._leaves())[0]
                raise ValueError(
                    f"{path}: expected {self._length} records under the keys 0 to"
                    f" {self._length - 1}, got others, the first {first[:40]!r}; is this the LMDB"
                    " of another data set?"
                )

    def _leaves(self) -> Iterator[list[bytes]]:
        """The keys in sorted order; checks every page that the library will walk over."""
        data = self.path / "data.mdb"
        last = _environment(self.path).info()["last_txnid"]
        try:
            yield from lmdb_pages.leaf_keys(data, last)
        except ValueError as error:
            raise ValueError(f"{data}: {error}") from None

    @contextlib.contextmanager
    def _reading(self, index: int | None = None) -> Iterator[Any]:
        import lmdb

        environment = _environment(self.path)
        try:
            with environment.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            name = self.path if index is None else self.name(index)
            raise ValueError(f"{name} cannot be read: {error}") from None

    def __len__(self) -> int:
        return self._length

    def key(self, index: int) -> bytes:
        """The key of one record."""
        return str(index).encode() if self._keys is None else self._keys[index]

    def name(self, index: int) -> str:
        """How a record is called in messages."""
        return f"{self.path}, record {self.key(index).decode(errors='replace')!r}"

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        with self._reading(index) as transaction:
            record = transaction.get(self.key(index))
        if record is None:
            raise ValueError(f"{self.name(index)} is missing although the file counts it")
        return record


def raw_image(record: bytes) -> Image.Image:
    """Square RGB pixels, uint8, row-major, channels last; the side is sqrt(length / 3).

    Raises:
        ValueError: a length of no square, or nothing but zeros (a hole left by a broken copy).
    """
    side = math.isqrt(len(record) // 3)
    if not side or 3 * side * side != len(record):
        raise ValueError(f"{len(record)} bytes are no square RGB image")
    if not any(record):
        raise ValueError("nothing but zero bytes; the file was probably not copied whole")
    return Image.fromarray(np.frombuffer(record, np.uint8).reshape(side, side, 3))


def encoded_image(record: bytes) -> Image.Image:
    """The bytes of an image file (JPEG, PNG, WebP), decoded to RGB.

    Raises:
        ValueError: Pillow cannot read them.
    """
    try:
        return Image.open(io.BytesIO(record)).convert("RGB")
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        # SyntaxError: what Pillow raises on some damaged PNG files.
        problem = "nothing but zero bytes" if not any(record) else str(error)
        raise ValueError(f"cannot be decoded as an image: {problem}") from None


def celeba_face(record: bytes) -> Image.Image:
    """An aligned CelebA photograph, cropped to its 148x148 face."""
    image = encoded_image(record)
    if image.width < CELEBA_BOX[2] or image.height < CELEBA_BOX[3]:
        raise ValueError(
            f"a photograph of {image.width}x{image.height}; expected CelebA's aligned 178x218"
        )
    return image.crop(CELEBA_BOX)


def decoder(name: str) -> Callable[[bytes], Image.Image]:
    """What makes a picture of a record of this data set."""
    if name in RAW:
        return raw_image
    return celeba_face if name == "celeba_64" else encoded_image


if __name__ == "__main__":
    from nvae.convert.command import main

    sys.exit(main())
