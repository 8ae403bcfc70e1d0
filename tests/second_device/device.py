"""Compiles `device.cpp`, and makes a process believe that it has two GPUs."""

from __future__ import annotations

import hashlib
import subprocess
import types
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import include_paths, library_paths

SOURCE = Path(__file__).with_name("device.cpp")
DEVICES = (torch.device("cuda", 0), torch.device("cuda", 1))


def compiled(compiler: str, folder: Path) -> Path:
    """The library, made once for each source and torch. Raises RuntimeError with what the compiler says."""
    made_of = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = folder / f"second_device-{made_of}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        paths = [f"-isystem{path}" for path in include_paths()] + [f"-L{path}" for path in library_paths()]
        # not optimised: it computes nothing, and compiles in half the time
        command = [compiler, "-std=c++20", "-O0", "-w", "-shared", "-fPIC", *paths, str(SOURCE), "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the device of the tests does not compile: {done.stderr[-2000:]}")
    return library


class Stream:
    """As `torch.cuda.Stream`; each device has but one."""

    def __init__(self, device: object = None) -> None:
        self.device = _index(device)

    def synchronize(self) -> None:
        torch.ops.second_device.wait(self.device)


class Event:
    """As `torch.cuda.Event`: a place in the order of one device's transfers."""

    def __init__(self, **_: object) -> None:
        self._number = self._device = 0

    def record(self, stream: Stream | None = None) -> None:
        self._device = (stream or Stream()).device
        self._number = torch.ops.second_device.now()

    def synchronize(self) -> None:
        torch.ops.second_device.finish(self._device, self._number)


def _index(device: Any) -> int:
    return torch.device(device).index or 0 if device is not None else 0


def load(library: Path) -> None:
    """From here on this process has two GPUs. Nothing takes that back."""
    torch.ops.load_library(library)
    # whose memory is pinned torch asks of this device's module
    torch.utils.rename_privateuse1_backend("pinning")
    module: Any = types.ModuleType("torch.pinning")
    module.is_available, module.device_count, module.current_device = lambda: True, lambda: 2, lambda: 0
    module._is_in_bad_fork, module.manual_seed_all = lambda: False, lambda seed: None
    torch._register_device_module("pinning", module)
    cuda: Any = torch.cuda
    cuda._lazy_init, cuda.is_available = lambda: None, lambda: True
    cuda.device_count, cuda.current_device = lambda: len(DEVICES), lambda: 0
    cuda.Event, cuda.current_stream = Event, Stream
    cuda.synchronize = lambda device=None: torch.ops.second_device.wait(_index(device))
    cuda.get_device_name = lambda device=None: "second device"
    cuda.memory_allocated = lambda device=None: torch.ops.second_device.taken_bytes()
    cuda.max_memory_allocated = lambda device=None: torch.ops.second_device.most_bytes()
    cuda.reset_peak_memory_stats = lambda device=None: torch.ops.second_device.begin_anew()


def counted() -> dict[str, int]:
    """What happened since this was asked the last time: `kernels`, `uploads`, `uploaded bytes`, `waits`, …"""
    lines = torch.ops.second_device.counted().splitlines()
    return {what: int(number) for what, _, number in (line.rpartition("\t") for line in lines)}
