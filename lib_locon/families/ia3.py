"""(IA)³: every output row or input column of the weight times a learned factor."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lib_locon.errors import ShapeError, Unusable
from lib_locon.families.base import Family, factor


def scale_axis(base: Tensor, factors: Tensor, on_input: bool) -> Tensor:
    """`base` with its rows (axis 0), or its columns (axis 1) when `on_input`, times `factors` (1-D)."""
    shape = [1] * base.ndim
    shape[1 if on_input else 0] = -1
    return base * factors.reshape(shape)


@dataclass(frozen=True, eq=False)
class IA3(Family):
    """LyCORIS: ΔW = W ⊙ v, on the side that `on_input` says. v is a difference (0 changes nothing)."""

    name = "IA3"
    needs_base = True
    scaled = False
    vector: Tensor = factor("weight", "*v")
    on_input: Tensor = factor("on_input", "")

    def check(self, shape: tuple[int, ...]) -> None:
        # with the header alone (meta device) the side is not known: either may fit then
        sides = shape[:2] if self.on_input.is_meta else (shape[int(bool(self.on_input))],) if len(shape) > 1 else ()
        if self.vector.numel() not in sides:
            raise ShapeError(f"its {self.vector.numel()} factors fit no side of the weight {shape}")

    def shape(self) -> tuple[int | None, int | None]:
        size = self.sizes()["*k"]
        if self.on_input.is_meta:
            return None, None
        return (None, size) if bool(self.on_input) else (size, None)

    def inputs(self, kernel: int) -> int | None:
        return self.shape()[1]  # one factor for each, whatever the kernel

    def delta(self, base: Tensor) -> Tensor:
        return scale_axis(base, self.vector.flatten(), bool(self.on_input))


@dataclass(frozen=True, eq=False)
class PeftIA3(Family):
    """PEFT: W′ = W ⊙ l (1 changes nothing). The side shows in the shape of `ia3_l`, but not for every convolution.

    Linear: (1, in) or (out, 1). Convolutions write (1, in, 1, 1) and (1, out, 1, 1) alike; there the side is the axis
    of equal length, and where both are equal only the configuration knows (`ia3_on_input`).
    """

    name = "IA3"
    needs_base = True
    scaled = False
    vector: Tensor = factor("ia3_l", "*v")
    on_input: Tensor | None = factor("ia3_on_input", "", optional=True)

    def shape(self) -> tuple[int | None, int | None]:
        self.sizes()
        if not self.vector.ndim:
            raise ShapeError("ia3_l is one number, where one for each row or column is needed")
        return None, None

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) < 2:
            raise ShapeError(f"an IA3 vector cannot change a weight of the shape {shape}")
        self._is_on_input(shape)

    def companions(self) -> list[Family]:
        # PEFT multiplies the output, bias and all; a linear layer's side shows in the vector alone
        return [] if self._stated_side() is not False else [PeftIA3Bias(self.vector)]

    def delta(self, base: Tensor) -> Tensor:
        return scale_axis(base, self.vector.flatten() - 1, self._is_on_input(tuple(base.shape)))

    def _stated_side(self) -> bool | None:
        """Whether it is on the input, as far as the file alone says it."""
        if self.on_input is not None and not self.on_input.is_meta:
            return bool(self.on_input)
        if self.vector.ndim == 2 and self.vector.numel() > 1:
            return self.vector.shape[0] == 1
        return None

    def _is_on_input(self, shape: tuple[int, ...]) -> bool:
        out, columns = shape[:2]
        size = self.vector.numel()
        if size not in (out, columns):
            raise ShapeError(f"its {size} factors fit no side of the weight {shape}")
        if out != columns:
            return size == columns
        stated = self._stated_side()
        if stated is None:
            raise Unusable("its side is ambiguous; PEFT's adapter_config.json beside the file would tell")
        return stated


@dataclass(frozen=True, eq=False)
class PeftIA3Bias(Family):
    """The bias of a layer whose outputs `ia3_l` scales: b′ = b ⊙ l. Never found in a file by itself."""

    name = "IA3"
    needs_base = True
    parameter = "bias"
    scaled = False
    optional = True
    vector: Tensor = factor("ia3_l", "out")

    def delta(self, base: Tensor) -> Tensor:
        return base * (self.vector.flatten() - 1)
