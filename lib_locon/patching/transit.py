"""Pristine weights on their way between RAM and GPUs, for which nobody waits before the end of a change."""

from __future__ import annotations

import torch
from torch import Tensor

from lib_locon.errors import FileError
from lib_locon.patching.memory import Pinned
from lib_locon.patching.places import may_run_on, on_its_device
from lib_locon.patching.readback import ReadBack
from lib_locon.uploads import Uploader


class Transit:
    """For the weights of one model, some of them on GPUs. What it returns of others is what torch would."""

    def __init__(self) -> None:
        self.pinned = Pinned()
        self._uploaders: dict[torch.device, Uploader] = {}
        """To the GPUs that have something under way."""

    def fetch(self, weight: Tensor, base: Tensor | ReadBack) -> Tensor:
        """The base where the weight is. Raises FileError."""
        if isinstance(base, ReadBack):
            there = torch.empty(base.shape, dtype=base.dtype, device=weight.device)
            return base.send(self._to(weight), there)
        if weight.is_cuda and base.is_cpu:
            self._to(weight)
        return on_its_device(weight, base)

    def put_back(self, weight: Tensor, base: Tensor | ReadBack) -> None:
        """weight ← base; no memory of a GPU is taken for it. From a file: into a contiguous weight on a GPU, in the
        base's dtype. Where that raises BaseLost, a part of the weight is written."""
        if isinstance(base, Tensor):
            if weight.is_cuda and base.is_cpu:
                self._to(weight)
            weight.copy_(base, non_blocking=may_run_on(weight, base))
            return
        try:
            base.send(self._to(weight), weight.detach())
        except FileError as error:
            raise base.lost(error) from error

    def copied(self, weight: Tensor, unused: Tensor | None) -> Tensor | None:
        """A copy in RAM of a weight on a GPU, as it is now in the order of what that is asked, whatever is asked after.
        Into one that is not used, if there is one; None where the system pins no more memory."""
        copy = unused if unused is not None else self.pinned.take(tuple(weight.shape), weight.dtype)
        if copy is not None:
            self._to(weight)
            copy.copy_(weight.detach(), non_blocking=True)
        return copy

    def send(self, weight: Tensor, base: Tensor) -> Tensor:
        """As `fetch`, for a base in memory that the next one may be read into at once."""
        return self._to(weight).send([base])[0]

    def wait(self) -> None:
        """For all that is under way."""
        while self._uploaders:
            torch.cuda.synchronize(self._uploaders.popitem()[0])

    def _to(self, weight: Tensor) -> Uploader:
        if weight.device not in self._uploaders:
            self._uploaders[weight.device] = Uploader(weight.device)
        return self._uploaders[weight.device]
