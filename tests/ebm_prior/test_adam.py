"""The optimiser's kernels for many tensors at once, against the plain loop over them."""

from __future__ import annotations

import copy

import pytest
import torch

from ebm_prior.training import adam
from ebm_prior.training.ema import Average

SETTINGS = {"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01}


def parameters(generator, dtype=torch.float64):
    shapes = ((3, 4), (5,), (), (2, 3, 3, 3))
    found = [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]
    return [torch.nn.Parameter(value) for value in found]


def steps(optimizer, tensors, generator, count):
    for _ in range(count):
        for tensor in tensors:
            tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_kernel_for_all_tensors_is_the_loop_over_them(dtype, generator):
    fast = parameters(generator, dtype)
    plain = copy.deepcopy(fast)
    ours = adam.make(fast, name="adam", **SETTINGS)
    theirs = torch.optim.Adam(plain, foreach=False, **SETTINGS)
    assert ours.defaults["fused"]
    again = generator.clone_state()
    steps(ours, fast, generator, 5)
    steps(theirs, plain, again, 5)
    for one, two in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, two)


def test_a_run_begun_with_the_loop_goes_on_with_the_kernel(generator):
    plain = parameters(generator)
    theirs = torch.optim.Adam(plain, foreach=False, **SETTINGS)
    steps(theirs, plain, generator, 3)
    fast = copy.deepcopy(plain)
    ours = adam.make(fast, name="adam", **SETTINGS)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    again = generator.clone_state()
    steps(ours, fast, generator, 3)
    steps(theirs, plain, again, 3)
    for one, two in zip(fast, plain, strict=True):
        torch.testing.assert_close(one, two)


def test_parameters_without_such_a_kernel_get_pytorchs_choice():
    (tensor,) = parameters = [torch.nn.Parameter(torch.zeros(2, device="meta"))]
    assert adam.make(parameters, name="adam", **SETTINGS).defaults["fused"] is None
    assert tensor.device.type not in adam.FUSED


@pytest.mark.parametrize(("limit", "scaled"), [(0.0, False), (1e6, False), (0.5, True)])
def test_the_norm_is_that_of_all_gradients_and_only_a_limit_changes_them(limit, scaled, generator):
    tensors = parameters(generator)
    for tensor in tensors[1:]:  # one has none
        tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    before = [tensor.grad.clone() for tensor in tensors[1:]]
    norm = torch.cat([g.flatten() for g in before]).norm()
    torch.testing.assert_close(adam.gradient_norm(tensors, limit), norm)
    for tensor, gradient in zip(tensors[1:], before, strict=True):
        expected = gradient * limit / norm if scaled else gradient
        torch.testing.assert_close(tensor.grad, expected)


def test_averages_move_together_as_each_would_alone(generator):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    average = Average(module, 0.75)
    start = {name: value.clone() for name, value in average.shadow.items()}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    average.update()
    for name, parameter in module.named_parameters():
        expected = 0.75 * start[name] + 0.25 * parameter
        torch.testing.assert_close(average.shadow[name], expected.detach())
    assert not any(value.requires_grad for value in average.shadow.values())
