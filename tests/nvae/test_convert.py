"""Every converter, from small sources made here: round trips, resuming, and each complaint."""

import csv
import io
import json
import os
import signal
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image

from nvae import data, lmdb_io
from nvae.convert import command, tfrecord, writer


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_files(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def convert(dataset, source, out, *more):
    """The command; 0 if it went well."""
    words = ["convert", "--dataset", dataset, "--source", str(source), "--out", str(out), *more]
    return command.main(words)


def refused(capsys, *words):
    """The message of a command that must fail and leave no finished LMDB."""
    assert convert(*words) == 2
    assert not list(Path(words[2]).glob("*lmdb"))
    return capsys.readouterr().err


def records(path, numbered=True):
    found = lmdb_io.Records(path, numbered=numbered)
    return [found[i] for i in range(len(found))]


def stacked(images):
    return (torch.stack(list(images)) * 255).round().byte().permute(0, 2, 3, 1).numpy()


# --- TFRecords


def varint(value):
    return bytes([value & 127 | 128]) + varint(value >> 7) if value > 127 else bytes([value])


def field(number, content):
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def example(pixels, packed=True):
    """A `tf.train.Example` as Glow's authors wrote it, field by field."""
    values = [varint(v) for v in pixels.shape]
    shape = field(1, b"".join(values)) if packed else b"".join(b"\x08" + v for v in values)
    named = {
        b"shape": field(3, shape),
        b"data": field(1, field(1, pixels.tobytes())),
        b"label": field(3, b"\x08\x03"),
        b"weight": field(2, field(1, struct.pack("<f", 0.5))),
    }
    entries = [field(1, field(1, key) + field(2, value)) for key, value in named.items()]
    return field(1, b"".join(entries))


def write_shard(path, messages):
    path.parent.mkdir(parents=True, exist_ok=True)
    checked = lambda part: part + struct.pack("<I", tfrecord.masked_crc(part))  # noqa: E731
    path.write_bytes(b"".join(checked(struct.pack("<Q", len(m))) + checked(m) for m in messages))


def write_shards(root, split, images, count=2, resolution=5):
    for k in range(count):
        name = f"{split}-r{resolution:02d}-s-{k:04d}-of-{count:04d}.tfrecords"
        write_shard(root / split / name, [example(i, packed=k % 2) for i in images[k::count]])
    return np.concatenate([images[k::count] for k in range(count)])


def plain_crc(message):
    crc = 0xFFFFFFFF
    for byte in message:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ 0x82F63B78 * (crc & 1)
    return crc ^ 0xFFFFFFFF


def test_the_checksum_is_castagnolis():
    assert tfrecord.crc32c(b"123456789") == 0xE3069283
    assert tfrecord.crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4
    assert tfrecord.crc32c(b"\xff" * 32) == 0x62A8AB43


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 127, 3072, 16384, 16385, 20011])
def test_many_rows_at_a_time_give_the_checksum_of_one_byte_after_the_other(length):
    message = noise(length).tobytes()
    assert tfrecord.crc32c(message) == plain_crc(message)


@pytest.mark.parametrize(
    ("name", "resolution"), [("celeba_256", 8), ("imagenet_32", 5), ("imagenet_64", 6)]
)
def test_tfrecords_come_out_bit_by_bit(tmp_path, name, resolution):
    size = 1 << resolution
    for split, count in (("train", 5), ("validation", 2)):
        images = noise(count, size, size, 3, seed=count)
        in_order = write_shards(tmp_path / "tfr", split, images, resolution=resolution)
        assert convert(name, tmp_path / "tfr", tmp_path / "out", "--split", split) == 0
        assert records(tmp_path / "out" / f"{split}.lmdb") == [i.tobytes() for i in in_order]
        read = data.load(name, tmp_path / "out", split == "train")
        assert (stacked(read) == in_order).all()


def test_a_broken_shard_is_named_before_or_when_it_is_read(tmp_path, capsys):
    images = noise(6, 32, 32, 3)
    told = lambda: refused(capsys, "imagenet_32", tmp_path / "tfr", tmp_path / "out")  # noqa: E731
    write_shards(tmp_path / "tfr", "train", images, count=3)
    middle = tmp_path / "tfr" / "train" / "train-r05-s-0001-of-0003.tfrecords"
    whole = middle.read_bytes()
    middle.write_bytes(whole[:-100])
    assert "s-0001-of-0003.tfrecords is cut" in told()
    middle.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert "s-0001-of-0003.tfrecords, byte 12: the checksum does not fit" in told()
    middle.write_bytes(bytes(8) + whole[8:])
    assert "is damaged: no record begins at byte 0" in told()
    middle.unlink()
    assert "2 shards are there, 1 are missing, the first is number 1" in told()


