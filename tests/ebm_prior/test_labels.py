"""Labels by attribute: what the digits have of their own, and columns of a file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ebm_prior.commands.shared import labels
from ebm_prior.commands.shared.session import Job
from nvae import runtime

DIGITS = torch.tensor([3, 8, 0, 1])


def test_the_digits_have_parity_and_loops_besides_their_class():
    kind, parity, loop = labels.load(["class", "parity", "loop"], "digits", DIGITS, 4, train=True)
    assert torch.equal(kind.values, DIGITS)
    assert parity.values.tolist() == [1, 0, 0, 1]
    assert loop.values.tolist() == [0, 1, 1, 0]
    assert (parity.classes, loop.classes) == (("even", "odd"), ("open", "loop"))


def test_other_data_sets_have_no_parity():
    with pytest.raises(ValueError, match=r"attribute .parity.; cifar10 has class"):
        labels.load(["parity"], "cifar10", DIGITS, 4, train=True)


def test_a_class_is_found_by_name_or_number():
    (parity,) = labels.load(["parity"], "digits", DIGITS, 4, train=True)
    assert [parity.number(text) for text in ("odd", "even", "1")] == [1, 0, 1]
    with pytest.raises(ValueError, match="parity=blue: expected one of even, odd"):
        parity.number("blue")


def test_a_few_images_have_the_classes_of_the_whole_set():
    backbone = SimpleNamespace(config=SimpleNamespace(dataset="digits", image_shape=(1, 8, 8)))
    args = Namespace(max_images=3)
    job = Job(runtime.Runtime(torch.device("cpu")), backbone, None, args, Path(), 0, 10)
    images, (kind, parity) = job.labelled(True, ["class", "parity"])
    assert (len(images), len(kind.classes), len(parity.classes)) == (3, 10, 2)
    assert torch.equal(kind.values, job.images(True)[1])
    assert torch.equal(parity.values, kind.values % 2)


def test_columns_of_a_file_come_by_name_and_an_empty_field_is_no_label(tmp_path):
    (tmp_path / "train.csv").write_text("smiling,hair\n1,2\n,0\n0,1\n1,\n")
    hair, smiling = labels.load(["hair", "smiling"], "faces", None, 4, train=True, folder=tmp_path)
    assert smiling.values.tolist() == [1, -1, 0, 1]
    assert hair.values.tolist() == [2, 0, 1, -1]
    assert hair.classes == ("0", "1", "2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("a\n1\n", "has 1 rows below its heading for 4 images"),
        ("a\n1\nx\n0\n1\n", "column 'a': expected whole numbers"),
        ("a\n1\n-1\n-3\n1\n", "class numbers from -3 to 1"),
    ],
)
def test_a_file_that_does_not_fit_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "validation.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        labels.load(["a"], "faces", None, 4, train=False, folder=tmp_path)
