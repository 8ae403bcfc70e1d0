"""Numbers on their way from RAM to a GPU, for which nobody waits.

A copy from ordinary memory lets the caller wait until the GPU has done all that it was asked before; one from pinned
memory does not. So what is sent goes through a few pinned buffers in turn: one is filled while the GPU reads another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lib_locon.arithmetic import for_later

PART = 8 << 20  # bytes of a buffer
BUFFERS = 3
ALIGNED = 256  # bytes, as torch's own memory there


@dataclass
class _Buffer:
    numbers: Tensor
    sent: Any
    """torch's event: that the GPU has read all that was in it, when it was full."""
    used: int = 0


class Uploader:
    """To one GPU (`device`, with its number), in the order of the stream that is current there. For one thread."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[_Buffer] = []

    def send(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Contiguous copies of tensors on the CPU. Small ones lie together there: none is freed before the last."""
        return [there for group in _groups(tensors) for there in self._send(group)]

    def fill(self, out: Tensor, read: Callable[[int, Tensor], object]) -> Tensor:
        """Fills `out`, contiguous and there, and returns it: `read(first, part)` is to write its numbers from number
        `first` on into `part`, on the CPU. What that raises goes on, and `out` is undefined."""
        flat = out.view(-1)
        step = PART // out.dtype.itemsize
        for first in range(0, len(flat), step):
            target = flat[first : first + step]
            with self._buffer(target.nbytes) as here:
                part = here.view(out.dtype)
                read(first, part)
                target.copy_(part, non_blocking=True)
        return out

    def copy(self, out: Tensor, tensor: Tensor) -> None:
        """out ← tensor, on the CPU; of one dtype, and in one order of numbers that lie side by side."""
        self.fill(_flat(out), partial(_copy_part, _flat(tensor)))

    def _send(self, group: Sequence[Tensor]) -> list[Tensor]:
        if len(group) == 1:
            (tensor,) = group
            out = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
            return [self.fill(out, partial(_copy_part, tensor.reshape(-1)))]
        *starts, nbytes = accumulate((aligned(tensor.nbytes) for tensor in group), initial=0)
        there = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        with self._buffer(nbytes) as here:
            for tensor, start in zip(group, starts, strict=True):
                _at(here, start, tensor).copy_(tensor)
            there.copy_(here, non_blocking=True)
        return [_at(there, start, tensor) for tensor, start in zip(group, starts, strict=True)]

    @contextmanager
    def _buffer(self, nbytes: int) -> Iterator[Tensor]:
        """Bytes that the GPU does not read any more, to be filled and sent within this."""
        room = aligned(nbytes)
        buffer = self._buffers[-1] if self._buffers else None
        if buffer is None or len(buffer.numbers) - buffer.used < room:
            buffer = self._next(room)
        start, buffer.used = buffer.used, buffer.used + room
        yield buffer.numbers[start : start + nbytes]

    def _next(self, room: int) -> _Buffer:
        if self._buffers:
            self._buffers[-1].sent.record(torch.cuda.current_stream(self.device))
        if len(self._buffers) < BUFFERS:
            size = PART if self._buffers else room  # one alone need be no larger than what is sent
            buffer = _Buffer(_memory(size), torch.cuda.Event())  # type: ignore[no-untyped-call]
        else:
            buffer = self._buffers.pop(0)
            buffer.sent.synchronize()
            buffer.used = 0
            if len(buffer.numbers) < room:
                buffer.numbers = _memory(PART)
        self._buffers.append(buffer)
        return buffer


def moved(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """These on `device`, in their dtypes; one that is there already is not copied. To a GPU they are on their way, in
    the order of its current stream."""
    away = [tensor for tensor in tensors if tensor.device != device]
    # gradients need torch's own way
    if device.type != "cuda" or not all(tensor.is_cpu and not tensor.requires_grad for tensor in away):
        return [tensor.to(device) for tensor in tensors]
    sent = iter(Uploader(device).send(away))
    return [tensor if tensor.device == device else next(sent) for tensor in tensors]


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """In their order, as many as one buffer holds; a larger one alone."""
    group: list[Tensor] = []
    nbytes = 0
    for tensor in tensors:
        size = aligned(tensor.nbytes)
        if group and nbytes + size > PART:
            yield group
            group, nbytes = [], 0
        group.append(tensor)
        nbytes += size
    if group:
        yield group


def _flat(tensor: Tensor) -> Tensor:
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def _copy_part(flat: Tensor, first: int, part: Tensor) -> None:
    part.copy_(flat[first : first + len(part)])


def aligned(nbytes: int) -> int:
    """So many bytes that the next tensor after them begins at a good address."""
    return -(-nbytes // ALIGNED) * ALIGNED


def _at(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """The part of `memory` (bytes) from `start` on, as a tensor like that."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


def pinned(nbytes: int) -> Tensor | None:
    """Bytes of pinned memory; None where the system pins no more."""
    with for_later(), suppress(RuntimeError):
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
    return None


def _memory(nbytes: int) -> Tensor:
    found = pinned(nbytes)
    if found is not None:
        return found
    with for_later():  # each copy is then waited for, by torch itself
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