def test_tfrecords_of_another_set_are_refused(tmp_path, capsys):
    write_shards(tmp_path / "tfr", "train", noise(2, 64, 64, 3))
    assert "expected [32, 32, 3]" in refused(capsys, "imagenet_32", tmp_path / "tfr", tmp_path)
    assert "known for celeba_256" in refused(capsys, "ffhq", tmp_path / "tfr", tmp_path)
    assert "train-r06-s-0000-of" in refused(capsys, "imagenet_64", tmp_path / "tfr", tmp_path)


@pytest.mark.parametrize("junk", [b"\x0a\xff\xff\xff\xff\x0f", b"\xff" * 12, b"\x0b", b""])
def test_a_message_that_is_none_is_refused(junk):
    with pytest.raises(ValueError, match=r"message|shape"):
        tfrecord.pixels(junk, 32)


# --- CelebA


def celeba(count=6):
    files = {
        f"img_align_celeba/{i:06d}.jpg": encoded(noise(218, 178, 3, seed=i), "JPEG")
        for i in range(1, count + 1)
    }
    split = [(Path(name).name, "00120210"[k % 8]) for k, name in enumerate(files)]
    return files, split


@pytest.mark.parametrize("kind", ["folder", "zip", "csv"])
def test_celeba_keeps_the_files_of_the_official_split_bit_by_bit(tmp_path, kind):
    files, split = celeba()
    listed = tmp_path / f"list_eval_partition.{'csv' if kind == 'csv' else 'txt'}"
    with open(listed, "w", newline="") as file:
        rows = [("image_id", "partition"), *split] if kind == "csv" else split
        csv.writer(file, delimiter="," if kind == "csv" else " ").writerows(rows)
    if kind == "zip":
        source = write_zip(tmp_path / "img_align_celeba.zip", {**files, "__MACOSX/._1.jpg": b"x"})
    else:
        source = write_files(tmp_path, files) / "img_align_celeba"
    for number, name in enumerate(("train", "validation", "test")):
        assert convert("celeba_64", source, tmp_path / "out", "--split", name) == 0
        mine = [
            f for f, (_, half) in zip(files.values(), split, strict=True) if half == str(number)
        ]
        assert records(tmp_path / "out" / f"{name}.lmdb") == mine
    assert data.load("celeba_64", tmp_path / "out", True)[0].shape == (3, 64, 64)


def test_celeba_without_its_list_or_with_one_that_does_not_fit_is_refused(tmp_path, capsys):
    files, split = celeba()
    source = write_zip(tmp_path / "x.zip", files)
    told = lambda: refused(capsys, "celeba_64", source, tmp_path / "out")  # noqa: E731
    assert "no list_eval_partition.txt beside" in told()
    listed = tmp_path / "list_eval_partition.txt"
    listed.write_text("\n".join(map(" ".join, [*split, ("202599.jpg", "0")])))
    assert "names 1 pictures for train that are not in" in told()
    listed.write_text("000001.jpg train\n")
    assert "'000001.jpg train': expected a picture's name and 0, 1 or 2" in told()
    listed.write_text("000001.jpg 0\n")
    write_zip(source, {**files, "img_celeba/000001.jpg": b""})
    assert "has several pictures 000001.jpg" in told()


# --- FFHQ


def ffhq(count=20, size=264):
    return {f"{i:05d}.png": encoded(noise(size, size, 3, seed=i)) for i in range(count)}


def resized(file, size=256):
    image = Image.open(io.BytesIO(file)).resize((size, size), Image.Resampling.BILINEAR)
    return image.tobytes()


def test_ffhq_is_split_once_at_random_and_resized(tmp_path):
    files = ffhq()
    source = write_files(tmp_path / "images", files)
    assert convert("ffhq", source, tmp_path / "out") == 0
    # The other half later, from a zip with subfolders: the split is kept.
    packed = write_zip(tmp_path / "x.zip", {f"{n[:2]}000/{n}": f for n, f in files.items()})
    assert convert("ffhq", packed, tmp_path / "out", "--split=validation", "--seed=3") == 0
    with np.load(tmp_path / "out" / "train_test_ind.npz") as split:
        train, test = split["train"].tolist(), split["test"].tolist()
    assert sorted(train + test) == list(range(20))
    assert len(train) == 18
    assert train != sorted(train)
    stored = records(tmp_path / "out" / "train.lmdb") + records(tmp_path / "out/validation.lmdb")
    assert stored == [resized(files[f"{i:05d}.png"]) for i in train + test]


