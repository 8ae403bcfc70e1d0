"""Some rows of a layer: what a fused adapter (q, k and v in one) does to one of a model's split projections."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from lib_locon.families.base import Adder
from lib_locon.families.layer import Layer, LowRank


@dataclass(frozen=True, eq=False, kw_only=True)
class RowsLayer(Layer):
    """Rows `start` to `start + length` of ΔW, whose whole shape is `whole`. For families that do not need the base."""

    plain: ClassVar[bool] = False
    whole: tuple[int, ...]
    start: int
    length: int

    @classmethod
    def of(cls, layer: Layer, whole: tuple[int, ...], start: int, length: int) -> RowsLayer:
        """The rows of a plain layer."""
        plain = {field.name: getattr(layer, field.name) for field in fields(Layer)}
        return cls(**plain, whole=whole, start=start, length=length)

    def adder(self, base: Tensor) -> Adder:
        inner = super().adder(base.new_empty(()).expand(self.whole))
        # `base` is one of the model's projections; its rows of the adapter's weight begin further down
        return lambda total, augend, rows, start, strength: inner(total, augend, rows, start + self.start, strength)

    def low_rank(self, device: torch.device) -> LowRank | None:
        factors = super().low_rank(device)
        return None if factors is None else (factors[0][self.start : self.start + self.length], *factors[1:])
