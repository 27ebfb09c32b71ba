"""Train several priors, some at once, each by its own `ebm_prior train` process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

POLL = 0.5  # seconds
DIVERGED = "training diverged"  # what `ebm_prior train` says before it gives up


@dataclass
class Training:
    """One prior to train: the flags of `ebm_prior train`, without dashes, and its folder."""

    out: Path
    flags: Mapping[str, Any]
    more: Sequence[str] = ()  # further words of the command line, as they are
    threads: int | None = None  # of the CPU; None: as the environment says
    may_diverge: bool = False  # then the last good state counts, and `diverged` says what happened
    diverged: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def prior(self) -> Path:
        return self.out / "prior.safetensors"

    def command(self) -> list[str]:
        """What a user would type."""
        flags = {**self.flags, "out": self.out}
        words = [w for name, value in flags.items() for w in (f"--{name}", str(value))]
        return [sys.executable, "-m", "ebm_prior", "train", *words, *self.more]

    def start(self) -> None:
        """Begin; what is said goes to `log.txt` in the folder."""
        self.out.mkdir(parents=True, exist_ok=True)
        threads = {} if self.threads is None else {"OMP_NUM_THREADS": str(self.threads)}
        with open(self.out / "log.txt", "ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **threads}
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
            last = told.strip().splitlines()[-1:]
            if self.may_diverge and last and DIVERGED in last[0] and self.prior.is_file():
                self.diverged = last[0].removeprefix("error: ")
                return True
            raise ValueError(
                f"training of {self.out} ended with status {status}: {told.strip()[-600:]}"
            )
        return status is not None

    def stop(self) -> None:
        """End the process; it saves its state first."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()

    def step(self) -> int:
        """How far it has come, from its log of numbers."""
        try:
            lines = (self.out / "metrics.jsonl").read_text().splitlines()
            return int(json.loads(lines[-1])["step"])
        except (OSError, IndexError, ValueError, KeyError):
            return 0


Some = TypeVar("Some", bound=Training)


def train(trainings: Sequence[Some], at_once: int, steps: int | None = None) -> Iterator[Some]:
    """Run them, `at_once` at a time, and yield each when it is done.

    Args:
        steps: of each, for the bar; None: not known.
    """
    waiting = list(trainings)
    running: list[Some] = []
    total = steps and steps * len(waiting)
    bar = tqdm(total=total, desc="training priors", unit="it", smoothing=0.05)
    finished = 0
    before = signal.signal(signal.SIGTERM, _interrupt)  # or the trainings would outlive us
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                running.append(waiting.pop(0))
                running[-1].start()
            time.sleep(POLL)
            ended = [training for training in running if training.done()]
            running = [training for training in running if training not in ended]
            finished += sum(steps or training.step() for training in ended)
            bar.n = finished + sum(training.step() for training in running)
            bar.refresh()
            yield from ended
    finally:
        signal.signal(signal.SIGTERM, before)
        bar.close()
        for training in running:
            training.stop()


def _interrupt(number: int, frame: object) -> None:
    """A SIGTERM ends as Ctrl-C does: by way of every `finally`."""
    raise KeyboardInterrupt