@pytest.mark.parametrize("new_format", [True, False])
def test_ffhq_takes_the_split_that_nvae_wrote(tmp_path, new_format):
    files = ffhq(8, 256)
    source = write_files(tmp_path / "images", files)
    order = np.array([5, 1, 7, 0, 2, 6, 4, 3])
    (tmp_path / "out").mkdir()
    torch.save(
        {"train": order[:6], "test": order[6:]},
        tmp_path / "out" / "train_test_ind.pt",
        _use_new_zipfile_serialization=new_format,
    )
    assert convert("ffhq", source, tmp_path / "out") == 0
    expected = [resized(files[f"{i:05d}.png"]) for i in order[:6]]
    assert records(tmp_path / "out" / "train.lmdb") == expected
    assert not (tmp_path / "out" / "train_test_ind.npz").exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_split_that_wants_to_run_code_or_does_not_fit_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = write_files(tmp_path / "images", {"00000.png": b"", "00001.png": b""})
    split = tmp_path / "split.pt"
    words = ("ffhq", source, tmp_path / "out", "--split_file", str(split))
    for new_format in (True, False):
        torch.save({"train": Evil()}, split, _use_new_zipfile_serialization=new_format)
        assert "it asks for posix.mkdir" in refused(capsys, *words)
    torch.save({"train": np.array([0, 5]), "test": np.array([1])}, split)
    assert "counts 3 pictures" in refused(capsys, *words)
    torch.save({"train": np.array([0, 1]), "test": np.array([1])}, split)
    assert "holds an index twice" in refused(capsys, *words)
    split.write_bytes(b"PK")
    assert "is no file of the indices train and test" in refused(capsys, *words)
    assert not (tmp_path / "evil").exists()


# --- LSUN


def write_lsun(root, name, count=5):
    images = {f"{i * 7919 % 997:040x}": noise(90, 130, 3, seed=i) for i in range(count)}
    with lmdb.open(str(root / name), map_size=1 << 26) as env, env.begin(write=True) as t:
        for key, pixels in images.items():
            t.put(key.encode(), encoded(pixels, "WEBP"))
    return root


def test_a_smaller_lsun_gives_the_same_images(tmp_path):
    source = write_lsun(tmp_path, "tower_val_lmdb")
    assert convert("lsun_tower_64", source, tmp_path / "out", "--split", "validation") == 0
    before, after = (data.load("lsun_tower_64", f, False) for f in (source, tmp_path / "out"))
    assert (stacked(before) == stacked(after)).all()
    assert after.load_image(0).size == (92, 64)
    keys = [
        lmdb_io.Records(f / "tower_val_lmdb", numbered=False).key(3)
        for f in (source, tmp_path / "out")
    ]
    assert keys[0] == keys[1]


def test_lsun_is_made_from_pictures_too(tmp_path):
    files = {f"{i}.png": encoded(noise(64, 80, 3, seed=i)) for i in range(12)}
    source = write_files(tmp_path / "images", files)
    assert convert("lsun_church_64", source, tmp_path / "out", "--whole") == 0
    read = data.load("lsun_church_64", tmp_path / "out", True)
    assert [read.load_image(i).tobytes() for i in range(12)] == [
        Image.open(io.BytesIO(files[name])).tobytes() for name in sorted(files)
    ]


def test_lsun_of_another_half_and_a_zipped_one_are_refused(tmp_path, capsys):
    source = write_lsun(tmp_path, "tower_val_lmdb") / "tower_val_lmdb"
    assert "is not tower_train_lmdb" in refused(capsys, "lsun_tower_64", source, tmp_path / "out")
    packed = write_zip(tmp_path / "x.zip", {"tower_val_lmdb/data.mdb": b""})
    assert "holds an LMDB: unzip it" in refused(capsys, "lsun_tower_64", packed, tmp_path / "out")
    words = ("lsun_tower_64", str(tmp_path), str(tmp_path), "--split", "validation")
    assert convert(*words) == 2
    assert "is where the source lies" in capsys.readouterr().err


