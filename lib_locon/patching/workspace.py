"""Buffers in which sums are made."""

from __future__ import annotations

from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

from lib_locon.arithmetic import for_later
from lib_locon.patching.memory import allocate

TILE = 2 << 18
"""Numbers in a tile on the CPU: 2 MiB of fp32. Smaller tiles lose to overhead; of larger ones the cache does not hold
what two workers need at a time."""
_Kind: TypeAlias = tuple[str, torch.dtype, torch.device]
"""The name of a buffer, the dtype of its numbers, and where they are."""


class Workspace:
    """Buffers for the sums of one model, one after the other: memory taken anew for each would cost as much as they do.

    What was taken under a name is overwritten by the next that takes it.
    """

    def __init__(self) -> None:
        self._buffers: dict[_Kind, Tensor] = {}
        self._taken: dict[_Kind, dict[tuple[int, ...], Tensor]] = {}
        """The tensors that stand on these, by shape: a model's weights have a few dozen shapes."""
        # glibc gives each large block back to the system at once, until it has seen one of the size freed, and what
        # lies free at the end of a heap from twice that size on: without this, every product of a tile would be made in
        # fresh pages, at three times its cost. It holds for the whole process. Not a page of this one is touched
        torch.empty(8 * TILE, dtype=torch.float32, device="cpu")  # freed here

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor, numbers undefined; the same one for the same shape. Not to be resized."""
        taken = self._taken.setdefault((name, dtype, device), {})
        if shape not in taken:
            with for_later():  # for the weights of a change, of which some may be inference tensors
                size = prod(shape)
                taken[shape] = self._buffer((name, dtype, device), size)[:size].view(shape)
        return taken[shape]

    def _buffer(self, kind: _Kind, size: int) -> Tensor:
        buffer = self._buffers.get(kind)
        if buffer is None or buffer.numel() < size:
            self._taken[kind].clear()  # of the one that is too small
            _, dtype, device = kind
            if device.type == "cpu":
                # tiles differ a little from weight to weight: one buffer is to do for nearly all
                buffer = allocate((max(size, TILE) if 2 * size > TILE else size,), dtype)
            else:
                buffer = torch.empty(size, dtype=dtype, device=device)
            self._buffers[kind] = buffer
        return buffer
