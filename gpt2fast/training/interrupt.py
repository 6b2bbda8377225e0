"""Ctrl-C and SIGTERM as a wish to stop after the step; a second one stops at once."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["StopSignals"]


class StopSignals:
    """Within the block `received` is the signal that came, or None.

    Outside the main thread, where Python delivers no signals, it stays None.

    Args:
        deaf_seconds: a second signal within this time of the first is the first one's echo.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, deaf_seconds: float = 0.0) -> None:
        self.received: int | None = None
        self._deaf_seconds = deaf_seconds
        self._heard = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._heard = number, time.monotonic()
        elif time.monotonic() - self._heard >= self._deaf_seconds:
            self._restore()
            raise KeyboardInterrupt

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
