"""What a run shows while it works: a live line on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import io
import sys
import time
from typing import Self, TextIO

__all__ = ["Progress", "duration"]


class _Nowhere(io.StringIO):
    def write(self, text: str) -> int:
        return len(text)


SPARSE_SECONDS = 10.0
LIVE_SECONDS = 0.1


def duration(seconds: float) -> str:
    """
    >>> duration(7), duration(125), duration(7322)
    ('7 s', '2 min 05 s', '2 h 02 min')
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole // 60 % 60:02d} min"


class Progress:
    """Prints to stderr, so that stdout holds results only."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._shown = 0.0
        self._width = 0

    def step(
        self, step: int, end: int, loss: float, tokens_per_second: float, eta: float | None
    ) -> None:
        """After a training step; prints if it is time to."""
        now = time.monotonic()
        if now - self._shown < (LIVE_SECONDS if self._live else SPARSE_SECONDS):
            return
        self._shown = now
        left = "" if eta is None else f"  {duration(eta)} left"
        line = f"step {step:,}/{end:,}  loss {loss:.3f}  {tokens_per_second:,.0f} tokens/s{left}"
        if self._live:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(line + "\n")

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._live and self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0
        self._write(text + "\n")

    @classmethod
    def silent(cls) -> Self:
        """One that shows nothing, of a process that is not the first."""
        return cls(_Nowhere())

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
