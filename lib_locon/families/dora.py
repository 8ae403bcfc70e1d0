"""DoRA: a magnitude for each output row (or input column) around any additive family. It wraps one; it is none itself.

M = W + D, D the full-strength change of the family inside, its alpha/rank included. W′ = M ⊙ g / ‖M‖, the norm taken
over all other axes. So ΔW = W′ − W needs the pristine W, and strength stays linear in ΔW.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lib_locon.arithmetic import add_scaled, matrix, working_dtype
from lib_locon.errors import ShapeError
from lib_locon.families.base import Adder, Family
from lib_locon.families.layer import Layer
from lib_locon.products import product_adder

STRIP = 128  # rows at a time on the CPU
GPU_STRIP = 4 << 20  # numbers at a time on a GPU: few steps, for to ask for one takes longer than to do it


@dataclass(frozen=True, eq=False, kw_only=True)
class DoRALayer(Layer):
    """`magnitude` has one number for each row (`on_output`) or column of the weight."""

    plain: ClassVar[bool] = False
    EPSILON: ClassVar[float] = torch.finfo(torch.float32).eps
    magnitude: Tensor
    on_output: bool

    @property
    def label(self) -> str:
        return f"DoRA {self.family.label}"

    @property
    def needs_base(self) -> bool:
        return True

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if len(shape) < 2:
            raise ShapeError(f"DoRA needs rows and columns, the weight has the shape {shape}")
        side, size = ("outputs", shape[0]) if self.on_output else ("inputs", shape[1])
        if self.magnitude.numel() != size:
            raise ShapeError(f"its DoRA magnitude has {self.magnitude.numel()} numbers, the weight {size} {side}")

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "dora_scale": self.magnitude}

    def bound(self) -> float:
        return math.inf  # W itself is in it

    def adder(self, base: Tensor) -> Adder:
        if not self.on_output:
            return self._by_columns(base)
        merge = self._merger(base)

        def add(total: Tensor, augend: Tensor, rows: Tensor, start: int, strength: float) -> None:
            pristine = rows.to(total.dtype)
            merged = merge(pristine, start)
            norm = torch.linalg.vector_norm(merged, dim=1, keepdim=True)
            factors = self._factors(norm, start, len(rows))
            # W − M ⊙ g / ‖M‖ is −ΔW: one pass over the tile less than to make ΔW; in place where nothing is trained
            place = None if torch.is_grad_enabled() else merged
            add_scaled(total, augend, torch.addcmul(pristine, merged, factors, value=-1, out=place), -strength)

        return add

    def _by_columns(self, base: Tensor) -> Adder:
        """A column's norm runs over all rows, so the weight is walked once for the norms, then once for the sum."""
        merge = self._merger(base)
        rows = matrix(base)
        kernel = rows.shape[1] // base.shape[1]
        squares = torch.zeros(base.shape[1], dtype=working_dtype(base), device=base.device)
        step = STRIP if base.is_cpu else max(1, GPU_STRIP // rows.shape[1])
        for start in range(0, len(rows), step):
            merged = merge(rows[start : start + step].to(working_dtype(base)), start)
            squares += merged.square_().view(len(merged), -1, kernel).sum((0, 2))
        factors = self._factors(squares.sqrt()).repeat_interleave(kernel)

        def add(total: Tensor, augend: Tensor, part: Tensor, start: int, strength: float) -> None:
            pristine = part.to(total.dtype)
            add_scaled(total, augend, merge(pristine, start).mul_(factors).sub_(pristine), strength)

        return add

    def _merger(self, base: Tensor) -> Callable[[Tensor, int], Tensor]:
        """(pristine rows as a matrix, their first row's number) → the rows of M, a new tensor."""
        factors = super().low_rank(base.device)
        if factors is not None:
            up, down = (factor.to(working_dtype(base)) for factor in factors[:2])
            up = up * factors[2]
            add = product_adder(down)
            return lambda rows, start: add(rows, up[start : start + len(rows)], None)
        inner = super().adder(base)

        def merge(rows: Tensor, start: int) -> Tensor:
            merged = rows.clone()
            inner(merged, merged, rows, start, 1.0)
            return merged

        return merge

    def _factors(self, norm: Tensor, start: int = 0, length: int | None = None) -> Tensor:
        """g / ‖M‖ in the shape of `norm`; for some rows only, from row `start` on."""
        magnitude = self._moved_once(self.magnitude, norm.device).flatten()
        magnitude = magnitude[start : None if length is None else start + length]
        return magnitude.to(norm.dtype).reshape(norm.shape) / (norm + self.EPSILON)

    def movable(self) -> tuple[Family | Tensor, ...]:
        return (*super().movable(), self.magnitude)

    def low_rank(self, device: torch.device) -> None:  # W itself is in it
        return None


def magnitude_side(magnitude: Tensor) -> bool | None:
    """True where the shape says output rows, (out, 1, …); False for input columns, (1, in, 1, …); None: either."""
    size = magnitude.numel()
    if magnitude.ndim < 2 or size == 1:
        return None
    if magnitude.shape[0] == size:
        return True
    return False if magnitude.shape[1] == size and magnitude.shape[0] == 1 else None
