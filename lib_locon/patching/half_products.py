"""base + scale · left · right of matrices in half precision, by one call of a GPU: summed in fp32, rounded once.

GPUs do this at the rate of their memory, and do not need the factors in another dtype first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)
_SCALE = 1 + 2.0**-11
"""A scale that no half holds."""


def adds_in_half(out: Tensor, base: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether `torch.addmm` of these makes the sum in fp32 and rounds it once. Within `exact_arithmetic`, without which
    a host may have allowed a GPU to do otherwise. Waits for the device at the first question about it."""
    dtypes = {out.dtype, base.dtype, left.dtype, right.dtype}
    return not out.is_cpu and len(dtypes) == 1 and out.dtype in _HALVES and _sums_in_fp32(out.device, out.dtype)


@cache
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Asks the device: NVIDIA's libraries do; some of AMD's processors take the smallest numbers of fp16 for 0."""
    probes = list(_probes(dtype))
    matrices = [matrix for probe in probes for matrix in probe]
    try:
        # in one piece, for it is waited for
        sent = torch.cat([matrix.flatten().to(dtype) for matrix in matrices]).to(device)
        parts = torch.split(sent, [matrix.numel() for matrix in matrices])
        there = [part.view(matrix.shape) for part, matrix in zip(parts, matrices, strict=True)]
        found = [torch.addmm(*there[i : i + 3], alpha=_SCALE).flatten() for i in range(0, len(there), 3)]
        sums = torch.cat(found).cpu()
    except (RuntimeError, TypeError):  # a device without such products
        return False
    exact = [(base + _SCALE * (left @ right)).flatten().to(dtype) for base, left, right in probes]
    return torch.equal(sums, torch.cat(exact))


def _probes(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(base, left, right) in fp64 on the CPU, of numbers that the dtype holds. Their sums, also by `_SCALE`, are exact
    in fp32 in whatever order they are made, and so there is one result only."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def some(size: int, rows: int, columns: int) -> Tensor:
        return torch.randint(-size, size + 1, (rows, columns), generator=generator, device="cpu").double()

    # large terms of which others take nearly all away: what is rounded on the way shows in the rest
    one, other, rest = some(128, 96, 32), some(128, 32, 99), some(2, 32, 99)
    yield some(128, 96, 99), torch.cat([one, one], 1), torch.cat([other, rest - other])
    # every bit of a number
    whole = int(2 / torch.finfo(dtype).eps) - 1
    yield some(whole, 64, 320), some(whole, 64, 3), some(1, 3, 320)
    if dtype == torch.float16:  # adapters have numbers as small as its smallest; none has such as bf16's
        yield some(128, 320, 128) * 2.0**-16, some(32, 320, 32) * 2.0**-24, some(8, 32, 128) * 2.0**8
