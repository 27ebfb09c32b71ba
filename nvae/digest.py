"""The sha256 of a file: reports name by it what they were made from."""

from __future__ import annotations

import hashlib
import os


def sha256(path: str | os.PathLike[str]) -> str:
    """Of the bytes of a file, in hexadecimal.

    Raises:
        ValueError: there is no such file.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
