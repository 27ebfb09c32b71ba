"""Finished rows on disk, so that an evaluation that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ebm_prior import parallel
from ebm_prior.commands.shared.samples import Sampled
from nvae import runtime
from nvae.evaluation.job import write_json
from nvae.runtime import Runtime


class Kept:
    """`rows/<name>-<digest>.json` with numbers, `.npz` with the first images.

    A row is found again by everything that it depends on, its identity, whose digest names it.
    """

    def __init__(self, out: Path, here: Runtime, *, read: bool) -> None:
        self.folder, self.here, self.read = out / "rows", here, read

    def path(self, name: str, identity: dict[str, Any]) -> Path:
        """Of the row's numbers."""
        text = json.dumps(identity, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self.folder / f"{name}-{digest}.json"

    def holds(self, name: str, identity: dict[str, Any]) -> bool:
        """Whether the row is there and may be used; the same on all processes."""
        there = self.read and self.path(name, identity).is_file()
        return bool(parallel.collect(there)[0])

    def get(self, name: str, identity: dict[str, Any]) -> Sampled | None:
        """A row that is there; on the first process."""
        if not self.here.is_main:
            return None
        path = self.path(name, identity)
        numbers = json.loads(path.read_text(encoding="utf-8"))["numbers"]
        with np.load(path.with_suffix(".npz")) as file:
            return Sampled(numbers, torch.from_numpy(file["pictures"]))

    def put(self, name: str, identity: dict[str, Any], found: Sampled) -> None:
        """Write a row, its numbers last: where they are, all of it is."""
        path = self.path(name, identity)
        with runtime.written_whole(path.with_suffix(".npz")) as temporary:
            np.savez(temporary, pictures=found.pictures.numpy())
        write_json(path, {"numbers": found.numbers, "identity": identity})
