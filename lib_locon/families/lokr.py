"""LoKr: the Kronecker product of a small and a larger matrix, either of them whole or itself a low-rank product."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.families.base import Adder, Family, factor
from lib_locon.families.shapes import matrix
from lib_locon.families.tucker import rebuild


@dataclass(frozen=True, eq=False, kw_only=True)
class _Kronecker(Family):
    """ΔW = w1 ⊗ w2, with w1 whole or as `w1_a` · `w1_b`.

    The block sizes are read from the tensors, never computed again: trainers factorise in several ways. As matrices,
    (a, b) ⊗ (c, d·k) has its columns in the order (b, d, k), which is that of a weight (a·c, b·d, *k).
    """

    w1: Tensor | None = factor("lokr_w1", "a b", optional=True)
    w1_a: Tensor | None = factor("lokr_w1_a", "a r1", optional=True)
    w1_b: Tensor | None = factor("lokr_w1_b", "r1 b", optional=True)

    @classmethod
    def missing(cls, present: Collection[str]) -> list[str]:
        return [*_missing_half("lokr_w1", present), *super().missing(present)]

    @property
    def rank(self) -> int | None:
        # alpha scales once, by the rank of w2, else of w1; with both whole it is not used at all (and may be inf)
        sizes = self.sizes()
        return sizes.get("r2", sizes.get("r1"))

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        return sizes["a"] * sizes["c"], sizes["b"] * sizes["d"] * sizes.get("*k", 1)

    def first(self) -> Tensor:
        """w1 as a matrix (a, b)."""
        return _half(self.w1, self.w1_a, self.w1_b)

    def second(self) -> Tensor:
        """w2 as a matrix (c, d·k)."""
        raise NotImplementedError

    def adder(self, base: Tensor) -> Adder:
        first, second = self.first(), self.second()
        (_, across), (height, width) = first.shape, second.shape

        def add(total: Tensor, _: Tensor, start: int, strength: float) -> None:
            # rows of one block are one row of w1, each of its numbers times the same rows of w2
            low = start
            while low < start + len(total):
                block, row = divmod(low, height)
                high = min(start + len(total), low + height - row)
                part = total[low - start : high - start].view(high - low, across, width)
                rows = second[row : row + high - low].unsqueeze(1)
                part.addcmul_(first[block].reshape(1, across, 1), rows, value=strength)
                low = high

        return add

    def delta(self, base: Tensor) -> Tensor:
        return torch.kron(self.first().contiguous(), self.second().contiguous()).reshape(base.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class LoKr(_Kronecker):
    """w2 whole or as `w2_a` · `w2_b`."""

    name = "LoKr"
    w2: Tensor | None = factor("lokr_w2", "c d", optional=True)
    w2_a: Tensor | None = factor("lokr_w2_a", "c r2", optional=True)
    w2_b: Tensor | None = factor("lokr_w2_b", "r2 d", optional=True)

    @classmethod
    def missing(cls, present: Collection[str]) -> list[str]:
        return [*super().missing(present), *_missing_half("lokr_w2", present)]

    def second(self) -> Tensor:
        return _half(self.w2, self.w2_a, self.w2_b)


@dataclass(frozen=True, eq=False, kw_only=True)
class TuckerLoKr(_Kronecker):
    """w2 in Tucker form. The axes of `w2_a` are swapped against plain LoKr."""

    name = "LoKr Tucker"
    t2: Tensor = factor("lokr_t2", "r2 r2 *k")
    w2_a: Tensor = factor("lokr_w2_a", "r2 c")
    w2_b: Tensor = factor("lokr_w2_b", "r2 d")

    def second(self) -> Tensor:
        return rebuild(self.t2, matrix(self.w2_a).T, self.w2_b)


def _missing_half(whole: str, present: Collection[str]) -> list[str]:
    parts = [f"{whole}_a", f"{whole}_b"]
    if whole in present or all(part in present for part in parts):
        return []
    return [part for part in parts if part not in present] if any(part in present for part in parts) else [whole]


def _half(whole: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor:
    if whole is not None:
        return matrix(whole)
    assert a is not None and b is not None
    return matrix(a) @ matrix(b)
