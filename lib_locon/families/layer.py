"""A layer: a family's factors with their scale. What the engine asks for numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from lib_locon.arithmetic import exact_arithmetic, has_products, matrix, peak, rounded_product, working_dtype
from lib_locon.errors import ShapeError
from lib_locon.families.base import Adder, Family
from lib_locon.uploads import moved

LowRank: TypeAlias = tuple[Tensor, Tensor, float]
Movable = TypeVar("Movable", Family, Tensor)
ORDINARY = 2.0**16
"""Beyond any number of fp16. The longest chain of products (Tucker, rank 4096) of numbers up to here fits in fp32."""
_WIDTHS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes that torch has products for, nearly everywhere."""
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
    plain: ClassVar[bool] = True
    """Whether ΔW is that of the family, times the scale, and nothing else."""
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
        if rank not in self._shorter:
            self._shorter[rank] = replace(self, family=self.family.truncated(rank))
        return self._shorter[rank]

    @cached_property
    def _shorter(self) -> dict[int, Layer]:
        """By rank, so that a strength that changes reads and moves nothing again."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """All that was read for it, by suffix."""
        return self.family.tensors()

    def finite(self) -> bool:
        """Whether every factor and the scale are numbers. Reads the factors, once; those on the meta device pass."""
        return abs(self.scale) <= FLOAT32_MAX and all(map(math.isfinite, self._peaks.values()))

    def bound(self) -> float:
        """What no number of ΔW at strength 1 exceeds in size; infinite where the factors alone do not tell.

        It also says that nothing overflows on the way there: factors of unusual size have no bound.
        """
        return self._bound

    @cached_property
    def _bound(self) -> float:
        if not all(peak <= ORDINARY for peak in (*self._peaks.values(), abs(self.scale))):
            return math.inf
        return self.family.bound(self._peaks) * abs(self.scale)

    @cached_property
    def _peaks(self) -> Mapping[str, float]:
        """The largest size of a number in each factor, by its suffix; NaN where there is one."""
        return {suffix: peak(tensor) for suffix, tensor in self.tensors().items()}

    def delta(self, base: Tensor) -> Tensor:
        """ΔW at strength 1, in the shape, dtype and device of `base` (the pristine weight, fp32)."""
        rows = matrix(base)
        total = torch.zeros_like(rows)
        with exact_arithmetic(base.device.type):
            self.adder(base)(total, total, rows, 0, 1.0)
        return total.reshape(base.shape)

    def adder(self, base: Tensor) -> Adder:
        """What adds ΔW by rows (see `Family.adder`); `base` is the whole pristine weight in its own dtype."""
        dtype = working_dtype(base)
        # a family that only looks at the base's shape gets no copy of it in fp32
        whole = base.to(dtype) if self.needs_base else base.new_empty((), dtype=dtype).expand(base.shape)
        add = self._on(base.device).to(base.device, dtype).adder(whole)
        scale = self.scale
        return lambda total, augend, rows, start, strength: add(total, augend, rows, start, strength * scale)

    def low_rank(self, device: torch.device) -> LowRank | None:
        """`(up, down, scale)` with ΔW = scale · up · down, as stored, on `device`; None where ΔW is no such product."""
        factors = self._on(device).low_rank()
        return None if factors is None else (*factors, self.scale)

    def unscaled(self, weight: Tensor) -> tuple[Tensor, float] | None:
        """(D, scale) with ΔW = scale · D, made as the webui's built-in Lora makes it, each product rounded.

        That one holds the factors of a product in the dtype that it works in, which the weights are in, and all others
        in the file's. The products are torch's own: on the CPU they differ from the engine's in the last bit.
        """
        factors = self.low_rank(weight.device)
        if factors is not None:
            up, down, scale = factors
            return rounded_product(up.to(weight.dtype), down.to(weight.dtype)).reshape(weight.shape), scale
        if not self.plain:
            return None
        family = self._on(weight.device)
        numbers = {tensor.dtype for tensor in family.tensors().values() if tensor.dtype in _WIDTHS}
        stored = numbers.pop() if len(numbers) == 1 else working_dtype(weight)
        result = torch.promote_types(stored, weight.dtype) if self.needs_base else stored
        # with the base in fp32, and then rounded: an inverse or a norm in fp16 would be noise
        if self.needs_base or not has_products(stored, weight.device.type):
            wide = working_dtype(weight)
            change = family.to(weight.device, wide).delta(weight.to(wide)).to(result)
        else:
            change = family.delta(weight.to(stored))
        if change.shape != weight.shape:  # torch would stretch it to fit
            raise ShapeError(f"ΔW has the shape {tuple(change.shape)}, its weight {tuple(weight.shape)}")
        return change, self.scale

    def release(self) -> None:
        """Forgets what was moved to other devices."""
        self._moved.clear()
        self._shorter.clear()

    def movable(self) -> tuple[Family | Tensor, ...]:
        """Its parts that are needed where the weight is."""
        return (self.family,)

    def _on(self, device: torch.device) -> Family:
        """The factors there, in their own dtype. Moved once: a strength that changes moves nothing."""
        return self._moved_once(self.family, device)

    def _moved_once(self, what: Movable, device: torch.device) -> Movable:
        """`what`, a part of this layer, on a device; where it is not, the same one until `release`."""
        there = self._moved.get((id(what), device))  # once: `release` may come from another thread
        if there is None:
            there = what if _is_on(what, device) else self._moved.setdefault((id(what), device), what.to(device))
        return there

    @cached_property
    def _moved(self) -> dict[tuple[int, torch.device], Any]:
        return {}


def send(layers: Iterable[Layer], device: torch.device) -> bool:
    """Moves what many layers need to a device, in as few copies as it takes; each will find its own there. Whether
    there was anything to be moved."""
    todo = {
        id(part): (layer, part)
        for layer in layers
        for part in layer.movable()
        if (id(part), device) not in layer._moved and not _is_on(part, device)
    }
    sizes = [len(_factors(part)) for _, part in todo.values()]
    arrived = iter(moved([factor for _, part in todo.values() for factor in _factors(part)], device))
    for (layer, part), size in zip(todo.values(), sizes, strict=True):
        factors = list(islice(arrived, size))
        layer._moved[id(part), device] = factors[0] if isinstance(part, Tensor) else part.with_factors(factors)
    return bool(todo)


def _factors(part: Family | Tensor) -> list[Tensor]:
    return [part] if isinstance(part, Tensor) else part.factors()


def _is_on(part: Family | Tensor, device: torch.device) -> bool:
    return all(tensor.device == device for tensor in _factors(part))
