"""Orthogonal fine-tuning on the output side: blocks of output rows are rotated. Diag-OFT of LyCORIS and kohya.

R = (I + Q)(I − Q)⁻¹ (Cayley) with Q skew-symmetric; W′[block] = Rᵀ · W[block]. `alpha` is no scale here: it limits how
far the rotation may go (the norm of Q over all blocks).
"""

from __future__ import annotations

from collections.abc import Iterator
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


def limited(q: Tensor, alpha: Tensor | None, out: int) -> Tensor:
    """kohya: Q shrunk to the norm alpha · out where it is longer, also to none at all; no limit without an alpha."""
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
        return rotate_blocks(cayley(limited(skew(self.blocks), self.alpha, rows.shape[0])), rows)


@dataclass(frozen=True, eq=False, kw_only=True)
class SplitOFT(OutputRotation):
    """kohya's OFT for Flux, whose fused projections are turned part by part: q, k, v and, in `linear1`, the MLP.

    Each part has its own blocks and its own limit, alpha · its rows. A layer that is not fused is one part.
    """

    name = "OFT"
    first: Tensor = factor("oft_blocks.0", "k b0 b0")
    second: Tensor | None = factor("oft_blocks.1", "k b1 b1", optional=True)
    third: Tensor | None = factor("oft_blocks.2", "k b2 b2", optional=True)
    fourth: Tensor | None = factor("oft_blocks.3", "k b3 b3", optional=True)
    alpha: Tensor | None = factor("alpha", "", optional=True)

    def parts(self) -> list[Tensor]:
        """The blocks of each part, (k, b, b), in the order of their rows."""
        return [part for part in (self.first, self.second, self.third, self.fourth) if part is not None]

    def shape(self) -> tuple[int | None, int | None]:
        self.sizes()
        parts = self.parts()
        suffixes = [suffix for suffix in self.tensors() if suffix.startswith("oft_blocks.")]
        if suffixes[-1] != f"oft_blocks.{len(parts) - 1}":  # what follows the gap would turn the wrong rows
            raise ShapeError(f"{suffixes[-1]} is there, and not all of the parts before it")
        for suffix, part in zip(suffixes, parts, strict=True):
            if part.ndim != 3:
                raise ShapeError(f"{suffix} has three axes in such files, not the shape {tuple(part.shape)}")
        return sum(part.shape[0] * part.shape[1] for part in parts), None

    def rotate(self, rows: Tensor) -> Tensor:
        turned: list[Tensor] = []
        for part, start, end in self._places():
            piece = rows[start:end]
            turned.append(rotate_blocks(cayley(limited(skew(part), self.alpha, len(piece))), piece))
        return torch.cat(turned)

    def rows(self, start: int, length: int) -> SplitOFT | None:
        inside = [part for part, begin, end in self._places() if start <= begin and end <= start + length]
        if sum(part.shape[0] * part.shape[1] for part in inside) != length:
            return None  # the limit of a part is for all of its rows
        rescale = None if self.rescale is None else self.rescale[start : start + length]
        fields = dict(zip(("first", "second", "third", "fourth"), inside, strict=False))
        return SplitOFT(**fields, alpha=self.alpha, rescale=rescale)

    def _places(self) -> Iterator[tuple[Tensor, int, int]]:
        """Each part with its first row and the row after its last."""
        end = 0
        for part in self.parts():
            start, end = end, end + part.shape[0] * part.shape[1]
            yield part, start, end


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
