"""base + scale · left · right of matrices in half precision, by one call of a GPU: summed in fp32, rounded once.

GPUs do this at the rate of their memory, and do not need the factors in another dtype first.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_HALVES = (torch.float16, torch.bfloat16)


def adds_in_half(out: Tensor, base: Tensor, left: Tensor, right: Tensor) -> bool:
    """Whether `torch.addmm` of these makes the sum in fp32 and rounds it once. Within `exact_arithmetic`, without which
    a host may have allowed a GPU to do otherwise."""
    dtypes = {out.dtype, base.dtype, left.dtype, right.dtype}
    return not out.is_cpu and len(dtypes) == 1 and out.dtype in _HALVES and _sums_in_fp32(out.device, out.dtype)


@cache
def _sums_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Asks the device, once: NVIDIA's libraries do, of others nothing is known.

    With whole numbers, so that every sum is exact in fp32 in whatever order it is made. The first terms of each product
    are large, and the others take nearly all of them away: what is rounded to half on the way shows in the rest. And by
    a scale that half precision does not hold. Waits for the device.
    """
    generator = torch.Generator(device="cpu").manual_seed(0)

    def some(size: int, rows: int, columns: int) -> Tensor:
        return torch.randint(-size, size + 1, (rows, columns), generator=generator, device="cpu")

    scale = 1 + 2.0**-11
    try:
        for m, k, n in ((64, 4, 320), (320, 16, 128), (96, 64, 99)):
            one, other = some(32, m, k), some(32, k, n)
            left, right = torch.cat([one, one], 1), torch.cat([other, some(1, k, n) - other])
            base, left, right = (numbers.to(device, dtype) for numbers in (some(128, m, n), left, right))
            exact = base.double() + scale * (left.double() @ right.double())
            if not torch.equal(torch.addmm(base, left, right, alpha=scale), exact.to(dtype)):
                return False
    except RuntimeError:  # a device without such products, or without fp64
        return False
    return True
