"""Pristine weights on their way between RAM and GPUs, for which nobody waits before the end of a change."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.patching.memory import Pinned
from lib_locon.patching.readback import ReadBack
from lib_locon.uploads import Uploader

_ORDERS = (torch.contiguous_format, torch.channels_last, torch.channels_last_3d)


class Transit:
    """For the weights of one model, some of them on GPUs."""

    def __init__(self) -> None:
        self.pinned = Pinned()
        self._uploaders: dict[torch.device, Uploader] = {}
        """To the GPUs that have something under way."""

    def fetch(self, weight: Tensor, base: Tensor | ReadBack) -> Tensor:
        """The base where the weight is; from a file, for a weight on a GPU. Raises FileError."""
        if isinstance(base, ReadBack):
            there = torch.empty(base.shape, dtype=base.dtype, device=weight.device)
            return base.send(self.to(weight.device), there)
        if base.device == weight.device:
            return base
        if not weight.is_cuda or not base.is_cpu:
            return base.to(weight.device)
        uploader = self.to(weight.device)
        return base.to(weight.device, non_blocking=True) if base.is_pinned() else uploader.send([base])[0]

    def put_back(self, weight: Tensor, base: Tensor | ReadBack) -> None:
        """weight ← base; no memory of a GPU is taken for it. From a file: into a contiguous weight on a GPU, in the
        base's dtype. Where that raises BaseLost, a part of the weight is written."""
        if isinstance(base, ReadBack):
            try:
                base.send(self.to(weight.device), weight.detach())
            except FileError as error:
                raise base.lost(error) from error
        elif not weight.is_cuda or not base.is_cpu:
            weight.copy_(base)
        else:
            self._put_back(weight, base)

    def _put_back(self, weight: Tensor, base: Tensor) -> None:
        if base.dtype != weight.dtype or base.stride() != weight.stride():
            # torch would do this on the GPU, which may have no memory left
            base = torch.empty_like(weight.detach(), device="cpu").copy_(base)
        uploader = self.to(weight.device)
        if base.is_pinned():
            weight.copy_(base, non_blocking=True)
        elif _in_order(weight) and base.stride() == weight.stride():
            uploader.copy(weight.detach(), base)
        else:
            weight.copy_(base)

    def copied(self, weight: Tensor, unused: Tensor | None) -> Tensor | None:
        """A copy in RAM of a weight on a GPU, as it is now in the order of what that is asked, whatever is asked after.
        Into one that is not used, if it is of the same form; None where the system pins no more memory."""
        if unused is not None and unused.is_pinned() and unused.stride() == _strides(weight):
            copy: Tensor | None = unused
        else:
            copy = self.pinned.take(tuple(weight.shape), _strides(weight), weight.dtype)
        if copy is not None:
            self.to(weight.device)
            copy.copy_(weight.detach(), non_blocking=True)
        return copy

    def to(self, device: torch.device) -> Uploader:
        """To a GPU, which is then waited for."""
        if device not in self._uploaders:
            self._uploaders[device] = Uploader(device)
        return self._uploaders[device]

    def wait(self) -> None:
        """For all that is under way."""
        for device in list(self._uploaders):
            torch.cuda.synchronize(device)
            self._uploaders.pop(device, None)
        self.pinned.settle()


def _in_order(weight: Tensor) -> bool:
    """Whether its numbers lie one beside the other, in whatever order of its axes."""
    return any(weight.is_contiguous(memory_format=order) for order in _ORDERS)


def _strides(weight: Tensor) -> tuple[int, ...]:
    """Of a copy: in the weight's order nothing has to be turned round on the way, for which a GPU takes memory."""
    found = weight if _in_order(weight) else torch.empty(weight.shape, device="meta")
    return tuple(found.stride())
