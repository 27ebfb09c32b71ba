"""Data sets: every layout, written small in a temporary folder, read back.

`CIFAR10=folder` (python batches or packs) adds the real one.
"""

import gzip
import io
import os
import pickle
import struct
import sys
from hashlib import sha256

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torch.utils.data import DataLoader

from nvae import arch, data
from tests.conftest import needs_digits


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(1, 256, shape, np.uint8)


def write_lmdb(path, records):
    with lmdb.open(str(path), map_size=1 << 26) as environment, environment.begin(write=True) as t:
        for key, record in records.items():
            t.put(key.encode(), record)


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def chw(pixels):
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


# --- LMDB


@pytest.mark.parametrize("name", ["celeba_256", "ffhq"])
def test_raw_records_of_256_pixels_are_read_bit_by_bit(tmp_path, name):
    faces = noise(3, 256, 256, 3)
    write_lmdb(tmp_path / "train.lmdb", {str(i): f.tobytes() for i, f in enumerate(faces[:2])})
    write_lmdb(tmp_path / "validation.lmdb", {"0": faces[2].tobytes()})
    train, held_out = (data.load(name, tmp_path, half) for half in (True, False))
    assert len(train) == 2
    assert len(held_out) == 1
    assert torch.equal(train[1], chw(faces[1]))
    assert torch.equal(held_out[0], chw(faces[2]))
    assert train[0].dtype == torch.float32


def test_celeba_64_takes_the_face_of_the_photograph(tmp_path):
    photograph = np.zeros((218, 178, 3), np.uint8)
    photograph[40:188, 15:163] = 200
    write_lmdb(tmp_path / "train.lmdb", {"0": encoded(photograph)})
    image = data.load("celeba_64", tmp_path, True)[0]
    assert image.shape == (3, 64, 64)
    assert (image == 200 / 255).all()


def test_lsun_church_is_resized_on_its_shorter_side_and_cropped_in_the_centre(tmp_path):
    church = np.full((128, 256, 3), 10, np.uint8)
    church[:, 64:192] = 90
    write_lmdb(
        tmp_path / "church_outdoor_val_lmdb", {"2a": encoded(church), "1b": encoded(church)}
    )
    images = data.load("lsun_church_64", tmp_path, False)
    assert len(images) == 2
    assert images[0].shape == (3, 64, 64)
    assert (images[0][:, :, 1:-1] == 90 / 255).all()


@pytest.mark.parametrize(
    ("name", "directory"),
    [
        ("lsun_bedroom_128", "bedroom_train_lmdb"),
        ("lsun_church_128", "church_outdoor_train_lmdb"),
        ("lsun_tower_64", "tower_train_lmdb"),
    ],
)
def test_each_class_of_lsun_is_cropped_at_random_for_training(tmp_path, name, directory):
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 128, 0).repeat(3, 2)
    write_lmdb(tmp_path / directory, {"a": encoded(ramp)})
    images = data.load(name, tmp_path, True, augment=True)
    size = int(name.split("_")[-1])
    seen = torch.stack([images[0] for _ in range(12)])
    assert seen.shape == (12, 3, size, size)
    assert len({float(image.mean()) for image in seen}) > 3


