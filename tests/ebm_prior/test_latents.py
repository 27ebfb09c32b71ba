"""Layout: the flat u and the list of layers are the same numbers."""

from __future__ import annotations

import pytest
import torch

from ebm_prior.latents import Layout

SHAPES = ((3, 8, 8), (2, 4), (5,))


def test_split_and_join_are_each_others_inverse(generator):
    layout = Layout(SHAPES)
    assert (layout.dim, layout.num_layers) == (192 + 8 + 5, 3)
    u = torch.randn(4, layout.dim, generator=generator)
    z = layout.split(u)
    assert [tuple(part.shape) for part in z] == [(4, *shape) for shape in SHAPES]
    assert torch.equal(layout.join(z), u)
    assert torch.equal(z[0].flatten(1), u[:, :192]), "the top layer comes first"


def test_the_gradient_through_split_is_one_cat():
    u = torch.zeros(2, 205, requires_grad=True)
    z = Layout(SHAPES).split(u)
    sum(part.sum() for part in z).backward()
    assert torch.equal(u.grad, torch.ones_like(u))
    nodes = {part.grad_fn.next_functions[0][0] for part in z}
    assert [type(node).__name__ for node in nodes] == ["SplitWithSizesBackward0"]


def test_a_mask_is_true_at_the_coordinates_of_the_named_layers():
    layout = Layout(SHAPES)
    mask = layout.mask([0, -1])
    assert mask.tolist() == [True] * 192 + [False] * 8 + [True] * 5
    assert not layout.mask([]).any()
    with pytest.raises(ValueError, match=r"layer 3 does not exist.*0 \(top\) to 2 \(bottom\)"):
        layout.mask([3])


def test_layouts_from_json_lists_are_equal_and_hashable():
    assert Layout([list(shape) for shape in SHAPES]) == Layout(SHAPES)
    assert len({Layout(SHAPES), Layout([[3, 8, 8], [2, 4], [5]])}) == 1


@pytest.mark.parametrize(
    "shapes",
    [(), None, "ab", [3], [[]], [[0, 8, 8]], [[True]], [[2.0]], [[1, 1, 1, 1]], [[2**31]]],
)
def test_shapes_that_are_no_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="latent shapes"):
        Layout(shapes)


def test_more_coordinates_than_any_model_has_are_refused():
    with pytest.raises(ValueError, match="more than 2147483647 coordinates"):
        Layout([[2**20, 2**20, 1]])


def test_tensors_of_another_layout_are_refused():
    layout = Layout(SHAPES)
    with pytest.raises(ValueError, match=r"u has shape \(2, 7\), expected \(B, 205\)"):
        layout.split(torch.zeros(2, 7))
    with pytest.raises(ValueError, match="layers have shapes"):
        layout.join([torch.zeros(2, 5)])
