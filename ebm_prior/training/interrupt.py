"""SIGINT and SIGTERM as a request to stop after the present step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def leave_signals(worker: int) -> None:
    """Of a process that reads ahead: whoever stops the run signals the whole group, and the run is
    to save its state, not to die of a lost worker. Workers end when their run does.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Interrupt:
    """While entered, the first signal is noted; a second one acts as it always does."""

    def __init__(self) -> None:
        self.number = 0  # of the signal that came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
