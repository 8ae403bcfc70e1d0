"""Weights of few bits and the scale beside them: what both stand for, and what rounding a sum to them again costs.

Knows no model and no file: the names that lie beside a weight, shapes and numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.untrusted_json import parse

FP8 = frozenset(
    dtype
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if (dtype := getattr(torch, name, None)) is not None
)
PLAIN = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})


def scale_names(parameter: str) -> tuple[str, ...]:
    """The names of the number, or the numbers, that a parameter is to be multiplied by, beside it.

    The last one too is a factor: it is the inverse of what the weight was multiplied by when it was made.
    """
    return f"scale_{parameter}", f"{parameter}_scale", f"{parameter}_scale_inv"


SCALES = scale_names("weight")
FORM = "comfy_quant"
"""Beside a weight: its form, as JSON in bytes."""
MOST_FORM_BYTES = 1 << 16
"""Real ones have some dozens."""
HARMLESS = frozenset({FORM, "input_scale", "scale_input", "scaled_fp8"})
"""Say nothing of what the weight's numbers stand for, but how its layer is run. (The form is read by itself.)"""
_TELLING = ("scale", "zero_point", "svd_", "codebook", "absmax", "quant")
"""In the names of what changes the meaning of a weight's numbers."""
_KNOWN_FORMS = frozenset({"float8_e4m3fn", "float8_e5m2", "int8_tensorwise"})


def unknown_companion(names: Iterable[str]) -> str | None:
    """Of the names beside a weight of few bits, one that changes what its numbers stand for in a way not known here."""
    known = {*SCALES, *HARMLESS}
    return next((name for name in names if name not in known and any(mark in name for mark in _TELLING)), None)


def form_in(written: bytes) -> object:
    """The form that lies beside a weight; None where it cannot be read."""
    try:
        return parse(written.decode())
    except ValueError:
        return None


def unknown_form(form: object) -> str | None:
    """Name a form, as JSON gives it; None where the numbers times their scale are all there is to it."""
    if isinstance(form, str):
        form = {"format": form}
    if not isinstance(form, Mapping):
        return "something that it does not tell"
    name, more = str(form.get("format", "")), form.get("params")
    rotated = form.get("convrot") or (isinstance(more, Mapping) and more.get("convrot"))
    if rotated:
        return f"{name} with rotated inputs (convrot)"
    return None if name in _KNOWN_FORMS else name or "an unnamed form"


def stretched(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape in which a scale of the shape `scale` is multiplied with a weight; None for one that is not known.

    One number in all, or one for each output, or one for each place along some axes. Not one for each block: which
    numbers belong to a block nothing tells.
    """
    if math.prod(scale) == 1:
        return ()
    if not math.prod(scale) or len(scale) > len(weight):
        return None
    if scale[0] == weight[0] and math.prod(scale[1:]) == 1:
        return (scale[0], *(1 for _ in weight[1:]))
    if len(scale) == len(weight) and all(size in (1, full) for size, full in zip(scale, weight, strict=True)):
        return scale
    return None


def decoded(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The numbers that `stored` stands for, in fp32. `scale` has a shape of `stretched`."""
    return stored.float() if scale is None else stored.float() * scale.to(stored.device, torch.float32)


def encoded(value: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The numbers to store for `value` (fp32), in `dtype`: rounded once, and kept within its range."""
    if scale is not None:
        factor = scale.to(value.device, torch.float32)
        value = value / factor.masked_fill(factor == 0, math.inf)  # what is multiplied by 0 is 0, and no NaN
    if dtype in FP8:
        limit = torch.finfo(dtype).max  # beyond it torch makes NaN of a number, or infinity, by version
        value = value.clamp(-limit, limit)
    elif dtype == torch.int8:
        value = value.round().clamp(-127, 127)
    return value.to(dtype)


@dataclass(frozen=True, eq=False)
class Cost:
    """The loss by rounding in the change of one weight.

    Its numbers stay on the weight's device until they are asked for, so that nothing waits for a GPU before.
    """

    change: Tensor
    """The size (norm) of the change that was to be made."""
    error: Tensor
    """The size of the difference between that change and the one that was made."""
    moved: Tensor
    """True where any stored number is another one than before."""

    @classmethod
    def of(cls, before: Tensor, after: Tensor, base: Tensor, total: Tensor, scale: Tensor | None) -> Cost:
        """`before` and `after` are the stored numbers, `base` and `total` what they stand for and were to."""
        error = torch.linalg.vector_norm(decoded(after, scale).sub_(total))
        moved = (after.reshape(-1).view(torch.uint8) != before.reshape(-1).view(torch.uint8)).any()
        return cls(torch.linalg.vector_norm(total - base.float()), error, moved)


def share_lost(costs: Iterable[Cost]) -> float:
    """The part of the change of all these weights that rounding took; 0 where there was none to be made, and 1 where it
    is beyond all numbers."""
    change = error = 0.0
    for cost in costs:
        change = math.hypot(change, float(cost.change))
        error = math.hypot(error, float(cost.error))
    share = error / change if change else 0.0
    return share if math.isfinite(share) else 1.0
