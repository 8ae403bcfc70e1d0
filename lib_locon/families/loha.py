"""LoHa: the Hadamard (elementwise) product of two low-rank matrices; FedPara, as LyCORIS writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lib_locon.arithmetic import add_scaled_product, matrix
from lib_locon.families.base import Adder, Family, factor
from lib_locon.families.tucker import fold_core
from lib_locon.products import multiplier


@dataclass(frozen=True, eq=False)
class LoHa(Family):
    """ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b). OneTrainer writes the factors of a convolution in 4-D; read as matrices."""

    name = "LoHa"
    w1_a: Tensor = factor("hada_w1_a", "out r")
    w1_b: Tensor = factor("hada_w1_b", "r n")
    w2_a: Tensor = factor("hada_w2_a", "out s")
    w2_b: Tensor = factor("hada_w2_b", "s n")

    def products(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """up₁, down₁, up₂, down₂ as matrices: ΔW = (up₁ · down₁) ⊙ (up₂ · down₂)."""
        return matrix(self.w1_a), matrix(self.w1_b), matrix(self.w2_a), matrix(self.w2_b)

    def bound(self, peaks: Mapping[str, float]) -> float:
        sizes = self.sizes()
        return sizes["r"] * sizes["s"] * prod(peaks.values())

    def delta(self, base: Tensor) -> Tensor:
        up1, down1, up2, down2 = self.products()
        return ((up1 @ down1) * (up2 @ down2)).reshape(base.shape)

    def adder(self, base: Tensor) -> Adder:
        up1, down1, up2, down2 = self.products()
        one, other = multiplier(down1), multiplier(down2)

        def add(total: Tensor, augend: Tensor, _: Tensor, start: int, strength: float) -> None:
            rows = slice(start, start + len(total))
            add_scaled_product(total, augend, one(up1[rows]), other(up2[rows]), strength)

        return add


@dataclass(frozen=True, eq=False)
class TuckerLoHa(LoHa):
    """Each of the two matrices in Tucker form. The axes of the `_a` factors are swapped against plain LoHa."""

    name = "LoHa Tucker"
    t1: Tensor = factor("hada_t1", "r r *k")
    w1_a: Tensor = factor("hada_w1_a", "r out")
    w1_b: Tensor = factor("hada_w1_b", "r in")
    t2: Tensor = factor("hada_t2", "s s *k")
    w2_a: Tensor = factor("hada_w2_a", "s out")
    w2_b: Tensor = factor("hada_w2_b", "s in")

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        return sizes["out"], sizes["in"] * sizes["*k"]

    def bound(self, peaks: Mapping[str, float]) -> float:
        sizes = self.sizes()
        return (sizes["r"] * sizes["s"]) ** 2 * prod(peaks.values())

    def products(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        # core · b is what a plain LoHa's `b` would have been
        down1, down2 = fold_core(self.t1, self.w1_b), fold_core(self.t2, self.w2_b)
        return matrix(self.w1_a).T, down1, matrix(self.w2_a).T, down2
