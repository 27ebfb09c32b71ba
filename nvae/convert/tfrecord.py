"""TFRecord shards and the `tf.train.Example` messages in them, read by hand.

A shard is a row of records: length (8 bytes, little-endian), its checksum (4), the message, its
checksum (4). The checksum is CRC-32C, rotated and shifted by a constant.
"""

from __future__ import annotations

import functools
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_POLYNOMIAL = 0x82F63B78


def _table() -> np.ndarray:
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, table >> 1 ^ _POLYNOMIAL, table >> 1).astype(np.uint32)
    return table


_TABLE = _table()
_PLAIN: list[int] = _TABLE.tolist()


def _step(crc: np.ndarray, byte: np.ndarray | int) -> np.ndarray:
    return _TABLE[(crc ^ byte) & 255] ^ (crc >> 8)


@functools.cache
def _behind_zeros(length: int) -> list[list[int]]:
    """What each byte of a checksum becomes when `length` zero bytes follow: 4 tables of 256."""
    crc = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    for _ in range(length):
        crc = _step(crc, 0)
    return crc.tolist()


def crc32c(message: bytes) -> int:
    """Checksum of Castagnoli's polynomial, many rows of the message at a time.

    The checksum is linear: rows begin at zero, are taken through side by side, and are joined by
    moving what came before past the zeros of a row. The usual start (all ones) is the same as
    inverting the first four bytes; zero bytes in front change nothing.
    """
    if len(message) < 64:
        short = 0xFFFFFFFF
        for byte in message:
            short = _PLAIN[(short ^ byte) & 255] ^ short >> 8
        return short ^ 0xFFFFFFFF
    width = 64 if len(message) < 1 << 14 else 512
    rows = np.zeros(-(-len(message) // width) * width, np.uint8)
    rows[-len(message) :] = np.frombuffer(message, np.uint8)
    rows[len(rows) - len(message) :][:4] ^= 255
    crc = np.zeros(len(rows) // width, np.uint32)
    for column in rows.reshape(-1, width).T.astype(np.uint32):
        crc = _step(crc, column)
    a, b, c, d = _behind_zeros(width)
    total = 0
    for row in crc.tolist():
        total = a[total & 255] ^ b[total >> 8 & 255] ^ c[total >> 16 & 255] ^ d[total >> 24] ^ row
    return total ^ 0xFFFFFFFF


def masked_crc(message: bytes) -> int:
    """The checksum as TFRecords hold it: rotated, so that a checksum of checksums is one."""
    crc = crc32c(message)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


# --- shards


def shards(folder: Path, split: str, resolution: int) -> list[Path]:
    """The shards of one half at one resolution (2^resolution pixels), all of them, in order.

    Raises:
        ValueError: there are none, or fewer than their names speak of.
    """
    places = (folder / split, folder)
    stem = f"{split}-r{resolution:02d}-s-"
    found = next((f for p in places if (f := sorted(p.glob(f"{stem}*.tfrecords")))), [])
    if not found:
        raise ValueError(
            f"no files {split}/{stem}0000-of-*.tfrecords in {folder}; expected the"
            f" TFRecords that Glow's authors made, unpacked, at {1 << resolution} pixels"
        )
    numbers = [re.fullmatch(r"(\d+)-of-(\d+)", f.stem.removeprefix(stem)) for f in found]
    totals = {int(m[2]) for m in numbers if m}
    if not all(numbers) or len(totals) != 1:
        raise ValueError(f"{found[0].parent}: shards of more than one set; keep those of one")
    missing = set(range(totals.pop())) - {int(m[1]) for m in numbers if m}
    if missing:
        raise ValueError(
            f"{found[0].parent}: {len(found)} shards are there, {len(missing)} are missing, the"
            f" first is number {min(missing)}; download it, too"
        )
    return found


def index(path: Path) -> list[tuple[int, int]]:
    """Offset and length of each message of a shard, found without reading them.

    Raises:
        ValueError: the shard is cut or damaged.
    """
    places = []
    size, at = path.stat().st_size, 0
    with open(path, "rb") as file:
        while at < size:
            file.seek(at)
            head = file.read(12)
            length, crc = struct.unpack("<QI", head) if len(head) == 12 else (size, 0)
            if len(head) == 12 and masked_crc(head[:8]) != crc:
                raise ValueError(f"{path} is damaged: no record begins at byte {at}")
            if at + 16 + length > size:
                raise ValueError(
                    f"{path} is cut: a record reaches beyond its end at {size} bytes;"
                    " download it again"
                )
            places.append((at + 12, length))
            at += 16 + length
    return places


def message(path: Path, offset: int, length: int) -> bytes:
    """One message, compared to its checksum."""
    with open(path, "rb") as file:
        file.seek(offset)
        read = file.read(length + 4)
    if len(read) != length + 4 or masked_crc(read[:-4]) != struct.unpack("<I", read[-4:])[0]:
        raise ValueError("the checksum does not fit; download the shard again")
    return read[:-4]


# --- messages


def _varint(message: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        value |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return value, at
    raise ValueError("a number in the message has no end")


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and content of each field of a protobuf message."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        if tag & 7 == 0:
            value, at = _varint(message, at)
            yield tag >> 3, value
            continue
        if tag & 7 == 2:
            length, at = _varint(message, at)
        else:
            length = {1: 8, 5: 4}.get(tag & 7, len(message))
        if at + length > len(message):
            raise ValueError("a field of the message reaches beyond its end")
        yield tag >> 3, message[at : at + length]
        at += length


def _parts(message: bytes, number: int) -> list[bytes]:
    return [part for n, part in _fields(message) if n == number and isinstance(part, bytes)]


def _integers(int64_list: bytes) -> list[int]:
    """A list of whole numbers, packed into one field or not."""
    numbers = []
    for _, part in _fields(int64_list):
        if isinstance(part, int):
            numbers.append(part)
            continue
        at = 0
        while at < len(part):
            value, at = _varint(part, at)
            numbers.append(value)
    return numbers


def features(example: bytes) -> dict[str, list[bytes | int]]:
    """The byte strings and the whole numbers of a `tf.train.Example` by their names."""
    found: dict[str, list[bytes | int]] = {}
    for entry in (e for part in _parts(example, 1) for e in _parts(part, 1)):
        key, feature = (b"".join(_parts(entry, number)) for number in (1, 2))
        for kind, values in _fields(feature):
            if isinstance(values, bytes) and kind in (1, 3):
                name = key.decode(errors="replace")
                found[name] = [*(_parts(values, 1) if kind == 1 else _integers(values))]
    return found


def pixels(example: bytes, size: int) -> bytes:
    """The image of an `Example` with the features `shape` and `data`: size x size x 3 bytes."""
    named = features(example)
    shape, values = named.get("shape"), named.get("data", [])
    data = b"".join(value for value in values if isinstance(value, bytes))
    if shape != [size, size, 3] or len(data) != 3 * size * size:
        raise ValueError(
            f"an image of shape {shape} in {len(data)} bytes; expected {[size, size, 3]}"
        )
    return data