# --- folders and zips


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_pictures_are_taken_from_the_subfolder_of_their_half(tmp_path, kind):
    files = {f"{h}/{i}.png": encoded(noise(32, 32, 3)) for h in ("train", "val") for i in range(3)}
    files["train/wide.jpg"] = encoded(np.full((40, 90, 3), 7, np.uint8), "JPEG")
    source = tmp_path / "pictures"
    source = write_files(source, files) if kind == "folder" else write_zip(source, files)
    for split in ("train", "validation"):
        assert convert("imagenet_32", source, tmp_path / "out_32", "--split", split) == 0
    assert len(data.load("imagenet_32", tmp_path / "out_32", False)) == 3
    train = data.load("imagenet_32", tmp_path / "out_32", True)
    assert len(train) == 4
    assert (stacked([train[0]]) == noise(32, 32, 3)).all()
    assert (stacked([train[3]]) == 7).all()


@pytest.mark.parametrize(
    ("files", "more", "message"),
    [
        ({"a.png": b""}, [], "no pictures of its own for train; expected the subfolders"),
        ({"a.txt": b""}, [], r"no pictures in .*the folder holds a\.txt"),
        ({"a.png": b"no png"}, ["--whole"], r"images, a\.png: cannot be read as an image"),
        ({"a.png": b""}, ["--split=test"], "imagenet_32 has only train and validation"),
        ({"a.png": b""}, ["--whole", "--workers=0"], "--workers: got 0"),
    ],
)
def test_pictures_that_cannot_be_converted_are_told(tmp_path, capsys, files, more, message):
    source = write_files(tmp_path / "images", files)
    told = refused(capsys, "imagenet_32", source, tmp_path / "out", *more)
    assert pytest.raises(ValueError, match=message).matches(ValueError(told)), told


def test_a_missing_source_and_broken_zips_are_told(tmp_path, capsys):
    words = ("imagenet_32", tmp_path / "x.zip", tmp_path / "out", "--whole")
    assert "x.zip does not exist" in refused(capsys, *words)
    (tmp_path / "x.zip").write_bytes(b"PK\x03\x04 and no more")
    assert "is no whole zip" in refused(capsys, *words)
    write_zip(tmp_path / "x.zip", {"a.png": encoded(noise(32, 32, 3))})
    whole = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    assert "a.png: cannot be unzipped: Bad CRC-32" in refused(capsys, *words)


# --- writing


def pictures(root, count=40):
    files = {f"{i:03d}.png": encoded(noise(32, 32, 3, seed=i)) for i in range(count)}
    return write_files(root / "images", files), [noise(32, 32, 3, seed=i) for i in range(count)]


# Slowly, 16 records at a time, telling after each transaction.
SLOWLY = """
import sys, time
from nvae.convert import command, writer
writer.BATCH = 0
commit = writer._commit
def slow_commit(environment, batch):
    time.sleep(0.05)
    commit(environment, batch)
    print("written", flush=True)
writer._commit = slow_commit
sys.exit(command.main(sys.argv[1:]))
"""


def test_killed_at_any_moment_it_goes_on_and_ends_the_same(tmp_path):
    source, images = pictures(tmp_path, 150)
    out = tmp_path / "out"
    words = ["convert", "--dataset=imagenet_32", f"--source={source}", f"--out={out}", "--whole"]
    environment = {**os.environ, "PYTHONPATH": str(Path(lmdb_io.__file__).parent.parent)}
    for kills in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", SLOWLY, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        if kills < 3:
            for _ in range(kills):  # the first time before anything is written
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
            process.communicate()
            assert not (out / "train.lmdb").exists()
    last, errors = process.communicate()
    assert process.returncode == 0, errors.decode()
    assert last.count(b"written") < 10  # of 10: it did not begin anew
    assert records(out / "train.lmdb") == [i.tobytes() for i in images]
    assert sorted(p.name for p in (out / "train.lmdb").iterdir()) == [
        "conversion.json",
        "data.mdb",
    ]


# No file may grow beyond half of what is needed: the same error path as a full disk.
LIMITED = """
import resource, sys
from nvae.convert import command
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
sys.exit(command.main(sys.argv[1:]))
"""


