"""Batches of images, in an order that depends on seed and epoch alone, from any batch on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ebm_prior import parallel
from ebm_prior.seeds import seeded
from ebm_prior.training import travel
from ebm_prior.training.interrupt import leave_signals

ORDER_KEY = 2**31 + 2  # the order of the images, apart from a process's noise


class Labelled(Dataset[tuple[Tensor, Tensor]]):
    """Images with their labels, (attributes,) class numbers each, -1 = unlabelled."""

    def __init__(self, dataset: Dataset[Tensor], labels: Tensor) -> None:
        self.dataset, self.labels = dataset, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.dataset[index], self.labels[index]

    def many(self, positions: Tensor) -> list[Tensor]:
        """(n,) positions -> [their images, their labels]."""
        return [many(self.dataset, positions), self.labels[positions]]


def many(dataset: Any, positions: Tensor) -> Any:
    """What a `DataLoader` makes a batch of these positions, at once where the data set can."""
    if isinstance(dataset, Tensor):
        return dataset[positions]
    if hasattr(dataset, "many"):
        return dataset.many(positions)
    return default_collate([dataset[i] for i in positions.tolist()])


def default_workers(in_memory: bool) -> int:
    """Processes that read ahead if nobody says how many: none for images that are there.

    Otherwise up to four, as the cores allow that torchrun's processes share.
    """
    if in_memory:
        return 0
    affinity = getattr(os, "sched_getaffinity", None)  # Linux's, where a job may get a few cores
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(4, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


class Batches:
    """A data set, shuffled anew each epoch, dealt out to the processes; the remainder is dropped.

    Args:
        dataset: of images (C, H, W), or of pairs of image and labels; with a length.
        batch_size: images per process and step.
        workers: processes that read ahead; the order does not depend on them.
        device: where the batches are for. To a GPU they travel while it computes.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int,
        *,
        seed: int = 0,
        workers: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.dataset, self.batch_size, self.seed, self.workers = dataset, batch_size, seed, workers
        self.device = torch.device(device)
        sized: Any = dataset  # `Dataset` promises no length, those with positions have one
        self.images = len(sized)
        if batch_size < 1:
            raise ValueError(f"--batch_size {batch_size}: expected at least 1")
        if not len(self):
            raise ValueError(
                f"the data set has {self.images} images, fewer than one batch of {batch_size} for"
                f" each of {parallel.world_size()} processes; lower --batch_size"
            )

    def __len__(self) -> int:
        """Batches per epoch of one process."""
        return self.images // (self.batch_size * parallel.world_size())

    def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
        """This process's batches of an epoch, (batch_size, C, H, W), from batch `start` on.

        Of pairs: [images, labels].
        """
        order = torch.randperm(self.images, generator=seeded("cpu", self.seed, ORDER_KEY, number))
        mine = order[parallel.rank() :: parallel.world_size()]
        batches = mine[: len(self) * self.batch_size].split(self.batch_size)[start:]
        on_gpu = self.device.type == "cuda"
        if not self.workers:
            # Read when asked for and no sooner: a data set may draw from PyTorch's own generator.
            read = (many(self.dataset, batch) for batch in batches)
            return (travel.sent(travel.pinned(b), self.device) for b in read) if on_gpu else read
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch.tolist() for batch in batches],
            num_workers=self.workers,
            worker_init_fn=leave_signals,
            pin_memory=on_gpu,
            # Seeds the workers; without it the loader would draw from PyTorch's own generator.
            generator=seeded("cpu", self.seed, ORDER_KEY, number, parallel.rank()),
        )
        return travel.ahead(loader, self.device) if on_gpu else iter(loader)
