"""BOFT: rotations in butterfly stages, so that few small blocks reach every row (LyCORIS) or column (PEFT)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.errors import ShapeError
from lib_locon.families.base import Family, factor
from lib_locon.families.oft import OutputRotation, cayley, constrained, skew


@dataclass(frozen=True, eq=False, kw_only=True)
class BOFT(OutputRotation):
    """LyCORIS: stages (m, d, b, b) on the output side; stage i mixes rows that lie 2^i · b/2 apart."""

    name = "BOFT"
    blocks: Tensor = factor("oft_blocks", "m d b b")
    alpha: Tensor | None = factor("alpha", "", optional=True)

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        if self.blocks.ndim != 4:
            raise ShapeError(f"BOFT blocks have four axes, not the shape {tuple(self.blocks.shape)}")
        return sizes["d"] * sizes["b"], None

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        check_stages(self.blocks)
        if self.blocks.shape[-1] % 2:
            raise ShapeError(f"BOFT blocks of {self.blocks.shape[-1]} rows have no halves")

    def rotate(self, rows: Tensor) -> Tensor:
        rotations = cayley(constrained(skew(self.blocks), self.alpha, rows.shape[0]))
        stages, d, b, _ = rotations.shape
        for i in range(stages):
            order = butterfly(rows.shape[0], 2**i * (b // 2), rows.device)
            mixed = torch.einsum("dij,djn->din", rotations[i], rows[order].reshape(d, b, -1)).reshape(rows.shape)
            rows = torch.empty_like(rows).index_copy(0, order, mixed)
        return rows


def check_stages(blocks: Tensor) -> None:
    """Raises ShapeError unless each stage can pair the half-blocks of 2^stage blocks."""
    stages, d, b, _ = blocks.shape
    if (b % 2 and stages > 1) or d % 2 ** min(stages - 1, d.bit_length()):
        raise ShapeError(f"{d} blocks of {b} rows cannot be mixed in {stages} stages")


def butterfly(length: int, step: int, device: torch.device) -> Tensor:
    """The order of indices (length,) in which (c, 2, step) reads as (c, step, 2): partners side by side."""
    return torch.arange(length, device=device).reshape(-1, 2, step).mT.flatten()


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftBOFT(Family):
    """PEFT: on the input side, S = (A − Aᵀ)/2, Q = (I − S)(I + S)⁻¹, then the output rows times `boft_s`."""

    name = "BOFT"
    scaled = False
    needs_base = True
    rotation: Tensor = factor("boft_R", "m d b b")
    rescale: Tensor = factor("boft_s", "*v")

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        if self.rotation.ndim != 4:
            raise ShapeError(f"BOFT blocks have four axes, not the shape {tuple(self.rotation.shape)}")
        return self.rescale.numel(), sizes["d"] * sizes["b"]

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        check_stages(self.rotation)

    def delta(self, base: Tensor) -> Tensor:
        columns = base.reshape(base.shape[0], -1).mT
        rotations = cayley(-skew(self.rotation) / 2)
        turned = columns
        for i in range(rotations.shape[0]):
            turned = self._stage(turned, rotations[i], i)  # stage 0 acts first
        return (turned.mT * self.rescale.reshape(-1, 1)).reshape(base.shape) - base

    @staticmethod
    def _stage(rows: Tensor, blocks: Tensor, stage: int) -> Tensor:
        """P · blockdiag(Q) · Pᵀ on the rows of (in, out): stage i interleaves the half-blocks of 2^i blocks."""
        d, b, _ = blocks.shape
        order = torch.arange(d * b, device=rows.device)
        if stage:  # the first takes the blocks as they lie, also those of an odd size
            order = order.reshape(-1, 2**stage, 2, b // 2).transpose(1, 2).flatten()
        gathered = torch.empty_like(rows).index_copy(0, order, rows)
        return torch.einsum("dij,djn->din", blocks, gathered.reshape(d, b, -1)).reshape(rows.shape)[order]
