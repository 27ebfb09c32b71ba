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
