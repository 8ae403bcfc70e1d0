"""Where weights lie: whether two of them are over the same numbers."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lib_locon.errors import PatchError


def refuse_overlaps(weights: Mapping[str, Tensor]) -> None:
    """Raises PatchError where two of these are over the same numbers: each would count the other's change as its base.

    Not for one parameter under several names, which is one weight.
    """
    by_device: dict[torch.device, list[tuple[int, int, str]]] = {}
    for path, weight in weights.items():
        # elsewhere (MPS, XLA) a tensor's address may be that of something that stands for its memory
        if (weight.is_cpu or weight.is_cuda) and type(weight) in (Tensor, torch.nn.Parameter) and weight.numel():
            start = weight.data_ptr()
            if start:
                end = start + _extent(weight) * weight.element_size()
                by_device.setdefault(weight.device, []).append((start, end, path))
    for spans in by_device.values():
        _refuse_overlaps(spans, weights)


def _refuse_overlaps(spans: list[tuple[int, int, str]], weights: Mapping[str, Tensor]) -> None:
    """Of weights on one device, each with its first address and the one after its last."""
    begun: list[tuple[int, str]] = []
    for first, last, path in sorted(spans):
        begun = [(end, other) for end, other in begun if end > first]
        for _, other in begun:
            if _share_numbers(weights[path], weights[other]):
                raise PatchError(
                    f"{other} and {path} are two parameters over the same memory, and both are to be changed; "
                    "make them one parameter"
                )
        begun.append((last, path))


def _extent(weight: Tensor) -> int:
    """Numbers from the first to the last, and those between them that are others'."""
    if weight.is_contiguous():
        return weight.numel()
    return 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))


def _share_numbers(one: Tensor, other: Tensor) -> bool:
    """Of two whose spans overlap: columns of one matrix may lie between each other, and share none."""
    size = one.element_size()
    if (one.is_contiguous() and other.is_contiguous()) or size != other.element_size() or 0 in one.stride():
        return True
    begin = min(one.data_ptr(), other.data_ptr())
    end = max(weight.data_ptr() + _extent(weight) * size for weight in (one, other))
    taken = torch.zeros((end - begin) // size, dtype=torch.bool, device="cpu")

    def places(weight: Tensor) -> Tensor:
        return taken.as_strided(weight.shape, weight.stride(), (weight.data_ptr() - begin) // size)

    places(one).fill_(True)
    return bool(places(other).any())
