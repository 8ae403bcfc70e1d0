"""Limits of one case: seconds, and memory in proportion to the input."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CPU_SECONDS = 10
"""Of the processor, for one case: machines are shared, and a wall clock would fail for what others do."""
WALL_SECONDS = 60
"""For what waits instead of working: a pipe that nobody writes to."""
SPARE_BYTES = 96 << 20
"""Memory that a case may take besides a multiple of its input (the models of the tests are a few kilobytes)."""


def peak(reset: bool = False) -> int:
    """The most memory that this process has had, in bytes; since the last `reset`, where the system can do that."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if reset:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    # not getrusage: a process inherits that number from the one that started it
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def limited(input_bytes: int) -> Iterator[None]:
    """Raises where the body takes too long, or memory out of proportion to the input."""

    def too_long(number: int, _: Any) -> None:
        what = f"{CPU_SECONDS} s of the processor" if number == signal.SIGPROF else f"{WALL_SECONDS} s"
        raise TimeoutError(f"a case took more than {what}")

    before = peak(reset=True)
    old = {number: signal.signal(number, too_long) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in old.items():
            signal.signal(number, handler)
    grown = peak() - before
    if grown > SPARE_BYTES + 50 * input_bytes:
        raise AssertionError(f"{grown >> 20} MB for an input of {input_bytes} bytes")
