"""Seconds by category."""

from __future__ import annotations

import time

from ._absent import absent

__getattr__ = absent(__name__)


class Timer:
    """Each `record` puts the time since the last one into a category."""

    def __init__(self) -> None:
        self.records: dict[str, float] = {}
        self._last = time.perf_counter()

    def record(self, category: str) -> None:
        """Adds the time since the last call, or since the start."""
        now = time.perf_counter()
        self.records[category] = self.records.get(category, 0.0) + now - self._last
        self._last = now
