"""LoKr: the Kronecker product of a small and a larger matrix, either of them whole or itself a low-rank product."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.arithmetic import add_scaled_product, matrix
from lib_locon.families.base import Adder, Family, factor
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

    def bound(self, peaks: Mapping[str, float]) -> float:
        return self._half_bound("lokr_w1", peaks) * self._half_bound("lokr_w2", peaks)

    def _half_bound(self, half: str, peaks: Mapping[str, float]) -> float:
        """A half that is there whole is used whole; a factored one is a sum of r products, in Tucker form of r²."""
        if half in peaks:
            return peaks[half]
        rank = self.sizes()["r1" if half == "lokr_w1" else "r2"]
        core = rank * peaks["lokr_t2"] if half == "lokr_w2" and "lokr_t2" in peaks else 1.0
        return rank * core * peaks[f"{half}_a"] * peaks[f"{half}_b"]

    def first(self) -> Tensor:
        """w1 as a matrix (a, b)."""
        return _half(self.w1, self.w1_a, self.w1_b)

    def second(self) -> Tensor:
        """w2 as a matrix (c, d·k)."""
        raise NotImplementedError

    def adder(self, base: Tensor) -> Adder:
        first, second = self.first().contiguous(), self.second().contiguous()
        (_, across), (height, width) = first.shape, second.shape

        def add(total: Tensor, augend: Tensor, _: Tensor, start: int, strength: float) -> None:
            # rows of one block are one row of w1, each of its numbers times the same rows of w2
            low, end = start, start + total.shape[0]
            while low < end:
                block, row = divmod(low, height)
                blocks = (end - low) // height if row == 0 else 0  # whole ones in one go, else what there is of one
                high = low + blocks * height if blocks else min(end, low + height - row)
                count = max(blocks, 1)
                part = total[low - start : high - start].view(count, -1, across, width)
                # the same object where it is `total`, for that is how `add_scaled_product` knows it
                before = part if augend is total else augend[low - start : high - start].view(part.shape)
                rows = second[row : row + part.shape[1]].view(1, -1, 1, width)
                blocks_of_first = first[block : block + count].view(count, 1, across, 1)
                add_scaled_product(part, before, blocks_of_first, rows, strength)
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
