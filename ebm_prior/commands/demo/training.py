"""Train several priors at once, each by its own `ebm_prior train` process on one core."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm


@dataclass
class Job:
    """One prior to train."""

    checkpoint: Path
    seed: int
    out: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def prior(self) -> Path:
        return self.out / "prior.safetensors"

    def command(self, iterations: int) -> list[str]:
        """What a user would type."""
        flags = {
            "preset": "digits",
            "checkpoint": self.checkpoint,
            "out": self.out,
            "seed": self.seed,
            "iterations": iterations,
            "grid_every": 0,
            "device": "cpu",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
        return [sys.executable, "-m", "ebm_prior", "train", *words]

    def start(self, iterations: int) -> None:
        """Begin afresh; what an earlier demo left in the folder goes."""
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        with open(self.out / "log.txt", "wb") as log:
            self.process = subprocess.Popen(
                self.command(iterations),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )

    def done(self) -> bool:
        """Whether the process has ended.

        Raises:
            ValueError: it failed; with the end of what it said.
        """
        assert self.process is not None
        status = self.process.poll()
        if status:
            told = (self.out / "log.txt").read_text(errors="replace").replace("\r", "\n")
            raise ValueError(
                f"training of {self.out} ended with status {status}: {told.strip()[-600:]}"
            )
        return status is not None

    def step(self) -> int:
        """How far it has come, from its log of numbers."""
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, IndexError, ValueError, KeyError):
            return 0


def train(jobs: Sequence[Job], iterations: int, at_once: int) -> Iterator[Job]:
    """Run the jobs, `at_once` at a time, and yield each when it is done."""
    waiting = list(jobs)
    running: list[Job] = []
    bar = tqdm(total=iterations * len(jobs), desc="training priors", unit="it", smoothing=0.05)
    finished = 0
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start(iterations)
            time.sleep(0.5)
            ended = [job for job in running if job.done()]
            running = [job for job in running if job not in ended]
            finished += iterations * len(ended)
            bar.n = finished + sum(job.step() for job in running)
            bar.refresh()
            yield from ended
    finally:
        bar.close()
        for job in running:
            assert job.process is not None
            job.process.terminate()
            job.process.wait()
