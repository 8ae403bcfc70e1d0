"""A pristine weight that is in a file and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from lib_locon.errors import FileError, PatchError
from lib_locon.patching.memory import Scratch
from lib_locon.uploads import Uploader


class BaseLost(PatchError):
    """The pristine value of a weight cannot be read back any more. Nothing wrong was written: what the weight holds is
    the sum before, or by rows that or the new one."""


class PristineSource(Protocol):
    """The file that a model came from."""

    def read(self, path: str, out: Tensor) -> None:
        """Fills `out` (contiguous, on the CPU) with the weight at `path`, cast to the dtype of `out`.

        The same bits each time. Raises FileError, with `out` undefined, where the file has no such weight in this
        shape, cannot be read, or is not what it was when the source was made.
        """
        ...

    def read_part(self, path: str, first: int, out: Tensor) -> None:
        """The same for some of its numbers in their order, from number `first` on: of a weight that was read before."""
        ...

    def unchanged(self) -> bool:
        """Whether the file is there as it was, so that another weight may rely on it."""
        ...

    def has_parts(self) -> bool:
        """Whether parts are quickly read, and the file is what it was."""
        ...

    def take_as_it_is(self) -> Callable[[], None] | None:
        """Where nothing but the file's time has changed, reads it from now on as it is, whatever it holds by now.

        Returns what refuses it again; None, and nothing changes, where it is as it was or more than that is another.
        """
        ...


@dataclass(frozen=True)
class ReadBack:
    """A weight that was proved to be in the file. It keeps its own source: the store's may be another by now.

    `dtype` is the weight's when it was proved: what the model then held is the base, in whatever dtype the file is.
    """

    source: PristineSource
    path: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """What a copy would take."""
        return self.dtype.itemsize * prod(self.shape)

    def read(self, scratch: Scratch) -> Tensor:
        """The whole. Raises FileError."""
        out = scratch.lend(self.shape, self.dtype)
        self.source.read(self.path, out)
        return out

    def send(self, uploader: Uploader, out: Tensor) -> Tensor:
        """The whole into `out`, contiguous and on a GPU. Raises FileError; then a part of it is written."""
        return uploader.fill(out, partial(self.source.read_part, self.path))

    def read_rows(self, start: int, out: Tensor) -> Tensor:
        """Fills `out`, some rows of the weight as a matrix, from row `start` on, and returns it. Raises BaseLost: what
        was read before is right, and nothing of what it was now."""
        try:
            self.source.read_part(self.path, start * out.shape[1], out)
        except FileError as error:
            raise self.lost(error) from error
        return out

    def lost(self, error: FileError) -> BaseLost:
        """What to raise where it cannot be read."""
        return BaseLost(f"the base of {self.path} is lost ({error}); load the checkpoint again")