def test_on_a_full_disk_it_stops_with_a_message_and_can_go_on(tmp_path, monkeypatch):
    source, images = pictures(tmp_path)
    words = ["convert", "--dataset=imagenet_32", f"--source={source}", f"--out={tmp_path / 'out'}"]
    told = subprocess.run(
        [sys.executable, "-c", LIMITED, "100000", *words, "--whole"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(lmdb_io.__file__).parent.parent)},
    )
    assert told.returncode == 2, told.stderr
    assert "0 of 40 records are safe: make room" in told.stderr
    assert "Traceback" not in told.stderr
    assert not (tmp_path / "out" / "train.lmdb").exists()
    assert command.main([*words, "--whole"]) == 0
    assert records(tmp_path / "out" / "train.lmdb") == [i.tobytes() for i in images]


def test_a_disk_too_small_is_told_before_anything_is_written(tmp_path, capsys, monkeypatch):
    source, _ = pictures(tmp_path, 3)
    free = writer.shutil.disk_usage(tmp_path)._replace(free=9000)
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: free)
    assert "needs about 0.00 GB" in refused(
        capsys, "imagenet_32", source, tmp_path / "out", "--whole"
    )
    assert not (tmp_path / "out").exists()


def test_the_map_grows_with_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "UNKNOWN_SIZE", 1 << 16)
    files = {f"{i}.png": encoded(noise(100, 100, 3, seed=i)) for i in range(30)}
    source = write_files(tmp_path / "images", files)
    assert convert("lsun_tower_128", source, tmp_path / "out", "--whole") == 0
    read = data.load("lsun_tower_128", tmp_path / "out", True)
    assert len(read) == 30
    assert (tmp_path / "out" / "tower_train_lmdb" / "data.mdb").stat().st_size > 1 << 20


def test_a_second_run_changes_nothing_and_other_pictures_are_refused(tmp_path, capsys):
    source, _ = pictures(tmp_path, 3)
    words = ("imagenet_32", source, tmp_path / "out", "--whole")
    assert convert(*words) == 0
    file = tmp_path / "out" / "train.lmdb" / "data.mdb"
    before = (file.read_bytes(), file.stat().st_mtime_ns)
    assert convert(*words) == 0
    assert "was there already: 3 records" in capsys.readouterr().out
    (source / "more.png").write_bytes(b"")
    assert convert(*words) == 2
    assert "was not made from these pictures in this way" in capsys.readouterr().err
    assert (file.read_bytes(), file.stat().st_mtime_ns) == before


def test_what_was_begun_with_other_pictures_or_is_damaged_is_not_continued(tmp_path, capsys):
    source, _ = pictures(tmp_path, 4)
    (source / "003.png").write_bytes(b"bad")
    words = ("imagenet_32", source, tmp_path / "out", "--whole")
    refused(capsys, *words)
    (source / "003.png").write_bytes(encoded(noise(32, 32, 3)))
    assert "was begun with other pictures or settings; remove" in refused(capsys, *words)
    (tmp_path / "out" / "train.lmdb.part" / "conversion.json").unlink()
    assert "was begun with other pictures" in refused(capsys, *words)


def test_pictures_before_the_bad_one_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(writer, "BATCH", 0)  # 16 records in a transaction
    source, images = pictures(tmp_path, 40)
    good = (source / "035.png").read_bytes()
    (source / "035.png").write_bytes(good[:200] + bytes(len(good) - 200))
    words = ("imagenet_32", source, tmp_path / "out", "--whole")
    assert "035.png: cannot be read as an image" in refused(capsys, *words)
    (source / "035.png").write_bytes(good)
    assert convert(*words, "--dry_run") == 0
    assert json.loads(capsys.readouterr().out)["records_there"] == 32
    assert convert(*words) == 0
    assert records(tmp_path / "out" / "train.lmdb") == [i.tobytes() for i in images]


# --- the command


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path, capsys):
    write_files(tmp_path / "images", ffhq(4, 8))
    assert convert("ffhq", tmp_path / "images", tmp_path / "out", "--dry_run") == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["records"] == 3
    assert plan["bytes_needed"] > 3 * 256 * 256 * 3
    assert plan["target"] == str(tmp_path / "out" / "train.lmdb")
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


def test_help_teaches_every_set_without_importing_torch():
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('nvae.lmdb_io', run_name='__main__', alter_sys=True)\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    told = subprocess.run(
        [sys.executable, "-c", code, "--help"],
        capture_output=True,
        text=True,
        cwd=Path(lmdb_io.__file__).parent.parent,
    )
    assert told.returncode == 0
    assert told.stderr.strip() == "False"
    for word in ("celeba_64", "celeba_256", "imagenet_64", "ffhq", "lsun_", "--dry_run", ".part"):
        assert word in told.stdout
