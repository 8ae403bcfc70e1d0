"""Arithmetic as we ask for it, whatever the host chose for its images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_AUTOCAST = ("cpu", "cuda", "xpu")
"""Where torch 2.1 knows autocast; it refuses to be told of other devices, also to leave them alone."""


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Operations keep the dtypes of their arguments."""
    return torch.autocast(device, enabled=False) if device in _AUTOCAST else nullcontext()


@contextmanager
def exact_arithmetic(device: str) -> Iterator[None]:
    """Full fp32 products: TF32 keeps 10 bits of a factor, autocast computes in half."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with without_autocast(device):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
