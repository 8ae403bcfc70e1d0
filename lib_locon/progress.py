"""A progress bar of one line. Own, because the extension may need nothing but torch and safetensors."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TextIO

WIDTH = 30
EVERY = 0.1  # seconds between two drawings


class ProgressBar:
    """Draws on a terminal only: a log file gets no thousand lines. Use as a context manager."""

    def __init__(self, stream: TextIO, label: str) -> None:
        self.stream = stream
        self.label = label
        self._drawn = 0.0
        self._started = time.monotonic()

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self._drawn:
            self.stream.write("\n")
            self.stream.flush()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes."""
        now = time.monotonic()
        if not self.stream.isatty() or (done < total and now - self._drawn < EVERY):
            return
        self._drawn = now
        share = done / total if total else 1.0
        bar = "█" * round(WIDTH * share)
        rate = done / 1e6 / max(now - self._started, 1e-6)
        self.stream.write(f"\r{self.label} {bar:<{WIDTH}} {share:4.0%} {rate:6.0f} MB/s")
        self.stream.flush()
