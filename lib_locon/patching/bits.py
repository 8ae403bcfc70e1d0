"""Whether two tensors hold the same bits: -0.0 is not 0.0, and a NaN is itself.

They are looked at as integers of the same size, which needs no copy, whatever their strides (as of channels_last).
"""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def alike(one: Tensor, other: Tensor) -> bool:
    """Whether they could."""
    return one.dtype == other.dtype and one.shape == other.shape and one.dtype.itemsize in _INTEGERS


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Of two on one device."""
    if not alike(one, other):
        return False
    one, other, integers = one.detach(), other.detach(), _INTEGERS[one.dtype.itemsize]
    if _in_eights(one) and _in_eights(other):  # torch compares number by number on one core: the fewer the better
        one, other, integers = one.flatten(), other.flatten(), torch.int64
    return torch.equal(one.view(integers), other.view(integers))


def other_bits(one: Tensor, other: Tensor) -> Tensor:
    """Whether two that are `alike` do not: as a truth value on their device, which is not waited for."""
    integers = _INTEGERS[one.dtype.itemsize]
    return (one.detach().view(integers) != other.detach().view(integers)).any()


def _in_eights(tensor: Tensor) -> bool:
    """Whether its memory can be read as integers of eight bytes."""
    start = tensor.storage_offset() * tensor.dtype.itemsize
    return tensor.is_contiguous() and tensor.nbytes % 8 == 0 and start % 8 == 0
