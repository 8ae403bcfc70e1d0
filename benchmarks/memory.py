"""How much anonymous memory this process holds: weights, copies and temporaries, without mapped files; and a GPU's."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

INTERVAL = 0.002  # seconds between two looks; a temporary of one large weight lives longer than this
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")


@dataclass
class Peak:
    """The most that was seen over the resting state, in bytes; None where the system does not tell."""

    over_rest: int | None = None


def anonymous() -> int | None:
    """Bytes of anonymous memory that this process holds now; None where the system does not tell (not Linux)."""
    return _field(_STATUS, "RssAnon")


def available() -> int | None:
    """Bytes that new work can use without swapping; None where the system does not tell."""
    return _field(_MEMINFO, "MemAvailable")


def settle() -> None:
    """Gives freed memory back to the system, so that each row starts from the same state and pays for what it takes."""
    with suppress(OSError, AttributeError, TypeError):  # glibc alone has it
        ctypes.CDLL(None).malloc_trim(0)


@contextmanager
def watch(enabled: bool = True) -> Iterator[Peak]:
    """Watches from a thread of its own, which takes time from the work: time and memory come from different rounds."""
    peak, rest, done = Peak(), anonymous(), threading.Event()
    if not enabled or rest is None:
        yield peak
        return
    seen = [rest]

    def look() -> None:
        while not done.wait(INTERVAL):
            seen[0] = max(seen[0], anonymous() or 0)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        seen[0] = max(seen[0], anonymous() or 0)
        done.set()
        thread.join()
        peak.over_rest = seen[0] - rest


@contextmanager
def watch_gpu(device: torch.device, enabled: bool = True) -> Iterator[Peak]:
    """The same of a GPU's memory, as torch gives it out."""
    peak = Peak()
    if not enabled or device.type != "cuda":
        yield peak
        return
    rest = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield peak
    peak.over_rest = torch.cuda.max_memory_allocated(device) - rest


def _field(path: Path, name: str) -> int | None:
    with suppress(OSError):
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None
