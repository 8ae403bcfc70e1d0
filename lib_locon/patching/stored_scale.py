"""Weights that are stored as small numbers with a scale beside them: their value is stored · scale.

ComfyUI's scaled fp8 (`scale_weight`, `weight_scale`) has one number for a weight or one for each row; other quantisers
have one for each block of rows and columns (`weight_scale_inv`, which is multiplied too, in spite of its name).
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

SCALES = ("scale_weight", "weight_scale", "weight_scale_inv")
"""What modules and files call the scale of the `weight` beside it."""
FP8 = frozenset(
    dtype
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if (dtype := getattr(torch, name, None)) is not None
)
PLAIN = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def is_known_layout(scale: tuple[int, ...], dtype: torch.dtype, weight: tuple[int, ...]) -> bool:
    """Whether the shape of a scale says which numbers of a weight it is for.

    One number; one for each row, as (out,) or with further axes of 1; or as many axes as the weight, each a divisor of
    the weight's, for blocks of equal size. Scales in 8 bits (mxfp8, nvfp4) lie in an order that no shape tells.
    """
    if dtype not in PLAIN or not weight or 0 in scale:
        return False
    if prod(scale) == 1 or scale == weight[:1]:
        return True
    return len(scale) == len(weight) and all(full % size == 0 for size, full in zip(scale, weight, strict=True))


def stretched(scale: Tensor, weight: tuple[int, ...]) -> Tensor:
    """A scale of a known layout in fp32, in a shape that torch broadcasts to that of the weight."""
    scale = scale.float()
    if scale.numel() == 1:
        return scale.reshape(())
    if tuple(scale.shape) == weight[:1]:
        return scale.reshape(-1, *(1 for _ in weight[1:]))
    for axis, (size, full) in enumerate(zip(scale.shape, weight, strict=True)):
        if size not in (1, full):
            scale = scale.repeat_interleave(full // size, axis)
    return scale


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The value of `stored` in fp32; `scale` as `stretched` gives it, None for stored numbers that are the value."""
    return stored.float() if scale is None else stored.float() * scale.to(stored.device)


def encode(value: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers to store for `value` (fp32) in `dtype`: rounded once, and kept within its range."""
    if scale is not None:
        value = value / scale.to(value.device)
    if dtype in FP8:
        limit = torch.finfo(dtype).max  # beyond it torch makes NaN of a number, or infinity, by version
        value = value.clamp(-limit, limit)
    elif dtype == torch.int8:
        value = value.round().clamp(-127, 127)
    return value.to(dtype)


class RoundingCost:
    """The error that rounding to 8 bits makes, as a share of the change: ‖stored − wanted‖ / ‖wanted − base‖."""

    def __init__(self) -> None:
        self.weights = 0
        self._lost = 0.0
        self._wanted = 0.0
        self._changed = False

    def add(self, base: Tensor, wanted: Tensor, stored: Tensor) -> None:
        """One weight: its value before, the value that was to be stored, and the value that is; all fp32."""
        self.weights += 1
        self._changed = self._changed or not torch.equal(stored, base)
        self._lost += float((stored - wanted).double().square().sum())
        self._wanted += float((wanted - base).double().square().sum())

    @property
    def share(self) -> float:
        """Over all weights; 0 where nothing was to be changed."""
        return (self._lost / self._wanted) ** 0.5 if self._wanted else 0.0

    def __str__(self) -> str:
        """A clause for the report; empty where nothing was rounded."""
        if not self._wanted:
            return ""
        where = "1 weight" if self.weights == 1 else f"{self.weights} weights"
        rest = "" if self._changed else ": every number was rounded back to what it was"
        return f"rounding to 8 bits makes an error of {min(self.share, 9.99):.0%} of the change of {where}{rest}"
