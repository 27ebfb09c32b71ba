"""Writes an LMDB environment that can be stopped at any moment and goes on where it was.

The environment grows in `<name>.part` beside its place and is renamed when it is whole, so a half
written one never looks complete. Records are written in order and each batch in a transaction of
its own: how far it came is the number of its records. What it is being made of is told in
`conversion.json` inside the folder; readers of LMDB do not look at it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nvae import lmdb_io, runtime

ABOUT = "conversion.json"
BATCH = 32 << 20  # bytes of a transaction, about
UNKNOWN_SIZE = 64 << 20  # the first map where the data's size is not known


@dataclass(frozen=True)
class Conversion:
    """An environment to be written.

    Attributes:
        target: its directory.
        length: number of records.
        record: key and value of the i-th; called from several threads.
        about: what it is made of, how; two conversions are the same if this is.
        value_bytes: of one record on average, 0 if not known beforehand.
        numbered: keys are the decimal numbers of the records.
    """

    target: Path
    length: int
    record: Callable[[int], tuple[bytes, bytes]]
    about: dict[str, Any]
    value_bytes: int = 0
    numbered: bool = True

    @property
    def part(self) -> Path:
        return self.target.with_name(self.target.name + ".part")

    @property
    def bytes_needed(self) -> int:
        """Size of the file, about; 0 if not known. Large values take whole pages of 4096 bytes."""
        pages = -(-(self.value_bytes + 16) // 4096)
        return self.length * (pages * 4096 + 64) if self.value_bytes else 0

    def is_done(self) -> bool:
        """Whether this very conversion was finished before.

        Raises:
            ValueError: something else lies at its place.
        """
        if not self.target.exists():
            return False
        if _told(self.target) != self.about:
            raise ValueError(
                f"{self.target} exists and was not made from these pictures in this way; move it"
                " away or give another --out"
            )
        return True

    def records_there(self) -> int:
        """How many were written before it was stopped.

        Raises:
            ValueError: what was begun is another conversion, or is damaged.
        """
        data = self.part / "data.mdb"
        if not data.is_file() or not data.stat().st_size:
            return 0
        again = f"remove {self.part} to begin anew"
        if _told(self.part) != self.about:
            raise ValueError(f"{self.part} was begun with other pictures or settings; {again}")
        try:
            there = len(lmdb_io.Records(self.part, numbered=self.numbered, may_be_empty=True))
        except ValueError as error:
            raise ValueError(f"{error}; {again}") from None
        finally:
            lmdb_io.close(self.part)
        return there


def _told(folder: Path) -> Any:
    try:
        return json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write(conversion: Conversion, *, workers: int = 1) -> Iterator[int]:
    """Write what is not written yet, then give the environment its name.

    Args:
        workers: threads that make records; Pillow decodes outside of Python's lock.

    Yields:
        The number of records there, after each transaction.

    Raises:
        ValueError: the disk is or would be full, a record cannot be made, or something else lies
            at the target. Run again, it goes on behind the last transaction.
    """
    done = conversion.records_there()
    _refuse_if_too_small(conversion, done)
    part = conversion.part
    part.mkdir(parents=True, exist_ok=True)
    with runtime.written_whole(part / ABOUT) as path:
        path.write_text(json.dumps(conversion.about, indent=2) + "\n", encoding="utf-8")
    yield from _write_records(conversion, done, workers)
    # Opened as any reader would, every page of the tree checked.
    there = len(lmdb_io.Records(part, numbered=conversion.numbered))
    lmdb_io.close(part)
    if there != conversion.length:
        raise ValueError(f"{part} holds {there} records, expected {conversion.length}")
    (part / "lock.mdb").unlink(missing_ok=True)
    os.replace(part, conversion.target)


def _refuse_if_too_small(conversion: Conversion, done: int) -> None:
    existing = next(p for p in (conversion.part, *conversion.part.parents) if p.exists())
    left = conversion.bytes_needed * (conversion.length - done) // conversion.length
    free = shutil.disk_usage(existing).free
    if left > free:
        raise ValueError(
            f"{conversion.target} needs about {left / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
            " on its disk; make room or give another --out"
        )


def _write_records(conversion: Conversion, done: int, workers: int) -> Iterator[int]:
    import lmdb

    # A tenth more than needed, and always room for LMDB's own pages.
    map_size = max(conversion.bytes_needed * 11 // 10, UNKNOWN_SIZE)
    size = min(max(BATCH // (conversion.value_bytes or 1 << 16), 16), 4096)
    try:
        environment = lmdb.open(str(conversion.part), map_size=map_size)
    except lmdb.Error as error:
        raise ValueError(f"{conversion.part} cannot be written: {error}") from None
    with environment, ThreadPoolExecutor(workers) as pool:
        for first in range(done, conversion.length, size):
            numbers = range(first, min(first + size, conversion.length))
            batch = list(pool.map(conversion.record, numbers))
            try:
                _commit(environment, batch)
            except lmdb.Error as error:
                free = shutil.disk_usage(conversion.part).free
                raise ValueError(
                    f"{conversion.part} cannot be written: {error}; {free / 1e6:.0f} MB are free"
                    f" on its disk. {first} of {conversion.length} records are safe: make room,"
                    " then give the same command again"
                ) from None
            yield numbers.stop


def _commit(environment: Any, batch: list[tuple[bytes, bytes]]) -> None:
    """One transaction. A map that is too small is doubled; nothing of the failed try remains."""
    import lmdb

    while True:
        try:
            with environment.begin(write=True) as transaction:
                for key, value in batch:
                    transaction.put(key, value)
            return
        except lmdb.MapFullError:
            environment.set_mapsize(2 * environment.info()["map_size"])
