"""What a batch holds does not depend on who reads it, nor on where it goes."""

from __future__ import annotations

import os

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from ebm_prior.training.batches import Batches, Labelled, default_workers


class Squares(Dataset):
    """Images that draw from PyTorch's own generator."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.full((1, 2, 2), float(index)) + 0 * torch.rand(())


LABELS = torch.arange(46).view(23, 2)
SETS = {
    "a tensor": torch.arange(92.0).view(23, 1, 2, 2),
    "images": Squares(),
    "labelled": Labelled(Squares(), LABELS),
    "a labelled tensor": Labelled(torch.arange(92.0).view(23, 1, 2, 2), LABELS),
}


def flat(batch):
    return [batch] if isinstance(batch, torch.Tensor) else batch


def same(one, two):
    for a, b in zip(one, two, strict=True):
        assert type(a) is type(b)
        assert all(map(torch.equal, flat(a), flat(b)))


@pytest.mark.parametrize("name", SETS)
def test_images_read_here_are_those_that_a_loader_and_its_workers_bring(name):
    here, there = (Batches(SETS[name], 4, seed=1, workers=workers) for workers in (0, 1))
    assert not isinstance(here.epoch(2), type(iter(DataLoader(Squares()))))
    same(here.epoch(2, start=1), there.epoch(2, start=1))


def test_no_image_is_read_before_its_batch_is_asked_for():
    before = torch.get_rng_state()
    batches = Batches(Squares(), 4).epoch(0)
    assert torch.equal(torch.get_rng_state(), before)
    next(batches)
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    for _ in range(4):
        torch.rand(())
    assert torch.equal(torch.get_rng_state(), after), "more than one batch was read"


@pytest.mark.parametrize(
    ("cores", "processes", "expected"), [(1, 1, 1), (2, 1, 2), (64, 1, 4), (64, 32, 2), (8, 16, 1)]
)
def test_readers_are_as_many_as_the_cores_of_a_process_up_to_four(
    monkeypatch, cores, processes, expected
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert default_workers(in_memory=False) == expected
    assert default_workers(in_memory=True) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", SETS)
def test_what_arrives_on_a_gpu_is_what_was_sent(name, workers):
    plain = Batches(SETS[name], 4, seed=1)
    on_gpu = Batches(SETS[name], 4, seed=1, workers=workers, device="cuda")
    for there, here in zip(on_gpu.epoch(0), plain.epoch(0), strict=True):
        for part, expected in zip(flat(there), flat(here), strict=True):
            assert part.is_cuda
            torch.cuda._sleep(10_000_000)  # the next batch must not overwrite this one
            assert torch.equal(part.cpu(), expected)
