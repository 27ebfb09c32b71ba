"""SIGINT and SIGTERM as a request to stop after the present step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def noted() -> Iterator[list[int]]:
    """Within, the first signal is put into the list; a second one acts as it always does."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows no other
        yield came
        return

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        restore()

    before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        restore()


def leave_signals(worker: int) -> None:
    """Of a process that reads ahead: a signal to the whole group is to save the run, not to break
    it by the loss of a worker. Workers end when their run does.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
