"""OFT as PEFT (0.16 and later) and OneTrainer write it: packed triangles, rotating blocks of input columns.

The conventions differ from Diag-OFT's: input side, the packed upper triangle, and a Neumann series whose R is to first
order the inverse of the exact form's. Which of the two was trained stands in the configuration only.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod

import torch
from torch import Tensor

from lib_locon.arithmetic import matrix
from lib_locon.errors import ShapeError
from lib_locon.families.base import Family, factor
from lib_locon.families.oft import cayley

TERMS = 5
"""Of the series, where nothing says otherwise."""


@dataclass(frozen=True, eq=False, kw_only=True)
class PeftOFT(Family):
    """`oft_R.weight` (blocks, b(b−1)/2); one block is shared by all when fewer columns than blocks · b are there.

    `exact` (from the configuration) is 1 for the Cayley form, `terms` how many terms the series has without it; `limit`
    is the eps of constrained OFT, over all blocks. `scaled_oft` is OneTrainer's marker: the packed values
    are divided by 2·√(b−1) first.
    """

    name = "OFT"
    needs_base = True
    scaled = False
    packed: Tensor = factor("oft_R.weight", "blocks packed")
    marker: Tensor | None = factor("oft_R.scaled_oft", "*marker", optional=True)
    exact: Tensor | None = factor("oft_R.exact", "", optional=True)
    terms: Tensor | None = factor("oft_R.terms", "", optional=True)
    limit: Tensor | None = factor("oft_R.limit", "", optional=True)

    def block_size(self) -> int:
        """b, from the b(b−1)/2 packed values. Raises ShapeError where there is no such b."""
        packed = self.sizes()["packed"]
        size = (1 + isqrt(1 + 8 * packed)) // 2
        if size * (size - 1) // 2 != packed:
            raise ShapeError(f"{packed} packed values are no triangle of a square block")
        return size

    def shape(self) -> tuple[int | None, int | None]:
        blocks, size = self.sizes()["blocks"], self.block_size()
        return None, (None if blocks == 1 else blocks * size)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if prod(shape[1:]) % self.block_size():
            raise ShapeError(f"blocks of {self.block_size()} do not divide the {prod(shape[1:])} inputs of the weight")

    def rotations(self) -> Tensor:
        """R of each block, (blocks, b, b)."""
        size = self.block_size()
        rows, columns = torch.triu_indices(size, size, 1, device=self.packed.device)
        values = matrix(self.packed)
        if self.marker is not None:
            values = values / (2 * (size - 1) ** 0.5)
        upper = values.new_zeros(len(values), size, size)
        upper[:, rows, columns] = values
        q = upper - upper.mT
        if self.limit is not None:
            norms = torch.linalg.matrix_norm(q, keepdim=True)
            most = float(self.limit) / len(q) ** 0.5
            q = q * torch.where(norms > most, most / norms, 1.0)
        if self.exact is not None and bool(self.exact):
            return cayley(-q)
        return _neumann(q, TERMS if self.terms is None else int(self.terms))

    def rows(self, start: int, length: int) -> PeftOFT:
        del start, length  # the inputs are turned: each row by itself, and all of them alike
        return self

    def delta(self, base: Tensor) -> Tensor:
        rotations = self.rotations()
        blocks = base.reshape(base.shape[0], -1, rotations.shape[-1])
        turned = torch.einsum("kij,okj->oki", rotations.expand(blocks.shape[1], -1, -1), blocks)
        return (turned - blocks).reshape(base.shape)


def _neumann(q: Tensor, terms: int) -> Tensor:
    """I + 2Q + 2Q² + … + Qⁿ⁻¹, n = `terms`. The last is Qⁿ⁻¹ alone, of two 2Q; three are four, as in PEFT."""
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    power = q
    if terms > 1:
        total = total + 2 * q
    for _ in range(2, max(terms, 4) - 1 if terms > 2 else 0):
        power = power @ q
        total = total + 2 * power
    return total + power @ q if terms > 2 else total


@dataclass(frozen=True, eq=False, kw_only=True)
class OneTrainerOFT(PeftOFT):
    """The same in a file of OneTrainer, whose convolutions turn the other way (W·R, where linear layers are W·Rᵀ)."""

    packed: Tensor = factor("onetrainer.oft_R.weight", "blocks packed")

    def delta(self, base: Tensor) -> Tensor:
        if base.ndim == 2:
            return super().delta(base)
        rotations = self.rotations()
        blocks = base.reshape(base.shape[0], -1, rotations.shape[-1])
        turned = torch.einsum("kji,okj->oki", rotations.expand(blocks.shape[1], -1, -1), blocks)
        return (turned - blocks).reshape(base.shape)
