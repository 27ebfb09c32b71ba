"""Batches whose images depend on seed and step alone: not on processes, workers or restarts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from nvae import distributed
from nvae.seeds import derived
from nvae.training.interrupt import leave_signals


def orders(images: int, seed: int) -> Iterator[Tensor]:
    """For each epoch the order of the images: a shuffling `DataLoader`'s with this seed."""
    generator = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(range(images), generator=generator)
    while True:
        # A loader first draws a seed for its workers.
        torch.empty((), dtype=torch.int64).random_(generator=generator)
        yield torch.tensor(list(sampler))


class Drawn(Dataset[Tensor]):
    """Images whose random flips and crops belong to (seed, epoch, image)."""

    def __init__(self, images: Dataset[Tensor], seed: int, epoch: int) -> None:
        self.images, self.key = images, (seed, epoch)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Tensor]:
        """A batch of images; PyTorch's own generator, from which they draw, is put back."""
        before = torch.get_rng_state()
        try:
            return [self._image(index) for index in indices]
        finally:
            torch.set_rng_state(before)

    def _image(self, index: int) -> Tensor:
        # Not `torch.manual_seed`: that seeds the GPUs too.
        torch.default_generator.manual_seed(derived(*self.key, index))
        return self.images[index]


class Batches:
    """A data set, shuffled anew each epoch, dealt out to the processes; the remainder is dropped.

    In each step process r gets the r-th part of what one process with a batch as large as all
    together would get, micro batch by micro batch.

    Args:
        batch_size: images per process and step.
        micro: images per process and forward pass, a divisor of it.
        workers: processes that read ahead.
        pin: copy to pinned memory, from where a GPU reads at once.
    """

    def __init__(
        self,
        images: Dataset[Tensor],
        batch_size: int,
        *,
        seed: int,
        micro: int,
        workers: int = 0,
        pin: bool = False,
    ) -> None:
        sized: Any = images  # `Dataset` promises no length, those with positions have one
        self.images, self.seed = images, seed
        self.batch_size, self.micro = batch_size, micro
        self.workers, self.pin = workers, pin
        self.iterations = len(sized) // (batch_size * distributed.world_size())
        if not self.iterations:
            raise ValueError(
                f"--batch_size {batch_size} for each of {distributed.world_size()} processes is"
                f" more than the {len(sized)} images there are"
            )
        self._orders, self._drawn = orders(len(sized), seed), 0
        self._order = torch.empty(0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Tensor]:
        """This process's batches (batch_size, C, H, W) of an epoch, from batch `start` on."""
        while self._drawn <= number:  # epochs only ever go up
            self._order, self._drawn = next(self._orders), self._drawn + 1
        world, together = distributed.world_size(), self.batch_size * distributed.world_size()
        parts = self._order[: self.iterations * together].view(-1, world, self.micro)
        mine = parts[:, distributed.rank()].reshape(self.iterations, self.batch_size)
        return iter(
            DataLoader(
                Drawn(self.images, self.seed, number),
                batch_sampler=mine[start:].tolist(),
                generator=torch.Generator(),  # else the loader draws from PyTorch's own
                num_workers=self.workers,
                worker_init_fn=leave_signals,
                pin_memory=self.pin,
            )
        )
