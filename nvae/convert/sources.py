"""What can be converted: pictures in a folder or a zip, TFRecords, LSUN's LMDB."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from nvae import lmdb_io, pictures
from nvae.arch import DATA_SETS
from nvae.convert import tfrecord

TFRECORDS = ("celeba_256", "imagenet_32", "imagenet_64")


@dataclass(frozen=True)
class Source:
    """Images in a fixed order.

    Attributes:
        kind: folder, zip, tfrecords or lmdb.
        names: how each is called, below `where`.
        sizes: bytes of each, as it lies there.
        read: brings one: an image file's bytes, or from TFRecords raw pixels.
        order: position of each in what `read` knows.
    """

    kind: str
    where: Path
    names: Sequence[str]
    sizes: Sequence[int]
    read: Callable[[int], bytes]
    order: Sequence[int]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> bytes:
        return self.read(self.order[index])

    def name(self, index: int) -> str:
        """How an image is called, below `where`."""
        return self.names[self.order[index]]

    @property
    def bytes(self) -> int:
        return sum(self.sizes[i] for i in self.order)

    @property
    def digest(self) -> str:
        """Of all names and sizes in their order, wherever the source lies."""
        told = hashlib.sha256(self.kind.encode())
        for i in self.order:
            told.update(f"\n{self.names[i]} {self.sizes[i]}".encode())
        return told.hexdigest()

    def only(self, positions: Sequence[int]) -> Source:
        """Those at some positions, in that order."""
        return replace(self, order=[self.order[i] for i in positions])


def open_source(where: Path, dataset: str, split: str) -> Source:
    """Look at `where` and tell what it is.

    TFRecords and LSUN's LMDB come as one half; a folder or a zip as the whole of what they hold.

    Raises:
        ValueError: it is nothing of what is known, or not made for this data set.
    """
    if not where.exists():
        raise ValueError(f"{where} does not exist; expected what is to be converted")
    if where.is_file():
        return _zip(where)
    if any(next(p.glob("*.tfrecords"), None) for p in (where, where / split)):
        if dataset not in TFRECORDS:
            raise ValueError(
                f"{where} holds TFRecords, known for {', '.join(TFRECORDS)} only, got {dataset}"
            )
        return _tfrecords(where, split, DATA_SETS[dataset].image_size)
    if dataset.startswith("lsun_"):
        name = lmdb_io.directory(dataset, split)
        for path in (where / name, where):
            if (path / "data.mdb").is_file():
                if path.name != name:
                    raise ValueError(f"{path} is not {name}; expected that one or what holds it")
                return _lmdb(path)
    return _folder(where)


def _pictures_in(
    kind: str, where: Path, sizes: dict[str, int], read: Callable[[str], bytes]
) -> Source:
    if not sizes:
        raise ValueError(
            f"no pictures in {where}; expected files ending in {', '.join(pictures.SUFFIXES)}"
            + ("" if kind == "zip" else f"; {pictures.contents(where)}")
        )
    names = list(sizes)
    return Source(
        kind, where, names, list(sizes.values()), lambda i: read(names[i]), range(len(names))
    )


def _folder(where: Path) -> Source:
    files = {f.relative_to(where).as_posix(): f.stat().st_size for f in pictures.below(where)}
    return _pictures_in("folder", where, files, lambda name: (where / name).read_bytes())


def _zip(where: Path) -> Source:
    try:
        archive = zipfile.ZipFile(where)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where} is no whole zip: {error}; download it again") from None
    entries = {e.filename: e.file_size for e in archive.infolist() if not e.is_dir()}
    if any(name.endswith("data.mdb") for name in entries):
        raise ValueError(
            f"{where} holds an LMDB: unzip it. It can be read as it is, or be converted to a"
            " smaller one"
        )
    names = sorted(map(PurePosixPath, entries))
    sizes = {str(n): entries[str(n)] for n in names if pictures.is_picture(Path(n))}

    def read(name: str) -> bytes:
        try:
            return archive.read(name)
        # RuntimeError: it wants a password.
        except (zipfile.BadZipFile, RuntimeError, NotImplementedError, EOFError) as error:
            raise ValueError(f"cannot be unzipped: {error}") from None

    return _pictures_in("zip", where, sizes, read)


def _tfrecords(where: Path, split: str, size: int) -> Source:
    files = tfrecord.shards(where, split, size.bit_length() - 1)
    places = [(f, *place) for f in files for place in tfrecord.index(f)]

    def read(index: int) -> bytes:
        return tfrecord.pixels(tfrecord.message(*places[index]), size)

    names = [f"{f.name}, byte {offset}" for f, offset, _ in places]
    sizes = [length for _, _, length in places]
    return Source("tfrecords", where, names, sizes, read, range(len(places)))


def _lmdb(where: Path) -> Source:
    records = lmdb_io.Records(where, numbered=False)
    names = [records.key(i).decode("latin1") for i in range(len(records))]
    # Sizes would have to be read; the keys tell two sets apart.
    return Source("lmdb", where, names, [0] * len(names), records.__getitem__, range(len(names)))
