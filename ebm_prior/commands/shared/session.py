"""What a command works with: a backbone, a prior, images, seeded draws in blocks, a report."""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior import checkpoint, parallel
from ebm_prior.backbones.files import Opened, open_backbone
from ebm_prior.base import Prior
from ebm_prior.commands.shared import labels, speed
from ebm_prior.commands.shared.arguments import settings
from ebm_prior.commands.shared.labels import Labels
from ebm_prior.commands.shared.subset import Images, Subset
from ebm_prior.seeds import seeded
from ebm_prior.steps import Steps
from nvae import data, digest, runtime
from nvae.evaluation.job import provenance, write_json


@dataclass(frozen=True)
class Job:
    """One run of a command.

    Whatever is drawn comes in blocks of `batch_size`, each with random numbers that belong to the
    seed, the purpose and the block: neither other blocks nor the number of processes change it.
    Under torchrun the blocks are dealt out, and every process gets all results.
    """

    here: runtime.Runtime
    backbone: Opened
    prior: Prior | None
    args: argparse.Namespace
    out: Path
    seed: int
    batch_size: int
    started: float = field(default_factory=time.perf_counter)

    @property
    def dataset(self) -> str:
        """The name of the data set."""
        return getattr(self.args, "dataset", None) or self.backbone.config.dataset

    def images(self, train: bool, limit: int | None = None) -> tuple[Tensor, Tensor | None]:
        """Images of one half of the data set, (N, C, H, W) on the CPU, with labels or None.

        Args:
            limit: at most so many, chosen by the seed, in the order of the set; by default
                `--max_images`.
        """
        images, labels = self.chosen(train, limit)
        return images[:], labels

    def chosen(self, train: bool, limit: int | None = None) -> tuple[Images, Tensor | None]:
        """The same, but images that are no tensor in memory anyway are read when asked for."""
        images = self._half(train, limit)
        own = images.whole.labels
        # Some of those in memory are drawn anew at each reading, as binary pixels are.
        read = images[:] if images.whole.in_memory else images
        return read, None if own is None else own[images.index]

    def labelled(
        self, train: bool, names: Sequence[str], limit: int | None = None
    ) -> tuple[Tensor, list[Labels]]:
        """Images, and their labels for every attribute of `names`."""
        images = self._half(train, limit)
        folder = getattr(self.args, "labels", None)
        # Of the whole set: a class may be missing among a few images.
        found = labels.load(
            names,
            self.dataset,
            images.whole.labels,
            len(images.whole),
            train=train,
            folder=Path(folder) if folder else None,
        )
        return images[:], [replace(each, values=each.values[images.index]) for each in found]

    def _half(self, train: bool, limit: int | None) -> Subset:
        """The images of one half, none of them kept."""
        root = getattr(self.args, "data", None)
        if root is None and self.dataset != "digits":
            raise ValueError(f"give --data, the folder that holds the images of {self.dataset}")
        found = data.load(self.dataset, root, train, config=self.backbone.config)
        limit = limit or getattr(self.args, "max_images", None)
        index = torch.arange(len(found))
        if limit is not None and limit < len(found):
            order = torch.randperm(len(found), generator=seeded("cpu", self.seed, len(found)))
            index = order[:limit].sort().values
        images = Subset(found, index)
        if tuple(images.shape[1:]) != tuple(self.backbone.config.image_shape):
            raise ValueError(
                f"images of {self.dataset} have shape {tuple(images.shape[1:])}, the VAE takes"
                f" {tuple(self.backbone.config.image_shape)}; give the data it was trained on, or"
                " --dataset folder"
            )
        return images

    # --- draws ----------------------------------------------------------------------------

    def generator(self, *key: int | str) -> torch.Generator:
        """A generator on the device whose numbers belong to the seed and this key."""
        words = (zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key)
        return seeded(self.here.device, self.seed, *words)

    def blocks(self, num: int, what: str, make: Callable[[int, int], Tensor]) -> Tensor:
        """(num, ...) on the CPU of `make(first, count)` for every block; `what` names the bar."""
        firsts = list(range(0, num, self.batch_size))
        mine = firsts[self.here.rank :: self.here.world_size]
        hidden = not self.here.is_main or len(mine) == 1
        found = {
            first: make(first, min(self.batch_size, num - first)).cpu()
            for first in tqdm(mine, what, disable=hidden, leave=False)
        }
        every = {first: x for part in parallel.collect(found) for first, x in part.items()}
        return torch.cat([every[first] for first in firsts])

    def infer(self, x: Tensor, *key: int | str) -> Tensor:
        """Posterior draws u, (N, D) on the CPU, of images x."""

        def make(first: int, count: int) -> Tensor:
            block = x[first : first + count].to(self.here.device)
            return self.backbone_in_use.infer(block, self.generator("infer", *key, first))

        return self.blocks(len(x), "posterior", make)

    def gaussian_u(self, num: int, *key: int | str) -> Tensor:
        """Draws of the VAE's own prior in u-space, (num, D) on the CPU."""
        dim, device = self.backbone.layout.dim, self.here.device

        def make(first: int, count: int) -> Tensor:
            generator = self.generator("gaussian", *key, first)
            return torch.randn(count, dim, generator=generator, device=device)

        return self.blocks(num, "gaussian", make)

    def sample_u(
        self, num: int, *key: int | str, prior: Prior | None = None, **drawing: Any
    ) -> Tensor:
        """Draws of a prior, (num, D) on the CPU; tensors in `drawing` are cut into blocks."""
        chosen: Any = prior or self.prior
        assert chosen is not None

        def make(first: int, count: int) -> Tensor:
            parts = {
                name: value[first : first + count].to(self.here.device)
                if isinstance(value, Tensor)
                else value
                for name, value in drawing.items()
            }
            return chosen.sample_u(count, generator=self.generator("prior", *key, first), **parts)

        return self.blocks(num, "sampling", make)

    def decode(self, u: Tensor, temperature: float = 1.0, *key: int | str) -> Tensor:
        """Images (N, C, H, W) on the CPU of u; the same key draws the same pixel noise.

        Raises:
            ValueError: NaN or infinite values.
        """

        def make(first: int, count: int) -> Tensor:
            block = u[first : first + count].to(self.here.device)
            generator = self.generator("decode", *key, first)
            return self.backbone_in_use.decode(block, temperature, generator).float()

        images = self.blocks(len(u), "decoding", make)
        if not images.isfinite().all():
            raise ValueError(
                "images hold NaN or infinite values; check checkpoint and prior with `ebm_prior"
                " doctor`, or try a temperature nearer to 1"
            )
        return images

    @property
    def backbone_in_use(self) -> Any:
        """The prior's view of the backbone: with the BatchNorm statistics of its training."""
        return self.backbone if self.prior is None else self.prior.backbone

    @property
    def steps(self) -> Steps | None:
        """Of the fast path; None is the plain one."""
        return speed.steps_of(self.args, self.here.device, self.backbone)

    def open_prior(self, path: str | Path) -> Prior:
        """Another prior of the same backbone."""
        return _opened(path, self.backbone, self.args, self.here)

    # --- results --------------------------------------------------------------------------

    def report(self, content: dict[str, Any], protocol: dict[str, Any] | None = None) -> None:
        """Write `report.json`: numbers, and under `protocol` how they came about."""
        if not self.here.is_main:
            return
        files = [self.args.checkpoint, *_several(getattr(self.args, "prior", None))]
        facts = {
            "settings": json.loads(json.dumps(settings(self.args), default=str)),
            "sha256": {str(path): digest.sha256(Path(path)) for path in files},
            "backbone": self.backbone.fingerprint(),
            "seconds": round(time.perf_counter() - self.started, 1),
            "device": str(self.here.device),
            "path": speed.told(
                self.steps, self.backbone, *([self.prior.config.kind] if self.prior else [])
            ),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            **provenance(),
            **(protocol or {}),
        }
        write_json(self.out / "report.json", {**content, "protocol": facts})


@contextlib.contextmanager
def opened(args: argparse.Namespace) -> Iterator[Job]:
    """Open what the common flags name, and keep the folder OUT to this run.

    `args.prior` may be missing, or a list: then `Job.open_prior` opens each. No gradients inside:
    chains enable them for themselves.
    """
    out = Path(args.out)
    with (
        runtime.started(args.device) as here,
        torch.no_grad(),
    ):
        backbone = open_backbone(args.checkpoint, here.device)
        path = getattr(args, "prior", None)
        prior = None
        if isinstance(path, str | Path):
            prior = _opened(path, backbone, args, here)
        with runtime.kept(out, here):
            yield Job(here, backbone, prior, args, out, args.seed, args.batch_size)


def _opened(
    path: str | Path, backbone: Opened, args: argparse.Namespace, here: runtime.Runtime
) -> Prior:
    prior = checkpoint.load(path, backbone).to(here.device)
    return speed.on_path(prior, speed.steps_of(args, here.device, backbone))


def _several(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
