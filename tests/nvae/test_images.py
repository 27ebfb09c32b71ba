"""PNG files and labelled grids."""

import numpy as np
import pytest
import torch
from PIL import Image

from nvae import images


def test_every_8_bit_level_survives_a_png(tmp_path):
    levels = torch.arange(256).view(1, 16, 16)
    images.save_png(tmp_path / "x.png", levels / 255)
    assert (np.array(Image.open(tmp_path / "x.png")) == levels[0].numpy()).all()


def test_values_are_rounded_to_the_nearest_level_and_clamped():
    x = torch.tensor([-0.2, 0.4 / 255, 0.6 / 255, 254.4 / 255, 1.3])
    assert images.to_uint8(x).tolist() == [0, 0, 1, 254, 255]


def test_colour_channels_keep_their_order():
    image = torch.zeros(3, 4, 5)
    image[2, 1, 3] = 1
    picture = images.to_pil(image)
    assert picture.size == (5, 4)
    assert picture.getpixel((3, 1)) == (0, 0, 255)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.tensor([[[float("nan")]]]), "1 values that are NaN or infinite"),
        (torch.tensor([[[255.0]]]), "divide 8-bit levels by 255"),
        (torch.zeros(3, 4), r"shape \(3, 4\)"),
        (torch.zeros(2, 4, 4), r"expected \(1, H, W\) or \(3, H, W\)"),
        (torch.zeros(1, 4, 4, dtype=torch.long), "dtype torch.int64"),
    ],
)
def test_what_is_no_image_is_refused_with_its_reason(tmp_path, x, message):
    with pytest.raises(ValueError, match=message):
        images.save_png(tmp_path / "x.png", x)
    assert list(tmp_path.iterdir()) == []


def test_a_grid_places_images_row_by_row():
    x = torch.linspace(0.1, 0.9, 6).view(6, 1, 1, 1).expand(6, 1, 8, 8)
    picture = np.array(images.grid(x, 3, scale=1).convert("L"))
    assert picture.shape == (2 * 8 + images.PADDING + 12, 3 * 8 + 2 * images.PADDING + 12)
    middles = picture[[10, 20]][:, [10, 20, 30]].flatten()
    assert middles.tolist() == images.to_uint8(x[:, 0, 0, 0]).tolist()


def test_labels_and_caption_make_room_for_themselves_and_leave_the_tiles_alone():
    x = torch.full((4, 3, 32, 32), 0.5)
    plain = images.grid(x, 2, scale=1)
    labelled = images.grid(
        x, 2, scale=1, row_labels=["one", "two"], column_labels=["a", "b"], caption="up\nhere"
    )
    assert labelled.width > plain.width
    assert labelled.height > plain.height
    grey = [int((images.to_array(p) == 128).all(-1).sum()) for p in (plain, labelled)]
    assert grey[0] == 4 * 32 * 32
    assert grey[1] >= grey[0]
    assert images.to_array(labelled).min() < 64  # dark text (antialiased)


@pytest.mark.parametrize(("side", "smooth"), [(8, True), (20, False)])
def test_small_images_are_enlarged_and_tiny_ones_smoothly(side, smooth):
    x = torch.tensor([0.0, 1.0]).view(1, 1, 1, 2).repeat(1, 1, side, side // 2)
    picture = images.to_array(images.grid(x))
    assert picture.shape[0] > 40
    assert (len(np.unique(picture)) > 2) is smooth


def test_a_wrong_number_of_labels_is_refused():
    with pytest.raises(ValueError, match="1 row labels for 2 rows"):
        images.grid(torch.zeros(4, 1, 8, 8), 2, row_labels=["one"])


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="N of at least 1"):
        images.grid(torch.zeros(0, 1, 8, 8))


def test_a_grid_file_is_what_the_function_returns(tmp_path):
    picture = images.save_grid(tmp_path / "deep" / "grid.png", torch.rand(5, 3, 16, 16))
    stored = Image.open(tmp_path / "deep" / "grid.png")
    assert (images.to_array(stored) == images.to_array(picture)).all()
