"""Reading LMDB: both key layouts, workers, and every way a copy can be broken."""

import contextlib
import io
import os
import pickle
import struct
import subprocess
import sys

import lmdb
import numpy as np
import pytest
from PIL import Image

from nvae import lmdb_io


def write(path, records):
    """An environment holding `records` (a dict or a list), in one write transaction."""
    if isinstance(records, list):
        records = {str(i).encode(): record for i, record in enumerate(records)}
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as t:
        for key, record in records.items():
            t.put(key, record)
    return path


def raw(seed=0, side=32):
    return np.random.default_rng(seed).integers(1, 256, 3 * side * side, np.uint8).tobytes()


def test_the_length_is_read_from_the_file_and_records_come_by_number(tmp_path):
    stored = [raw(i) for i in range(12)]
    records = lmdb_io.Records(write(tmp_path / "x", stored), numbered=True)
    assert len(records) == 12
    assert [records[i] for i in range(12)] == stored


def test_arbitrary_keys_come_in_sorted_order(tmp_path):
    records = lmdb_io.Records(
        write(tmp_path / "x", {b"b": b"2", b"a": b"1", b"c": b"3"}), numbered=False
    )
    assert [records[i] for i in range(3)] == [b"1", b"2", b"3"]


def test_two_readers_share_one_file(tmp_path):
    path = write(tmp_path / "x", [raw()])
    first, second = (lmdb_io.Records(path, numbered=True) for _ in range(2))
    assert first[0] == second[0]


# A worker: unpickles the records from its input, reads one, forks, and the child reads another.
WORKER = """
import os, pickle, sys
records = pickle.load(sys.stdin.buffer)
print(len(records[0]), flush=True)
if not (child := os.fork()):
    print("child", len(records[1]), flush=True)
    os._exit(0)
os.waitpid(child, 0)
print("parent", len(records[1]))
"""


def test_records_are_read_by_spawned_and_by_forked_workers(tmp_path):
    path = write(tmp_path / "x", [raw(0, side=8), raw(1, side=16)])
    records = lmdb_io.Records(path, numbered=True)
    assert records[1] == raw(1, side=16)
    done = subprocess.run(
        [sys.executable, "-c", WORKER], input=pickle.dumps(records), capture_output=True
    )
    assert done.stdout.decode().split() == ["192", "child", "768", "parent", "768"]


def test_a_truncated_file_is_refused_before_it_is_read(tmp_path):
    path = write(tmp_path / "x", [raw(i) for i in range(20)])
    data = path / "data.mdb"
    whole = data.stat().st_size
    os.truncate(data, whole // 2)
    with pytest.raises(ValueError, match=rf"truncated: {whole // 2} bytes .* speaks of {whole}"):
        lmdb_io.Records(path, numbered=True)


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_file_cut_within_its_header_is_refused(tmp_path, size):
    path = write(tmp_path / "x", [raw()])
    os.truncate(path / "data.mdb", size)
    with pytest.raises(ValueError, match="x"):
        lmdb_io.Records(path, numbered=True)


def test_a_file_that_is_no_lmdb_is_refused(tmp_path):
    (tmp_path / "data.mdb").write_bytes(b"hello" * 4000)
    with pytest.raises(ValueError, match="not a readable LMDB environment"):
        lmdb_io.Records(tmp_path, numbered=True)


def test_a_missing_environment_and_an_empty_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"directory holding data\.mdb"):
        lmdb_io.Records(tmp_path / "none", numbered=True)
    with pytest.raises(ValueError, match="no records"):
        lmdb_io.Records(write(tmp_path / "empty", []), numbered=True)


def tree_pages(path):
    """Numbers of the branch and leaf pages, told by their headers."""
    raw = (path / "data.mdb").read_bytes()
    pages = [struct.unpack_from("<QHHHH", raw, at) for at in range(0, len(raw), 4096)]
    return [n for n, page in enumerate(pages) if page[0] == n > 1 and page[2] in (1, 2)]


@pytest.mark.parametrize("numbered", [True, False])
@pytest.mark.parametrize("damage", ["zeros", "noise", "bits"])
def test_a_damaged_page_of_the_tree_is_refused_before_the_library_meets_it(
    tmp_path, numbered, damage, generator
):
    # Mixed sizes: values within the page and on pages of their own.
    path = write(tmp_path / "x", [raw(i, side=(3, 16, 40)[i % 3]) for i in range(600)])
    data, random = path / "data.mdb", np.random.default_rng(generator.initial_seed())
    whole, pages = data.read_bytes(), tree_pages(path)
    assert len(pages) > 5
    for page in pages[:: -(-len(pages) // 20)]:
        broken = bytearray(whole)
        if damage == "bits":
            # In the page's header and the first places: each must be noticed or harmless.
            for at in random.integers(0, 40, 3):
                broken[page * 4096 + at] ^= 1 << random.integers(8)
        else:
            dirt = bytes(4096) if damage == "zeros" else random.bytes(4096)
            broken[page * 4096 : page * 4096 + 4096] = dirt
        data.write_bytes(broken)
        told = ""
        try:
            found = lmdb_io.Records(path, numbered=numbered)
            for i in range(len(found)):
                with contextlib.suppress(ValueError):
                    found[i]
        except ValueError as error:
            told = str(error)
        if damage != "bits":
            assert f"{data}: page {page} of" in told
        if damage == "zeros":
            assert "it holds nothing but zeros" in told
        lmdb_io.close(path)
    data.write_bytes(whole)
    assert len(lmdb_io.Records(path, numbered=numbered)) == 600


def test_keys_of_another_layout_are_named(tmp_path):
    path = write(tmp_path / "x", {b"abc": raw(), b"def": raw()})
    with pytest.raises(ValueError, match=r"keys 0 to 1, got others, the first b'abc'"):
        lmdb_io.Records(path, numbered=True)


def test_a_hole_in_the_numbering_is_named(tmp_path):
    path = write(tmp_path / "x", {b"0": raw(), b"2": raw(), b"7": raw()})
    records = lmdb_io.Records(path, numbered=True)
    with pytest.raises(ValueError, match="record '1' is missing"):
        records[1]


def test_raw_pixels_are_row_major_with_channels_last():
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8)
    image = lmdb_io.raw_image(pixels.tobytes())
    assert image.size == (2, 2)
    assert image.getpixel((1, 0)) == (3, 4, 5)


@pytest.mark.parametrize(
    ("decode", "record", "message"),
    [
        (lmdb_io.raw_image, b"12345", "5 bytes are no square RGB image"),
        (lmdb_io.raw_image, b"", "0 bytes are no square RGB image"),
        (lmdb_io.raw_image, bytes(3 * 64), "nothing but zero bytes"),
        (lmdb_io.encoded_image, bytes(300), "nothing but zero bytes"),
        (lmdb_io.encoded_image, b"GIF89a nonsense", "cannot be decoded"),
    ],
)
def test_a_damaged_record_says_what_is_wrong(decode, record, message):
    with pytest.raises(ValueError, match=message):
        decode(record)


def test_a_cut_jpeg_is_refused():
    file = io.BytesIO()
    Image.fromarray(np.frombuffer(raw(), np.uint8).reshape(32, 32, 3)).save(file, "JPEG")
    with pytest.raises(ValueError, match="truncated"):
        lmdb_io.encoded_image(file.getvalue()[:-400])