def test_images_of_the_other_imagenet_are_refused(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", {"0": noise(64, 64, 3).tobytes()})
    with pytest.raises(ValueError, match="images of 64 pixels; those of imagenet_32 have 32"):
        data.load("imagenet_32", tmp_path, True)


def test_a_broken_record_is_named_by_its_key(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", {"0": noise(64, 64, 3).tobytes(), "1": bytes(64 * 64 * 3)})
    images = data.load("imagenet_64", tmp_path, True)
    assert images[0].shape == (3, 64, 64)
    with pytest.raises(ValueError, match=r"train\.lmdb, record '1': nothing but zero bytes"):
        images[1]


def test_a_photograph_too_small_to_be_celeba_is_refused(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", {"0": encoded(noise(64, 64, 3))})
    with pytest.raises(
        ValueError, match=r"record '0': a photograph of 64x64; expected .* 178x218"
    ):
        data.load("celeba_64", tmp_path, True)[0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("celeba_256", r"train\.lmdb/data\.mdb .*raw RGB bytes.*holds other\.txt"),
        ("celeba_64", r"train\.lmdb/data\.mdb .*image files"),
        ("lsun_church_64", r"church_outdoor_train_lmdb/data\.mdb .*LSUN's own layout"),
        ("cifar10", r"cifar-10-batches-py.*cifar10-train-1of2\.npz.*holds other\.txt"),
        ("mnist", "train-images-idx3-ubyte"),
        ("stacked_mnist", "train-images-idx3-ubyte"),
        ("omniglot", r"no chardata\.mat .*yburda/iwae"),
        ("folder", r"no images below .*ending in \.png"),
        ("imagenet", "expected folder or one of mnist, "),
    ],
)
def test_a_missing_set_says_which_layout_was_expected(tmp_path, name, expected):
    (tmp_path / "other.txt").write_text("hello")
    with pytest.raises(ValueError, match=expected):
        data.load(name, tmp_path, True, config=arch.ModelConfig(dataset="cifar10"))


def test_a_folder_that_is_not_there_and_none_at_all_are_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a folder; expected the one that holds cifar10"):
        data.load("cifar10", tmp_path / "none", True)
    with pytest.raises(ValueError, match="needs a folder to be read from, got none"):
        data.load("cifar10", None, True)


# --- CIFAR-10


def python2_batch(pixels, labels, function=b"numpy.core.multiarray\n_reconstruct\n"):
    """A CIFAR-10 batch as Python 2 and its numpy pickled it, opcode by opcode."""
    text = lambda s: b"U" + bytes([len(s)]) + s  # noqa: E731  SHORT_BINSTRING
    number = lambda n: b"J" + struct.pack("<i", n)  # noqa: E731  BININT
    raw = pixels.tobytes()
    array = b"c" + function + b"cnumpy\nndarray\n" + b"K\x00\x85" + text(b"b") + b"\x87R"
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    dtype += b"(K\x03" + text(b"|") + b"NNN" + number(-1) + number(-1) + b"K\x00tb"
    state = b"(K\x01" + number(len(pixels)) + number(3072) + b"\x86" + dtype + b"\x89"
    state += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + state + text(b"labels") + listed + b"u."


def write_batches(folder, pixels, labels):
    """`pixels` (6 n, 32, 32, 3) as five training batches and a test batch."""
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    flat = pixels.transpose(0, 3, 1, 2).reshape(6, -1, 3072)
    for name, images, classes in zip(names, flat, labels.reshape(6, -1), strict=True):
        (folder / name).write_bytes(python2_batch(images, classes.tolist()))


def write_pack(path, pixels, labels, grid=2):
    n, h, w, c = pixels.shape
    mosaics = -(-n // grid**2)
    padded = np.concatenate([pixels, np.zeros((mosaics * grid**2 - n, h, w, c), np.uint8)])
    blobs = []
    for tiles in padded.reshape(mosaics, grid, grid, h, w, c):
        file = io.BytesIO()
        mosaic = tiles.transpose(0, 2, 1, 3, 4).reshape(grid * h, grid * w, c)
        Image.fromarray(mosaic).save(file, "WEBP", lossless=True, exact=True)
        blobs.append(file.getvalue())
    np.savez(
        path,
        webp=np.frombuffer(b"".join(blobs), np.uint8),
        offsets=np.cumsum([0, *map(len, blobs)]),
        shape=np.array([n, h, w, c]),
        grid=np.array(grid),
        labels=labels,
    )


def write_packs(folder, pixels, labels):
    n = len(labels)
    for name, part in (
        ("train-1of2", slice(0, n // 2)),
        ("train-2of2", slice(n // 2, 5 * n // 6)),
        ("test-first8000", slice(5 * n // 6, n)),
    ):
        write_pack(folder / f"cifar10-{name}.npz", pixels[part], labels[part])


@pytest.mark.parametrize("layout", ["batches", "inside", "packs"])
def test_cifar10_is_read_bit_by_bit_from_batches_and_packs(tmp_path, layout):
    pixels, labels = noise(18, 32, 32, 3), np.arange(18, dtype=np.uint8) % 10
    root = tmp_path
    if layout == "packs":
        write_packs(tmp_path, pixels, labels)
    else:
        write_batches(tmp_path / "cifar-10-batches-py", pixels, labels)
        root = tmp_path / "cifar-10-batches-py" if layout == "inside" else tmp_path
    train, held_out = (data.load("cifar10", root, half) for half in (True, False))
    read = torch.stack([*train, *held_out])
    assert torch.equal(read, torch.stack([chw(p) for p in pixels]))
    assert train.labels.tolist() + held_out.labels.tolist() == labels.tolist()


def test_a_batch_pickled_by_python_3_is_read_too(tmp_path):
    pixels = noise(4, 3072)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        with open(tmp_path / name, "wb") as file:
            pickle.dump({b"data": pixels, b"labels": [1, 2, 3, 4]}, file, protocol=4)
    assert torch.equal(
        data.load("cifar10", tmp_path, False)[3],
        torch.from_numpy(pixels[3]).view(3, 32, 32).float() / 255,
    )


@pytest.mark.parametrize("function", [b"os\nsystem\n", b"builtins\neval\n", b"numpy\nload\n"])
def test_a_batch_that_wants_to_run_code_is_refused_and_nothing_runs(tmp_path, function):
    for name in ("data_batch_1", "test_batch"):
        (tmp_path / name).write_bytes(python2_batch(noise(1, 3072), [0], function))
    asked = function.decode().split("\n")
    with pytest.raises(ValueError, match=rf"test_batch .*it asks for {asked[0]}\.{asked[1]}"):
        data.load("cifar10", tmp_path, False)


def test_a_cut_batch_and_a_cut_pack_are_refused_by_name(tmp_path):
    whole = python2_batch(noise(2, 3072), [0, 1])
    (tmp_path / "test_batch").write_bytes(whole[:3000])
    with pytest.raises(ValueError, match="test_batch is no CIFAR-10 python batch"):
        data.load("cifar10", tmp_path, False)
    (tmp_path / "test_batch").unlink()
    write_pack(tmp_path / "cifar10-test-x.npz", noise(5, 32, 32, 3), np.zeros(5))
    os.truncate(tmp_path / "cifar10-test-x.npz", 4000)
    with pytest.raises(ValueError, match=r"cifar10-test-x\.npz is no CIFAR-10 pack"):
        data.load("cifar10", tmp_path, False)


def test_half_of_a_pack_is_refused(tmp_path):
    write_pack(tmp_path / "cifar10-train-1of2.npz", noise(5, 32, 32, 3), np.zeros(5))
    with pytest.raises(ValueError, match=r"all of cifar10-train-1of2\.npz"):
        data.load("cifar10", tmp_path, True)


@pytest.mark.skipif(
    not os.environ.get("CIFAR10"),
    reason="CIFAR10 is unset; set it to a folder with CIFAR-10 python batches or packs",
)
def test_the_real_cifar10_has_its_published_moments():
    train = data.load("cifar10", os.environ["CIFAR10"], True)
    assert torch.bincount(train.labels).tolist() == [5000] * 10
    x = torch.stack([train[i] for i in range(0, 50000, 5)])
    assert x.mean((0, 2, 3)).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=4e-3)
    assert x.std((0, 2, 3)).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=4e-3)


# --- folders of pictures


@pytest.fixture
def config():
    return arch.ModelConfig(dataset="cifar10")


def test_a_folder_gives_its_pictures_in_the_order_of_their_names(tmp_path, config):
    pixels = noise(3, 32, 32, 3)
    for i in (2, 0, 1):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no picture")
    images = data.load("folder", tmp_path, True, config=config)
    assert torch.equal(torch.stack(list(images)), torch.stack([chw(p) for p in pixels]))


@pytest.mark.parametrize("size", [(32, 32), (64, 100), (100, 64), (20, 33), (33, 20), (1, 1)])
def test_pictures_of_any_size_are_fitted_to_the_model(tmp_path, config, size):
    Image.new("RGB", size, (10, 20, 30)).save(tmp_path / "x.png")
    image = data.load("folder", tmp_path, True, config=config)[0]
    assert image.shape == (3, 32, 32)
    assert torch.allclose(image, torch.tensor([10, 20, 30]).view(3, 1, 1) / 255)


def test_resizing_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert data.Fit(16)(Image.fromarray(stripes)).sub(0.5).abs()[:, :, 2:-2].max() < 0.02


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1"])
def test_pictures_of_any_mode_become_rgb_or_grey(tmp_path, config, mode):
    image = Image.new("L", (32, 32), 255).convert(mode)
    image.save(tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    assert (data.load("folder", tmp_path, True, config=config)[0] > 0.99).all()
    digits = arch.ModelConfig(dataset="digits", num_preprocess_blocks=1, num_postprocess_blocks=1)
    assert data.load("folder", tmp_path, True, config=digits)[0].shape == (1, 8, 8)


def test_transparent_pixels_are_white(tmp_path, config):
    Image.new("RGBA", (32, 32), (255, 0, 0, 0)).save(tmp_path / "x.png")
    assert (data.load("folder", tmp_path, True, config=config)[0] == 1).all()


def test_a_picture_that_cannot_be_read_is_named(tmp_path, config):
    (tmp_path / "bad.png").write_bytes(b"no png")
    Image.new("I;16", (32, 32)).save(tmp_path / "deep.png")
    images = data.load("folder", tmp_path, True, config=config)
    with pytest.raises(ValueError, match=r"bad\.png cannot be read as an image"):
        images[0]
    with pytest.raises(ValueError, match=r"deep\.png has more than 8 bits per channel"):
        images[1]


def test_a_folder_has_a_held_out_half_only_in_subfolders(tmp_path, config):
    for name in ("train/a/1.png", "train/2.png", "validation/3.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / name)
    assert len(data.load("folder", tmp_path, True, config=config)) == 2
    assert len(data.load("folder", tmp_path, False, config=config)) == 1
    assert len(data.load("folder", tmp_path / "validation", True, config=config)) == 1
    with pytest.raises(ValueError, match="make the subfolders train and validation"):
        data.load("folder", tmp_path / "train", False, config=config)


# --- digits and MNIST


# sha256 of the bytes of `sklearn.datasets.load_digits`, in the order of the split.
DIGITS = "22ccb51d1417f8119764af32a91d6d7351b6b6f703ee31920487dcfdf6a4e72a"
CLASSES = "0f9ffd7948cafb397f7a000b667568d2e6ff757cc70e9e96e7ac289f51898d6f"


def test_the_digits_are_split_once_and_for_all():
    needs_digits()
    train, held_out = (data.load("digits", None, half) for half in (True, False))
    assert (len(train), len(held_out)) == (1500, 297)
    x = torch.stack([*train, *held_out])
    assert x.shape == (1797, 1, 8, 8)
    assert torch.equal((x * 16).round(), x * 16)
    assert x.unique().tolist() == [level / 16 for level in range(17)]
    assert held_out.labels[:8].tolist() == [2, 2, 9, 8, 8, 3, 6, 0]
    assert torch.bincount(held_out.labels).min() >= 20
    assert sha256((16 * x).byte().numpy()).hexdigest() == DIGITS
    labels = torch.cat([train.labels, held_out.labels])
    assert sha256(labels.byte().numpy()).hexdigest() == CLASSES


def test_digits_without_scikit_learn_are_one_line_of_advice(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"come with scikit-learn: pip install"):
        data.load("digits", None, True)


def write_mnist(folder, pixels, labels, prefix, zipped):
    opened = gzip.open if zipped else open
    for name, values in (("images-idx3", pixels), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">u4").tobytes()
        with opened(folder / f"{prefix}-{name}-ubyte{'.gz' * zipped}", "wb") as file:
            file.write(header + values.tobytes())


@pytest.mark.parametrize("zipped", [False, True])
def test_mnist_is_padded_and_drawn_as_binary_pixels(tmp_path, zipped):
    pixels = np.zeros((2, 28, 28), np.uint8)
    pixels[0, :, :14], pixels[1] = 255, 128
    labels = np.array([3, 7], np.uint8)
    for prefix in ("train", "t10k"):
        write_mnist(tmp_path, pixels, labels, prefix, zipped)
    train, held_out = (data.load("mnist", tmp_path, half) for half in (True, False))
    assert train.labels.tolist() == [3, 7]
    assert train[0].shape == (1, 32, 32)
    assert train[0].sum() == 28 * 14
    assert train[0][0, 2:30, 2:16].all()
    assert set(train[1].unique().tolist()) == {0.0, 1.0}
    # 784 fair coins: 4 standard errors are 56.
    assert abs(train[1].sum() - 784 * 128 / 255) < 56
    assert not torch.equal(train[1], train[1])
    assert torch.equal(held_out[1], held_out[1])


def test_a_cut_idx_file_is_refused(tmp_path):
    write_mnist(tmp_path, noise(2, 28, 28), np.zeros(2, np.uint8), "train", False)
    os.truncate(tmp_path / "train-images-idx3-ubyte", 1000)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte is no whole idx file"):
        data.load("mnist", tmp_path, True)


def test_stacked_mnist_shows_three_digits_and_their_number(tmp_path):
    pixels = noise(10, 28, 28)
    write_mnist(tmp_path, pixels, np.arange(10, dtype=np.uint8), "train", False)
    images = data.load("stacked_mnist", tmp_path, True)
    assert len(images) == len(images.labels) == 20
    assert images[0].shape == (3, 32, 32)
    seen = []
    for image, label in zip(images, images.labels.tolist(), strict=True):
        written = [label // 100, label // 10 % 10, label % 10]
        inside = (image[:, 2:30, 2:30] * 255).round().byte().numpy()
        assert (inside == pixels[written]).all()
        assert image[:, :2].sum() == 0
        seen.append(written)
    # Each channel shows every digit twice; the channels are not in step.
    assert [sorted(channel) for channel in zip(*seen, strict=True)] == [
        sorted([*range(10)] * 2)
    ] * 3
    assert len({tuple(s) for s in seen}) > 10
    assert torch.equal(images.labels, data.load("stacked_mnist", tmp_path, True).labels)


def test_omniglot_is_read_column_by_column_and_binarised(tmp_path):
    strokes = np.zeros((784, 3))
    strokes[28 * 4 + 9, 0] = 1.0  # column 4, row 9
    strokes[:, 1] = 0.5
    savemat(tmp_path / "chardata.mat", {"data": strokes, "testdata": strokes[:, 1:]})
    train, held_out = (data.load("omniglot", tmp_path, half) for half in (True, False))
    assert (len(train), len(held_out)) == (3, 2)
    assert train[0].shape == (1, 32, 32)
    assert train[0].nonzero().tolist() == [[0, 9 + 2, 4 + 2]]
    # 784 fair coins: 4 standard errors are 56.
    assert abs(train[1].sum() - 784 * 127 / 255) < 56
    assert not torch.equal(train[1], train[1])
    assert torch.equal(held_out[0], held_out[0])


def test_a_matlab_file_that_is_not_omniglots_is_refused(tmp_path):
    (tmp_path / "chardata.mat").write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"chardata\.mat is not the Omniglot file"):
        data.load("omniglot", tmp_path, True)
    savemat(tmp_path / "chardata.mat", {"data": np.zeros((3, 784))})
    with pytest.raises(ValueError, match=r"data is of shape \(3, 784\), expected \(784, n\)"):
        data.load("omniglot", tmp_path, True)


# --- all of them


@pytest.mark.parametrize("name", ["cifar10", "mnist", "stacked_mnist"])
@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("train", [False, True])
def test_many_images_at_once_are_those_one_by_one_with_their_random_numbers(
    tmp_path, name, augment, train
):
    labels = np.arange(18, dtype=np.uint8) % 10
    write_batches(tmp_path / "cifar-10-batches-py", noise(18, 32, 32, 3), labels)
    for prefix in ("train", "t10k"):
        write_mnist(tmp_path, noise(10, 28, 28), np.arange(10, dtype=np.uint8), prefix, False)
    images = data.load(name, tmp_path, train, augment=augment)
    positions = torch.tensor([2, 0, 2, 1])
    before = torch.get_rng_state()
    together = images.many(positions)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    assert torch.equal(together, torch.stack([images[i] for i in positions.tolist()]))
    assert torch.equal(torch.get_rng_state(), after)


def test_flips_come_only_when_asked_for(tmp_path, config):
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "x.png")
    plain = data.load("folder", tmp_path, True, config=config)
    flipped = data.load("folder", tmp_path, True, config=config, augment=True)
    assert all(torch.equal(plain[0], plain[0]) for _ in range(8))
    seen = [flipped[0] for _ in range(64)]
    as_it_was = sum(torch.equal(image, plain[0]) for image in seen)
    mirrored = sum(torch.equal(image.flip(-1), plain[0]) for image in seen)
    assert as_it_was + mirrored == 64
    assert 8 < mirrored < 56  # 6 standard errors


def test_images_that_do_not_fit_the_model_are_refused(tmp_path):
    write_packs(tmp_path, noise(18, 32, 32, 3), np.zeros(18))
    with pytest.raises(ValueError, match=r"cifar10 has images of shape \(3, 32, 32\), the model"):
        data.load("cifar10", tmp_path, True, config=arch.ModelConfig(dataset="celeba_64"))


def test_every_set_survives_pickling_and_iteration_ends(tmp_path, config):
    write_lmdb(tmp_path / "train.lmdb", {"0": noise(32, 32, 3).tobytes()})
    Image.fromarray(noise(32, 32, 3)).save(tmp_path / "x.png")
    write_packs(tmp_path, noise(18, 32, 32, 3), np.zeros(18))
    for name in ("imagenet_32", "folder", "cifar10"):
        images = data.load(name, tmp_path, True, config=config)
        again = pickle.loads(pickle.dumps(images))
        assert torch.equal(again[0], images[0])
        assert len(list(images)) == len(images)


def test_batches_come_stacked_from_a_loader(tmp_path):
    write_lmdb(tmp_path / "train.lmdb", {str(i): noise(32, 32, 3).tobytes() for i in range(5)})
    loader = DataLoader(data.load("imagenet_32", tmp_path, True), batch_size=2, drop_last=True)
    assert [batch.shape for batch in loader] == [(2, 3, 32, 32)] * 2


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_started_anew_read_lmdb(tmp_path, method):
    stored = noise(6, 32, 32, 3)
    write_lmdb(tmp_path / "train.lmdb", {str(i): s.tobytes() for i, s in enumerate(stored)})
    images = data.load("imagenet_32", tmp_path, True)
    assert torch.equal(images[5], chw(stored[5]))  # the file is open here, too
    loader = DataLoader(images, batch_size=3, num_workers=1, multiprocessing_context=method)
    assert torch.equal(torch.cat(list(loader)), torch.stack([chw(s) for s in stored]))
