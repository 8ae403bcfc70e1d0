"""Where weights lie: on which device, and whether two of them are over the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lib_locon.errors import PatchError


def may_run_on(weight: Tensor, base: Tensor) -> bool:
    """Whether a copy of `base` to where the weight is need not be waited for: pinned memory is the GPU's to read, and
    torch gives it to nobody else before that is done."""
    return weight.is_cuda and not base.is_cuda and base.is_pinned()


def beside(weight: Tensor, base: Tensor) -> Tensor:
    """`base` on the weight's device."""
    return base if base.device == weight.device else base.to(weight.device, non_blocking=may_run_on(weight, base))


def refuse_overlaps(weights: Mapping[str, Tensor]) -> None:
    """Raises PatchError where two of these are over the same numbers: each would count the other's change as its base.

    Not for one parameter under several names, which is one weight.
    """
    ends: dict[torch.device, tuple[int, str]] = {}
    for first, last, path in sorted(_spans(weights)):
        device = weights[path].device
        end, other = ends.get(device, (0, ""))
        if first < end and _share_numbers(weights[path], weights[other]):
            raise PatchError(f"{other} and {path} are two parameters over the same memory, and both are to be changed; "
                             "make them one parameter")  # fmt: skip
        ends[device] = max((end, other), (last, path))


def _spans(weights: Mapping[str, Tensor]) -> Iterator[tuple[int, int, str]]:
    """The first address of each and the one after its last; not of those whose numbers have no address of their own."""
    for path, weight in weights.items():
        if type(weight) in (Tensor, torch.nn.Parameter) and not weight.is_meta and weight.numel():
            start = weight.data_ptr()
            yield start, start + _extent(weight) * weight.element_size(), path


def _extent(weight: Tensor) -> int:
    """Numbers from the first to the last, and those between them that are others'."""
    if weight.is_contiguous():
        return weight.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))


def _share_numbers(one: Tensor, other: Tensor) -> bool:
    """Of two whose spans overlap: columns of one matrix may lie between each other, and share none."""
    if one.is_contiguous() and other.is_contiguous():
        return True
    return bool(torch.isin(_addresses(one), _addresses(other)).any())


def _addresses(weight: Tensor) -> Tensor:
    """Of each number, in bytes."""
    at = torch.tensor(weight.data_ptr())
    for size, stride in zip(weight.shape, weight.stride(), strict=True):
        at = at[..., None] + torch.arange(size) * (stride * weight.element_size())
    return at.flatten()
