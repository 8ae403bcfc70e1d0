"""Memory for pristine weights: in large pages where they fill one, given back when the tensor dies."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from lib_locon.arithmetic import for_later

LARGE = 2 << 20  # bytes: one large page of x86 and most of ARM
FIRST_BLOCK, BLOCK = 4 << 20, 64 << 20  # bytes of pinned memory that are taken at a time
ALIGNED = 512  # bytes, as torch's own tensors in it
SMALL = 64 << 10  # bytes: below it a mapping of its own would waste much of its last page


def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A contiguous tensor on the CPU, numbers undefined. Raises MemoryError or torch's error where there is no room.

    For what stays: among what comes and goes it would fill malloc's heaps, of which glibc gives each thread some of
    64 MiB. When all are full but the last, that one is given back whenever it is empty, and every tile of a sum is
    made in fresh pages.
    """
    nbytes = prod(shape) * dtype.itemsize
    with for_later():
        if nbytes < SMALL or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device="cpu")
        return torch.frombuffer(_mapping(nbytes), dtype=dtype).view(shape)


def _mapping(nbytes: int) -> mmap.mmap:
    """Anonymous and private, so it counts as RssAnon. Lives as long as a tensor (or a memoryview) stands on it.

    A copy of a weight costs four times more for the page faults of 4 KiB pages than for the copying itself (2.5 against
    11 GB/s measured). malloc would also keep what is freed for itself; a mapping goes back to the system at once.
    """
    try:
        mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"no memory for {nbytes} bytes of a pristine weight") from error
    if nbytes >= LARGE:
        with suppress(OSError):  # a kernel built without them: small pages do too
            mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


class Pinned:
    """Pinned memory for what stays. torch gives it out by powers of two, a quarter more than a model's weights take: so
    it is asked for blocks, and weights lie in them side by side. Their memory comes back when all are freed."""

    def __init__(self) -> None:
        self.free()

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A contiguous tensor, numbers undefined; None where the system pins no more."""
        nbytes = prod(shape) * dtype.itemsize
        room = -(-nbytes // ALIGNED) * ALIGNED
        number = next((i for i, (block, used) in enumerate(self._blocks) if len(block) - used >= room), None)
        if number is None:
            # small ones first: not every model is large; and a power of two, or torch takes one and keeps the rest
            size = max(1 << (room - 1).bit_length(), min(BLOCK, FIRST_BLOCK << len(self._blocks)))
            try:
                with for_later():
                    self._blocks.append((torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True), 0))
            except RuntimeError:
                return None
            number = len(self._blocks) - 1
        block, used = self._blocks[number]
        self._blocks[number] = block, used + room
        return block[used : used + nbytes].view(dtype).view(shape)

    def free(self) -> None:
        """Gives the blocks back, at the latest when nothing stands on them any more."""
        self._blocks: list[tuple[Tensor, int]] = []

    @property
    def unused(self) -> int:
        """Bytes of the blocks that nothing was ever put into."""
        return sum(len(block) - used for block, used in list(self._blocks))


class Scratch:
    """Buffers, each lent for one tensor after the other, so that reading a model back touches no new pages.

    What is lent stays as it is while anything stands on it, views of it too: only then is its buffer lent again. So
    there are as many as tensors live at a time. Not pinned: a copy to a GPU that still runs when the tensor dies would
    read the next weight's numbers. Safe for several threads, and without a lock that an interrupt could leave closed.
    """

    def __init__(self) -> None:
        self.free()

    def lend(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor on the CPU, numbers undefined."""
        nbytes = prod(shape) * dtype.itemsize
        if nbytes < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype, device="cpu")
        idle = self._idle
        buffer = _large_enough(idle, nbytes)
        if buffer is None:
            buffer = _mapping(nbytes)
            self._made.append(weakref.ref(buffer, self._made.remove))
        # torch holds on to the memoryview for as long as the storage lives: its death says that the buffer is free
        lease = memoryview(buffer)
        weakref.finalize(lease, idle.append, buffer).atexit = False
        return torch.frombuffer(lease, dtype=dtype, count=prod(shape)).view(shape)

    def free(self) -> None:
        """Gives the buffers back to the system, at the latest when nothing stands on them any more."""
        self._idle: list[mmap.mmap] = []
        self._made: list[weakref.ref[mmap.mmap]] = []

    @property
    def nbytes(self) -> int:
        """Bytes held, lent or not."""
        made = (reference() for reference in list(self._made))
        return sum(len(buffer) for buffer in made if buffer is not None)


def _large_enough(idle: list[mmap.mmap], nbytes: int) -> mmap.mmap | None:
    """Takes one out. Those that are too small go, before a larger one is made."""
    while idle:
        try:
            buffer = idle.pop()
        except IndexError:  # another thread had it
            break
        if len(buffer) >= nbytes:
            return buffer
    return None
