"""Arrays out of pickles and of `torch.save` files, without running what a pickle asks for."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np

_KINDS = ("u1", "i4", "i8", "uint8", "int32", "int64")
_LEGACY = 0x1950A86A20F9469CFC6C  # what torch.save wrote first until PyTorch 1.6


class _Dtype:
    """Stands for a numpy dtype: only its name and its byte order are kept."""

    def __init__(self, name: bytes | str = "", *_: Any) -> None:
        self.name, self.order = name.decode() if isinstance(name, bytes) else name, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        self.order = order.decode() if isinstance(order, bytes) else order


class _Array:
    """Stands for a numpy array; `value` is built from plain bytes."""

    def __init__(self, *_: Any) -> None:
        self.value = np.empty((0, 0), np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, column_major, raw = state
        known = isinstance(dtype, _Dtype) and dtype.name in _KINDS and dtype.order in "<>|"
        if not known or column_major:
            raise ValueError("an array that is not of bytes or whole numbers in row order")
        self.value = np.frombuffer(raw, np.dtype(dtype.name).newbyteorder(dtype.order))
        self.value = self.value.reshape(shape)


def _encode(text: str, encoding: str) -> bytes:
    """How Python 3 writes bytes into the older pickle protocols."""
    if encoding != "latin1":
        raise ValueError(f"bytes written as {encoding}")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Reads plain containers and arrays. Nothing a pickle names is imported or called."""

    known: Mapping[tuple[str, str], Callable[..., Any]] = {
        ("numpy.core.multiarray", "_reconstruct"): _Array,
        ("numpy._core.multiarray", "_reconstruct"): _Array,
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        try:
            return self.known[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}") from None


def _mapping(loaded: Any) -> dict[str, Any]:
    return {
        key.decode() if isinstance(key, bytes) else key: v.value if isinstance(v, _Array) else v
        for key, v in loaded.items()
    }


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """A pickled dict of arrays and plain values; its keys as text."""
    with open(path, "rb") as file:
        return _mapping(_ArraysOnly(file, encoding="bytes").load())


def read_torch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The same from a file of `torch.save`, of the old format or of the new; without torch."""
    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            file.seek(0)
            return _mapping(_legacy(file))
        with zipfile.ZipFile(file) as archive:
            name = next(n for n in archive.namelist() if n.split("/")[1:] == ["data.pkl"])
            return _mapping(_ArraysOnly(io.BytesIO(archive.read(name))).load())


def _legacy(file: BinaryIO) -> Any:
    """Four pickles follow each other: a magic number, a version, the machine, the object."""
    magic, _, _, loaded = (_ArraysOnly(file).load() for _ in range(4))
    if magic != _LEGACY:
        raise ValueError("no file of torch.save")
    return loaded
