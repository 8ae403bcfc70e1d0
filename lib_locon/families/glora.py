"""GLoRA: f(x) = W(x + A x) + B x, so ΔW = W·A + B, with A and B low-rank. Files have one of two layouts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.errors import ShapeError
from lib_locon.families.base import Family, factor


@dataclass(frozen=True, eq=False)
class GLoRA(Family):
    """LyCORIS since 3.0: A = a1·a2, B = b1·b2."""

    name = "GLoRA"
    needs_base = True
    a1: Tensor = factor("a1.weight", "in r")
    a2: Tensor = factor("a2.weight", "r in")
    b1: Tensor = factor("b1.weight", "out r")
    b2: Tensor = factor("b2.weight", "r n")

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        if sizes["r"] > sizes["in"]:  # on a square layer either layout could be read: the rank is the small axis
            raise ShapeError(f"a rank of {sizes['r']} on {sizes['in']} inputs")
        return super().shape()

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """a_left, a_right, b_left, b_right as matrices."""
        return matrix(self.a1), matrix(self.a2), matrix(self.b1), matrix(self.b2)

    def delta(self, base: Tensor) -> Tensor:
        a_left, a_right, b_left, b_right = self._factors()
        # W·A works on the input channels alone, at each position of the kernel
        wa = torch.einsum("oik,ir,rj->ojk", base.reshape(*base.shape[:2], -1), a_left, a_right)
        return wa.reshape(base.shape) + (b_left @ b_right).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class OldGLoRA(GLoRA):
    """LyCORIS 2.x: A = a2·a1, B = b2·b1."""

    a1: Tensor = factor("a1.weight", "r in")
    a2: Tensor = factor("a2.weight", "in r")
    b1: Tensor = factor("b1.weight", "r n")
    b2: Tensor = factor("b2.weight", "out r")

    def _factors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return matrix(self.a2), matrix(self.a1), matrix(self.b2), matrix(self.b1)
