"""What every family shares. A family is a frozen dataclass whose fields are the tensors of one module in a file.

Each field names its file suffix and its shape (the language is in `shapes`). Detection, parsing, moving, sizes and
reports are all derived from the fields, so that a family is its fields and its formula, and nothing else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from torch import Tensor

from lib_locon.arithmetic import add_scaled, matrix
from lib_locon.errors import ShapeError
from lib_locon.families.shapes import bind

F = TypeVar("F", bound="Family")
Adder: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, float], None]


def factor(suffix: str, shape: str, *, optional: bool = False) -> Any:
    """A tensor of a family: `suffix` follows the module's name in the file, `shape` is in the language of `shapes`."""
    metadata = {"suffix": suffix, "shape": shape}
    return dataclasses.field(default=None, metadata=metadata) if optional else dataclasses.field(metadata=metadata)


# what the fields say is asked for every module of a file and every family: worked out once
@cache
def _suffixes(kind: type[Any]) -> dict[str, str]:
    return {field.metadata["suffix"]: field.name for field in dataclasses.fields(kind)}


@cache
def _specs(kind: type[Any]) -> dict[str, str]:
    return {field.metadata["suffix"]: field.metadata["shape"] for field in dataclasses.fields(kind)}


@lru_cache(maxsize=2000)
def _bound(kind: type[Any], shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> dict[str, int]:
    # hundreds of modules of a file, and thousands of files, have the same few shapes
    return bind(_specs(kind), dict(shapes))  # type: ignore[arg-type]


@cache
def _needed(kind: type[Any]) -> list[str]:
    return [f.metadata["suffix"] for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]


@dataclass(frozen=True, eq=False)
class Family:
    """One module's factors. Subclasses add fields made by `factor`, and `delta`."""

    name: ClassVar[str]
    parameter: ClassVar[str] = "weight"
    """Which parameter of the module the change is for."""
    scaled: ClassVar[bool] = True
    """Whether alpha / rank (or a configuration's scale) is a factor of it."""
    needs_base: ClassVar[bool] = False
    """Whether ΔW depends on the values of the weight that it changes."""
    truncates: ClassVar[bool] = False
    """Whether it has a first part of its ranks to keep (`truncated`)."""
    optional: ClassVar[bool] = False
    """Whether a model may lack the parameter without anything being wrong."""

    @classmethod
    def suffixes(cls) -> Mapping[str, str]:
        """File suffix → field name, in the order of the fields."""
        return _suffixes(cls)  # type: ignore[arg-type]  # a class is hashable whatever its instances are

    @classmethod
    def specs(cls) -> Mapping[str, str]:
        """File suffix → shape, in the language of `shapes`."""
        return _specs(cls)  # type: ignore[arg-type]

    @classmethod
    def missing(cls, present: Collection[str]) -> list[str]:
        """The suffixes without which the family cannot be built from those `present`; empty when it can."""
        return [suffix for suffix in _needed(cls) if suffix not in present]  # type: ignore[arg-type]

    @classmethod
    def build(cls: type[F], tensors: Mapping[str, Tensor]) -> F:
        """From suffix → tensor; suffixes that are not the family's are ignored. Raises ShapeError."""
        family = cls(**{name: tensors[suffix] for suffix, name in cls.suffixes().items() if suffix in tensors})
        family.shape()
        return family

    def tensors(self) -> dict[str, Tensor]:
        """File suffix → tensor, of those that are there."""
        found = {suffix: getattr(self, name) for suffix, name in self.suffixes().items()}
        return {suffix: tensor for suffix, tensor in found.items() if tensor is not None}

    def to(self: F, device: torch.device, dtype: torch.dtype | None = None) -> F:
        """The same factors elsewhere, in their own dtype if None; a tensor that is there already is not copied.

        Single numbers stay: torch takes them from the CPU, and to look at one would wait for a GPU.
        """
        return self.with_factors([tensor.to(device, dtype) for tensor in self.factors()])

    def factors(self) -> list[Tensor]:
        """All of its tensors but single numbers."""
        return [tensor for tensor in self.tensors().values() if tensor.ndim]

    def with_factors(self: F, factors: Sequence[Tensor]) -> F:
        """With others in the place of `factors()`."""
        suffixes = self.suffixes()
        names = [suffixes[suffix] for suffix, tensor in self.tensors().items() if tensor.ndim]
        return dataclasses.replace(self, **dict(zip(names, factors, strict=True)))

    def sizes(self) -> dict[str, int]:
        """Axis name → size, over all factors. Raises ShapeError where they contradict each other."""
        shapes = ((suffix, tuple(tensor.shape)) for suffix, tensor in self.tensors().items())
        return dict(_bound(type(self), tuple(shapes)))  # type: ignore[arg-type]  # as above

    @property
    def label(self) -> str:
        """What a user would call this module's adapter."""
        return self.name

    @property
    def rank(self) -> int | None:
        """The rank by which alpha is divided; None where the family is not scaled by alpha."""
        return self.sizes().get("r")

    def shape(self) -> tuple[int | None, int | None]:
        """Of ΔW as a matrix `(out, everything else)`; None for a side that the factors fit at any size.

        Raises ShapeError.
        """
        sizes = self.sizes()
        return sizes.get("out"), sizes.get("n", 1 if "out" in sizes and len(sizes) == 1 else None)

    def inputs(self, kernel: int) -> int | None:
        """The number of inputs that it is for, on a layer with `kernel` positions; None where nothing tells."""
        n = self.shape()[1]
        return None if n is None or not kernel or n % kernel else n // kernel

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ShapeError unless ΔW can be a change of a weight of this shape."""
        out, n = self.shape()
        if not shape or out not in (None, shape[0]) or n not in (None, prod(shape[1:])):
            weight = " × ".join(map(str, shape)) or "one number"
            raise ShapeError(f"its ΔW is {out or 'any'} × {n or 'any'}, the weight is {weight}")
        channels = self.sizes().get("in")
        if channels is not None and shape[1:2] != (channels,):
            raise ShapeError(f"it is for {channels} input channels, the weight has the shape {shape}")

    def companions(self) -> list[Family]:
        """Changes of other parameters that follow from the same tensors."""
        return []

    def truncated(self: F, rank: int) -> F:
        """The same adapter with its first `rank` ranks; families without such a notion return themselves."""
        del rank
        return self

    def rows(self: F, start: int, length: int) -> F | None:
        """The change of some rows as an adapter of a weight that has only these; None where it is not one by itself.

        For families that need the base: of the others' ΔW, rows can be taken.
        """
        del start, length
        return None

    def bound(self, peaks: Mapping[str, float]) -> float:
        """What no number of ΔW (without alpha/rank) exceeds in size, from the largest of each factor, by suffix.

        Infinite where that says nothing of it. Saves looking at the sum for numbers that its dtype cannot hold.
        """
        del peaks
        return math.inf

    def adder(self, base: Tensor) -> Adder:
        """What adds ΔW (without alpha/rank) by rows; `base` is the whole pristine weight in the factors' dtype.

        (total, augend, base, start, strength): total ← augend + strength · ΔW, as matrices of some rows, from row
        `start` on. `base` are those rows of the weight; `augend` is `total` itself, or rows that share no memory with
        it; `base` may be `total` too. This one makes ΔW whole; families that can make it row by row do.
        """
        whole = self.delta(base)
        if whole.shape != base.shape:  # torch would stretch it to fit
            raise ShapeError(f"ΔW has the shape {tuple(whole.shape)}, its weight {tuple(base.shape)}")
        rows = matrix(whole)

        def add(total: Tensor, augend: Tensor, _: Tensor, start: int, strength: float) -> None:
            add_scaled(total, augend, rows[start : start + len(total)], strength)

        return add

    def delta(self, base: Tensor) -> Tensor:
        """Full-strength ΔW without alpha/rank, in the shape, dtype and device of `base`, the pristine weight."""
        raise NotImplementedError

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        """`(up, down)`, `(out, r)` and `(r, n)`, whose product is ΔW as a matrix; None where it is no such product.

        As they are stored where no arithmetic is needed, else in fp32 (fp64 from fp64).
        """
        return None
