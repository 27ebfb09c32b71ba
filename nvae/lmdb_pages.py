"""LMDB's tree of pages, walked and checked without LMDB.

The library trusts its file: damage in a page of the tree (a hole left by a broken copy, say) can
end the process instead of raising. This walk touches tree pages only, one in a hundred or fewer,
before the library reads anything. It knows the format of LMDB 0.9 on 64-bit little-endian
machines, without named or multi-valued databases.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

_MAGIC = 0xBEEFC0DE
_PAGE = struct.Struct("<QHHHH")  # its own number, -, kind, where the free room begins, and ends
_META = struct.Struct("<IIQQ" + 2 * "IHHQQQQQ" + "QQ")  # lies behind the page header
_BRANCH, _LEAF = 1, 2
_ELSEWHERE = 1  # flag of a node: the value lies on pages of its own, here is their number


class _Tree(NamedTuple):
    page_size: int
    root: int
    depth: int
    entries: int
    last_page: int


def _tree(file: int, transaction: int) -> _Tree:
    """The tree of one transaction, from the one of the two header pages that tells of it."""
    head = os.pread(file, _PAGE.size + _META.size, 0)
    page_size = struct.unpack_from("<I", head, _PAGE.size + 24)[0]
    for position in (0, page_size):
        head = os.pread(file, _PAGE.size + _META.size, position)
        if len(head) < _PAGE.size + _META.size:
            break
        fields = _META.unpack_from(head, _PAGE.size)
        if fields[0] == _MAGIC and fields[-1] == transaction and fields[4] >= 256:
            depth, entries, root = fields[14], fields[18], fields[19]
            return _Tree(fields[4], root, depth, entries, fields[-2])
    raise ValueError("its header pages are damaged")


def leaf_keys(path: str | os.PathLike[str], transaction: int) -> Iterator[list[bytes]]:
    """Walk the tree of a `data.mdb` and give each leaf's keys, in sorted order.

    Args:
        transaction: number of the transaction whose tree it is (the last one, from LMDB).

    Raises:
        ValueError: the first damaged page. What a page says of itself, and every place that it
            points to, is compared to the file's bounds before it is believed.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        tree = _tree(file, transaction)
        found, seen = 0, set()
        left = [(tree.root, tree.depth)] if tree.entries else []
        while left:
            number, level = left.pop()
            if number > tree.last_page:
                raise ValueError("its header pages point outside of the file")
            page = os.pread(file, tree.page_size, number * tree.page_size)
            try:
                if number in seen or len(page) < tree.page_size:
                    raise ValueError("two places point to it, or it is not all there")
                seen.add(number)
                keys, children = _nodes(page, number, _LEAF if level == 1 else _BRANCH, tree)
            except ValueError as error:
                holes = "it holds nothing but zeros" if not any(page) else str(error)
                raise ValueError(
                    f"page {number} of {tree.last_page + 1} is damaged: {holes};"
                    " copy or download the file again"
                ) from None
            left += [(child, level - 1) for child in reversed(children)]
            if level == 1:
                found += len(keys)
                yield keys
        if found != tree.entries:
            raise ValueError(f"its header speaks of {tree.entries} records, its pages of {found}")
    finally:
        os.close(file)


def _nodes(page: bytes, number: int, kind: int, tree: _Tree) -> tuple[list[bytes], list[int]]:
    """The keys of a page, and for a branch the numbers of the pages below it."""
    size = tree.page_size
    own_number, _, own_kind, lower, upper = _PAGE.unpack_from(page)
    if own_number != number or own_kind != kind or not 16 <= lower <= upper <= size:
        raise ValueError("its header is not that of a page of the tree")
    starts = np.frombuffer(page, "<u2", (lower - 16) // 2, 16).astype(np.int64)
    if not len(starts) or (starts < upper).any() or (starts > size - 8).any():
        raise ValueError("its records lie outside of it")
    values = np.frombuffer(page, np.uint8)
    heads = values[starts[:, None] + np.arange(8)].view("<u2").astype(np.int64)
    low, high, flags, key_length = heads.T
    key_ends = starts + 8 + key_length
    if kind == _BRANCH:
        children = low | high << 16 | flags << 32
        if (key_ends > size).any() or (children > tree.last_page).any():
            raise ValueError("its records point outside of the file")
        return [], children.tolist()
    length, elsewhere = low | high << 16, flags == _ELSEWHERE
    if (flags & ~_ELSEWHERE).any() or (key_ends + np.where(elsewhere, 8, length) > size).any():
        raise ValueError("its records are of no known kind or reach outside of it")
    first = values[key_ends[elsewhere][:, None] + np.arange(8)].view("<u8").ravel()
    needed = (length[elsewhere] + 16 + size - 1) // size
    if (first > tree.last_page).any() or (first + needed.astype("<u8") - 1 > tree.last_page).any():
        raise ValueError("its records point outside of the file")
    keys = [page[a + 8 : b] for a, b in zip(starts.tolist(), key_ends.tolist(), strict=True)]
    return keys, []
