"""The job of `ebm_prior sample`: draw blocks of images, write them and the pictures of them."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior import checkpoint, parallel
from ebm_prior.base import Prior
from ebm_prior.commands.sample import Settings
from ebm_prior.commands.sample.table import Blocks, Table
from ebm_prior.commands.shared import labels, sampler, speed
from ebm_prior.commands.shared.arguments import assignments
from ebm_prior.config import PriorConfig
from ebm_prior.seeds import seeded
from ebm_prior.steps import Steps
from nvae import images, runtime
from nvae.digest import sha256
from nvae.evaluation.job import provenance, write_json

PROGRESSIVE, TEMPERATURES = 1, 2  # keys of the pictures' own random numbers
COLUMNS = 8  # images in temperatures.png
FILES = ("checkpoint", "prior")
FREE = -1  # the label of an attribute that is not named


def chosen_labels(given: Sequence[str], config: PriorConfig) -> list[int] | None:
    """NAME=CLASS words as a class number per attribute of the prior.

    Raises:
        ValueError: the prior knows no such attribute or class.
    """
    pairs = assignments("set", given)
    if not pairs:
        return None
    if not config.attributes:
        raise ValueError(
            f"--set {given[0]}: this prior was trained without labels; train one with --attribute"
        )
    known = [attribute.name for attribute in config.attributes]
    chosen = [FREE] * len(known)
    for name, text in pairs:
        if name not in known:
            raise ValueError(f"--set {name}={text}: expected NAME=CLASS with NAME {_or(known)}")
        column = known.index(name)
        names = labels.class_names(name, config.attributes[column].classes)
        chosen[column] = labels.class_number(name, names, text)
    return chosen


def complete(out: Path, identity: dict[str, Any]) -> bool:
    """Whether a folder holds all of a finished run of these settings."""
    try:
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = json.loads(json.dumps(identity))
    partial = any((out / name).exists() for name in (".sampling.json", ".samples.npy"))
    return not partial and isinstance(report, dict) and report.get("identity") == same


def _or(names: Sequence[str]) -> str:
    return " or ".join(names)


@dataclass
class Drawing:
    """All images, in blocks dealt out to the processes; a block has random numbers of its own."""

    settings: Settings
    prior: Prior
    labels: list[int] | None
    here: runtime.Runtime
    steps: Steps | None
    drawing: dict[str, Any] = field(init=False)  # what all blocks' `sample_u` is given

    def __post_init__(self) -> None:
        settings, further = self.settings, {}
        if self.labels is not None:
            further = {"guidance": settings.guidance}
            if settings.label_steps is not None:
                further["label_steps"] = settings.label_steps
        asked = self.asked(1)
        self.drawing = further | sampler.choose(
            self.prior,
            settings.sampler,
            settings.num_steps,
            settings.batch_size,
            labels=asked,
            **further,
        )

    def asked(self, count: int) -> Tensor | None:
        """The labels of so many images, (count, attributes), if there are any."""
        if self.labels is None:
            return None
        return torch.tensor(self.labels, device=self.prior.device).expand(count, -1)

    def all(self, image_shape: tuple[int, int, int]) -> None:
        """Draw and write everything."""
        settings, here, out = self.settings, self.here, Path(self.settings.out)
        started = time.perf_counter()
        out.mkdir(parents=True, exist_ok=True)
        total, size = settings.num_samples, settings.batch_size
        identity, again = self.identity(), settings.resume == "auto"
        if again and complete(out, identity):
            if here.is_main:
                print(f"{total} images in {out}, complete already")
            return
        blocks = Blocks(out, -(-total // size), identity, here, again)
        shape = (total, *image_shape)
        table = None
        if settings.format != "png":
            table = Table(out, shape, here, keep=blocks.going_on)
        shown: dict[int, Tensor] = {}
        wanted = [
            first
            for first, done in zip(range(0, total, size), blocks.before, strict=True)
            if not done or self.in_a_picture(first)
        ]
        with self.progress(blocks) as bar, self.going_on_told(blocks):
            for first in wanted[here.rank :: here.world_size]:  # evenly, after a kill too
                batch = self.draw(first, min(size, total - first))
                self.write(first, batch, table)
                blocks.finish(first // size)
                bar.update(self.images_in(blocks.done) - bar.n)
                if first < settings.grid:
                    shown[first] = batch
        everywhere = {
            first: batch for part in parallel.collect(shown) for first, batch in part.items()
        }
        if not here.is_main:
            return
        if table is not None:
            table.pack()
        if everywhere:
            self.grid(torch.cat([everywhere[first] for first in sorted(everywhere)]))
        seconds = round(time.perf_counter() - started, 1)
        content = {"images": total, "seconds": seconds, "protocol": self.protocol()}
        content["identity"] = identity  # last, and what `complete` looks at
        write_json(out / "report.json", content)
        blocks.forget()
        print(f"{total} images in {out}, {seconds} s")

    @contextlib.contextmanager
    def going_on_told(self, blocks: Blocks) -> Iterator[None]:
        """Say what is kept when the user stops it."""
        try:
            yield
        except KeyboardInterrupt:
            if self.here.is_main:
                kept, total = self.images_in(blocks.done), self.settings.num_samples
                print(
                    f"{kept} of {total} images are kept; go on with the same command and --resume"
                    " auto",
                    file=sys.stderr,
                )
            raise

    def progress(self, blocks: Blocks) -> tqdm[Any]:
        """A bar of the images that all processes have written, moved by each block of the first.

        So it shows the images per second of all; near the end it may wait for the others.
        """
        return tqdm(
            desc="images",
            total=self.settings.num_samples,
            initial=self.images_in(blocks.before),
            unit=" images",
            disable=not self.here.is_main,
        )

    def images_in(self, done: np.ndarray) -> int:
        """How many images the finished blocks hold; the last block may be smaller."""
        total, size = self.settings.num_samples, self.settings.batch_size
        missing = len(done) * size - total if done[-1] else 0
        return int(done.sum(dtype=int)) * size - missing

    def in_a_picture(self, first: int) -> bool:
        """Whether a block is needed beyond its files: then a resumed run draws it again."""
        pictures = self.settings.progressive or bool(self.settings.temperatures)
        return first < self.settings.grid or (pictures and first == 0)

    def draw(self, first: int, count: int) -> Tensor:
        """The block that starts at image `first`, (count, C, H, W) on the CPU.

        Raises:
            ValueError: NaN or infinite values.
        """
        settings, device = self.settings, self.prior.device
        generator = seeded(device, settings.seed, first)
        further = dict(self.drawing)
        if self.labels is not None:
            further["labels"] = self.asked(count)
        states: dict[int, Tensor] = {}  # u_N .. u_0
        u = self.prior.sample_u(count, generator=generator, callback=states.__setitem__, **further)
        batch = self.prior.backbone.decode(u, settings.temperature, generator).float().cpu()
        if not batch.isfinite().all():
            raise ValueError(
                f"images {first} to {first + count - 1} hold NaN or infinite values; check"
                " checkpoint and prior with `ebm_prior doctor`, or try a temperature nearer to 1"
            )
        if settings.progressive and first == 0:
            self.progressive(states)
        if settings.temperatures and first == 0:
            self.temperatures(u[:COLUMNS])
        return batch

    def write(self, first: int, batch: Tensor, table: Table | None) -> None:
        if table is not None:
            table.write(first, batch)
        if self.settings.format != "npz":
            for index, image in enumerate(batch, start=first):
                images.save_png(self.settings.png(index), image)

    # --- pictures

    def grid(self, batch: Tensor) -> None:
        """`grid.png`: the first images."""
        settings = self.settings
        caption = f"{self.name}, temperature {settings.temperature:g}, seed {settings.seed}"
        images.save_grid(Path(settings.out) / "grid.png", batch[: settings.grid], caption=caption)

    def progressive(self, states: dict[int, Tensor]) -> None:
        """`progressive.png`: a row per image, a column per diffusion state, the noise first."""
        settings = self.settings
        generator = seeded(self.prior.device, settings.seed, 0, PROGRESSIVE)
        decode = self.prior.backbone.decode
        decoded = [decode(u, settings.temperature, generator).cpu() for u in states.values()]
        images.save_grid(
            Path(settings.out) / "progressive.png",
            torch.stack(decoded, dim=1).flatten(0, 1),
            columns=len(states),
            column_labels=[f"u_{k}" for k in states],
            caption=f"From the Gaussian prior's noise to the {self.name}'s u_0",
        )

    def temperatures(self, u: Tensor) -> None:
        """`temperatures.png`: a row per temperature, a column per image, always the same u_0.

        The decoder's noise is that of the column as well.
        """
        settings, device = self.settings, self.prior.device
        rows = [
            self.prior.backbone.decode(
                u, temperature, seeded(device, settings.seed, 0, TEMPERATURES)
            ).cpu()
            for temperature in settings.temperatures
        ]
        images.save_grid(
            Path(settings.out) / "temperatures.png",
            torch.cat(rows),
            columns=len(u),
            row_labels=[f"{temperature:g}" for temperature in settings.temperatures],
            caption=f"{self.name}: one u_0 per column, decoded at the temperature of the row",
        )

    # --- reports

    @property
    def name(self) -> str:
        kind = self.prior.config.kind
        name = "EBM prior" if kind == "diffusion" else f"{kind} prior"
        return f"{name}, {' '.join(self.settings.set)}" if self.settings.set else name

    def identity(self) -> dict[str, Any]:
        """What a run must share with the one it goes on with."""
        free = {"device", "resume", "out", "checkpoint", "prior"}
        free |= {"recompute", "plain", "precision"}  # the last as it came out, below
        same = {name: value for name, value in asdict(self.settings).items() if name not in free}
        file = {"prior_sha256": sha256(self.settings.prior)}
        # The steps that a pilot run found are not asked for: found again, they round differently.
        return {**same, **file, "precision": speed.precision_of(self.steps)}

    def protocol(self) -> dict[str, Any]:
        """What the images were made of and with."""
        file = checkpoint.read(self.settings.prior)
        return {
            **asdict(self.settings),
            "path": speed.told(self.steps, self.prior.backbone, self.prior.config.kind),
            **sampler.described(self.prior),
            "sha256": {name: sha256(getattr(self.settings, name)) for name in FILES},
            "backbone": file.fingerprint,
            "prior_step": file.step,
            "config": file.config.to_dict(),
            "bn_statistics": "the prior's" if file.bn_statistics else "the checkpoint's",
            **provenance(),
        }
