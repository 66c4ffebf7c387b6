"""SIGINT and SIGTERM as a request to finish the update, save and leave."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any


class StopSignal(AbstractContextManager["StopSignal"]):
    """Turns the first SIGINT or SIGTERM into a request to save and leave; a second one ends the process at once.

    `echo_seconds`: signals that come this soon after the first are the same one. A terminal sends Ctrl-C to every
    process in it, and `torchrun`, which gets it too, passes it on to its workers once more.
    """

    def __init__(self, echo_seconds: float = 0.0) -> None:
        self.number: int | None = None
        self._echo_seconds, self._first = echo_seconds, 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._first = number, time.monotonic()
        elif time.monotonic() - self._first >= self._echo_seconds:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
