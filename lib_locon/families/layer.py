"""A layer: a family's factors with their scale. What the engine asks for numbers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lib_locon.families.base import Adder, Family, working_dtype
from lib_locon.families.shapes import matrix

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, eq=False)
class Layer:
    """The full-strength change of one parameter of one module: `scale` · family."""

    family: Family
    alpha: float | None
    scale: float
    """alpha / rank, fixed when the layer is made: a truncated rank keeps the scale of the whole one."""
    note: str = ""
    """What the user should know of how it was read, where the file left a choice."""
    reshape: tuple[int, ...] = ()
    """The shape that the weight must have first, zeros added at the end of its axes; empty: as it is (Flux tools)."""

    @property
    def parameter(self) -> str:
        """The name of the parameter that it changes: "weight" or "bias"."""
        return self.family.parameter

    @property
    def label(self) -> str:
        """What a user would call it."""
        return self.family.label

    @property
    def needs_base(self) -> bool:
        """Whether ΔW depends on the values of the weight."""
        return self.family.needs_base

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ShapeError unless it can change a weight of this shape."""
        self.family.check(shape)

    def truncated(self, rank: int) -> Layer:
        """With the first `rank` ranks only (DyLoRA's `dyn`)."""
        return replace(self, family=self.family.truncated(rank))

    def tensors(self) -> list[Tensor]:
        """All that was read for it."""
        return list(self.family.tensors().values())

    def finite(self) -> bool:
        """Whether every factor and the scale are numbers. Reads the factors; those on the meta device pass."""
        # cast first: torch knows no isfinite for fp8
        tensors = (tensor.float() for tensor in self.tensors() if not tensor.is_meta)
        return abs(self.scale) <= FLOAT32_MAX and all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

    def delta(self, base: Tensor) -> Tensor:
        """ΔW at strength 1, in the shape, dtype and device of `base` (the pristine weight, fp32)."""
        rows = matrix(base)
        total = torch.zeros_like(rows)
        self.adder(base)(total, rows, 0, 1.0)
        return total.reshape(base.shape)

    def adder(self, base: Tensor) -> Adder:
        """What adds ΔW by rows (see `Family.adder`); `base` is the whole pristine weight in its own dtype."""
        dtype = working_dtype(base)
        # a family that only looks at the base's shape gets no copy of it in fp32
        whole = base.to(dtype) if self.needs_base else base.new_zeros((), dtype=dtype).expand(base.shape)
        add = self.family.to(base.device, dtype).adder(whole)
        scale = self.scale
        return lambda total, rows, start, strength: add(total, rows, start, strength * scale)

    def low_rank(self, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """`(up, down)` in fp32 on `device`, the scale folded into the smaller; None where ΔW is no such product."""
        factors = self.family.to(device, torch.float32).low_rank()
        if factors is None:
            return None
        up, down = factors
        return (up * self.scale, down) if up.numel() <= down.numel() else (up, down * self.scale)
