"""Orthogonal fine-tuning on the output side: blocks of output rows are rotated. Diag-OFT of LyCORIS and kohya.

R = (I + Q)(I − Q)⁻¹ (Cayley) with Q skew-symmetric; W′[block] = Rᵀ · W[block]. `alpha` is no scale here: it limits how
far the rotation may go (the norm of Q over all blocks).
"""

from __future__ import annotations

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
        q = skew(self.blocks)
        if self.alpha is not None:
            norm = torch.linalg.vector_norm(q)
            q = q * ((torch.clamp(norm, max=float(self.alpha) * rows.shape[0]) + EPSILON) / (norm + EPSILON))
        return rotate_blocks(cayley(q), rows)


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
