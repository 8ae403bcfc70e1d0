"""Memory for pristine weights: in large pages where they fill one, or pinned for GPUs; given back when they die."""

from __future__ import annotations

import mmap
import weakref
from contextlib import suppress
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from lib_locon.arithmetic import for_later
from lib_locon.uploads import aligned, pinned

LARGE = 2 << 20  # bytes: one large page of x86 and most of ARM
FIRST_BLOCK, BLOCK = 4 << 20, 64 << 20  # bytes of pinned memory that are taken at a time
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


def in_ram(pristine: Tensor) -> Tensor:
    """A copy that stays, on the CPU."""
    if type(pristine) is not Tensor:  # a quantised one has its own idea of a copy
        return pristine.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return allocate(tuple(pristine.shape), pristine.dtype).copy_(pristine)


def on_device(pristine: Tensor) -> Tensor:
    """A copy that stays, beside it."""
    if type(pristine) is not Tensor:
        return pristine.clone(memory_format=torch.contiguous_format)
    with for_later():
        copy = torch.empty(pristine.shape, dtype=pristine.dtype, device=pristine.device)
    return copy.copy_(pristine)


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


@dataclass(eq=False)
class _Block:
    memory: Tensor
    used: int = 0
    """Bytes from its start on that were ever lent."""
    living: int = 0
    """Tensors that stand on it."""
    idle: dict[int, list[int]] = field(default_factory=dict)
    """By size, where those lay that do not any more."""


class Pinned:
    """Pinned memory for what stays. torch gives it out by powers of two, a quarter more than a model's weights take: so
    it is asked for blocks, in which weights lie side by side.

    A tensor's place is lent again, and a block given back to torch (which keeps it for whoever pins next), after the
    tensor is gone and `settle` was called.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []
        self._gone: list[tuple[_Block, int, int]] = []

    def take(self, shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """A tensor whose numbers lie side by side, undefined; None where the system pins no more."""
        nbytes = prod(shape) * dtype.itemsize
        room = aligned(max(1, nbytes))
        found = self._place(room)
        if found is None:
            return None
        block, start = found
        with for_later():
            tensor = block.memory[start : start + nbytes].view(dtype)
            tensor = tensor.as_strided(shape, strides, tensor.storage_offset())
        block.living += 1
        # noted only: whoever frees it, at whatever line, the GPU may still be reading it
        weakref.finalize(tensor, self._gone.append, (block, start, room)).atexit = False
        return tensor

    def settle(self) -> None:
        """Says that no GPU reads or writes any more what is gone."""
        while self._gone:
            block, start, room = self._gone.pop()
            block.living -= 1
            block.idle.setdefault(room, []).append(start)
        self._blocks = [block for block in self._blocks if block.living]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return sum(len(block.memory) for block in list(self._blocks))

    def holds(self, tensor: Tensor) -> bool:
        """Whether it lies in one of them."""
        begun = tensor.untyped_storage().data_ptr()
        return any(block.memory.data_ptr() == begun for block in list(self._blocks))

    def _place(self, room: int) -> tuple[_Block, int] | None:
        for known in self._blocks:
            if known.idle.get(room):
                return known, known.idle[room].pop()
        roomy = (block for block in self._blocks if len(block.memory) - block.used >= room)
        block = next(roomy, None) or self._another(room)
        if block is None:
            return None
        block.used += room
        return block, block.used - room

    def _another(self, room: int) -> _Block | None:
        # small ones first: not every model is large; and a power of two, or torch takes one and keeps the rest
        size = max(1 << (room - 1).bit_length(), min(BLOCK, FIRST_BLOCK << len(self._blocks)))
        memory = pinned(size)
        if memory is None:
            return None
        self._blocks.append(_Block(memory))
        return self._blocks[-1]


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
