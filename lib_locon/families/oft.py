"""Orthogonal fine-tuning on the output side: blocks of output rows are rotated. Diag-OFT of LyCORIS and kohya.

R = (I + Q)(I − Q)⁻¹ (Cayley) with Q skew-symmetric; W′[block] = Rᵀ · W[block]. `alpha` is no scale here: it limits how
far the rotation may go (the norm of Q over all blocks).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.errors import ShapeError
from lib_locon.families.base import Family, factor

EPSILON = 1e-8


def skew(blocks: Tensor) -> Tensor:
    """Q = B − Bᵀ for each block."""
    return blocks - blocks.mT


def cayley(q: Tensor) -> Tensor:
    """(I + Q)(I − Q)⁻¹ for each block of (…, b, b)."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # X = (I + Q)(I − Q)⁻¹  ⇔  X (I − Q) = I + Q; the two commute, so the left division is the same matrix
    rotation: Tensor = torch.linalg.solve(eye - q, eye + q)
    return rotation


@dataclass(frozen=True, eq=False, kw_only=True)
class OutputRotation(Family):
    """What Diag-OFT and BOFT share: the constraint, `rescale`, and ΔW = W′ − W."""

    scaled = False
    needs_base = True
    rescale: Tensor | None = factor("rescale", "out", optional=True)

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if self.rescale is not None and self.rescale.numel() != shape[0]:
            raise ShapeError(f"its rescale has {self.rescale.numel()} numbers, the weight {shape[0]} outputs")

    def rotate(self, rows: Tensor) -> Tensor:
        """W′ without rescale; `rows` is W as a matrix (out, n)."""
        raise NotImplementedError

    def delta(self, base: Tensor) -> Tensor:
        rows = base.reshape(base.shape[0], -1)
        new = self.rotate(rows)
        if self.rescale is not None:
            new = new * self.rescale.reshape(-1, 1)
        return (new - rows).reshape(base.shape)


def constrained(q: Tensor, alpha: Tensor | None, out: int) -> Tensor:
    """LyCORIS: Q shrunk to the norm alpha · out where it is longer; no limit where alpha is 0 or missing."""
    limit = 0.0 if alpha is None else float(alpha) * out
    norm: Tensor = torch.linalg.vector_norm(q)
    if 0 < limit < float(norm):
        return q * (limit / (norm + EPSILON))
    return q


def always_limited(q: Tensor, alpha: Tensor | None, out: int) -> Tensor:
    """kohya: Q shrunk to the norm alpha · out where it is longer, at alpha 0 too; as it is where alpha is missing."""
    if alpha is None:
        return q
    norm: Tensor = torch.linalg.vector_norm(q)
    return q * ((torch.clamp(norm, max=float(alpha) * out) + EPSILON) / (norm + EPSILON))


def rotate_blocks(rotations: Tensor, rows: Tensor) -> Tensor:
    """Rᵀ of each block (k, b, b) on its b rows of (k·b, n)."""
    blocks = rows.reshape(*rotations.shape[:2], -1)
    return torch.einsum("knm,kni->kmi", rotations, blocks).reshape(rows.shape)


@dataclass(frozen=True, eq=False, kw_only=True)
class DiagOFT(OutputRotation):
    """LyCORIS' Diag-OFT."""

    name = "OFT"
    blocks: Tensor = factor("oft_blocks", "k b b")
    alpha: Tensor | None = factor("alpha", "", optional=True)

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        if self.blocks.ndim != 3:
            raise ShapeError(f"OFT blocks have three axes, not the shape {tuple(self.blocks.shape)}")
        return sizes["k"] * sizes["b"], None

    def rotate(self, rows: Tensor) -> Tensor:
        return rotate_blocks(cayley(constrained(skew(self.blocks), self.alpha, rows.shape[0])), rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class KohyaOFT(DiagOFT):
    """kohya's `oft_unet_` files: the limit is always in force, so alpha 0 means that nothing turns."""

    blocks: Tensor = factor("kohya_oft_blocks", "k b b")

    def rotate(self, rows: Tensor) -> Tensor:
        return rotate_blocks(cayley(always_limited(skew(self.blocks), self.alpha, rows.shape[0])), rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitKohyaOFT(OutputRotation):
    """kohya's OFT for Flux: a list of rotations, one for each part of the rows (q, k, v and mlp), or one for all.

    The limit of a part is alpha · its own rows, over all its blocks (`networks/oft_flux.py`).
    """

    name = "OFT"
    first: Tensor = factor("oft_blocks.0", "k b0 b0")
    second: Tensor | None = factor("oft_blocks.1", "k b1 b1", optional=True)
    third: Tensor | None = factor("oft_blocks.2", "k b2 b2", optional=True)
    fourth: Tensor | None = factor("oft_blocks.3", "k b3 b3", optional=True)
    alpha: Tensor | None = factor("alpha", "", optional=True)

    def shape(self) -> tuple[int | None, int | None]:
        self.sizes()
        if any(blocks.ndim != 3 for blocks in self.parts()):
            raise ShapeError("OFT blocks have three axes, not the shapes of this file's")
        return sum(map(_rows, self.parts())), None

    def parts(self) -> list[Tensor]:
        """The blocks of each part, (k, b, b), in the order of the rows. Raises ShapeError where one is missing."""
        listed = [self.first, self.second, self.third, self.fourth]
        found = [blocks for blocks in listed if blocks is not None]
        if any(blocks is None for blocks in listed[: len(found)]):
            raise ShapeError("a part of its list of rotations is missing")
        return found

    def split(self, rows: Sequence[int]) -> list[Family] | None:
        parts = self.parts()
        if [_rows(blocks) for blocks in parts] != list(rows):
            return None
        return [SplitKohyaOFT(first=blocks, alpha=self.alpha) for blocks in parts]

    def rotate(self, rows: Tensor) -> Tensor:
        turned, start = [], 0
        for blocks in self.parts():
            part = rows[start : start + _rows(blocks)]
            turned.append(rotate_blocks(cayley(always_limited(skew(blocks), self.alpha, len(part))), part))
            start += len(part)
        return torch.cat(turned)


def _rows(blocks: Tensor) -> int:
    return blocks.shape[0] * blocks.shape[1]


@dataclass(frozen=True, eq=False, kw_only=True)
class OldDiagOFT(OutputRotation):
    """LyCORIS of 2023-10 to 2024-02: the finished rotation itself, or (the first month) its difference from I.

    Which of the two shows in the diagonals: near 1 or near 0.
    """

    name = "OFT"
    rotation: Tensor = factor("oft_diag", "k b b")

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        if self.rotation.ndim != 3:
            raise ShapeError(f"OFT blocks have three axes, not the shape {tuple(self.rotation.shape)}")
        return sizes["k"] * sizes["b"], None

    def rotate(self, rows: Tensor) -> Tensor:
        rotation = self.rotation
        if float(rotation.diagonal(dim1=-2, dim2=-1).mean()) < 0.5:
            rotation = rotation + torch.eye(rotation.shape[-1], dtype=rotation.dtype, device=rotation.device)
        return rotate_blocks(rotation, rows)
