"""LoRA and LoCon: ΔW = up · down.

For a convolution `down` has the kernel and `up` is 1×1; as matrices they multiply like those of a linear layer, which
is why there is one formula for Linear and for convolutions of any dimension (docs/formulas.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from lib_locon.arithmetic import matrix, working_dtype
from lib_locon.errors import ShapeError
from lib_locon.families.base import Family, factor
from lib_locon.families.tucker import fold_core


@dataclass(frozen=True, eq=False)
class LoRA(Family):
    """Plain low-rank product, for linear layers and (as LoCon) for convolutions."""

    name = "LoRA"
    truncates = True
    up: Tensor = factor("lora_up.weight", "out r")
    down: Tensor = factor("lora_down.weight", "r n")

    @property
    def label(self) -> str:
        return "LoCon" if prod(self.down.shape[2:]) > 1 else "LoRA"

    def truncated(self, rank: int) -> LoRA:
        return dataclasses.replace(self, up=matrix(self.up)[:, :rank], down=self.down[:rank])

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return matrix(self.up), matrix(self.down)

    def bound(self, peaks: Mapping[str, float]) -> float:
        return self.sizes()["r"] * peaks["lora_up.weight"] * peaks["lora_down.weight"]

    def delta(self, base: Tensor) -> Tensor:
        return (matrix(self.up) @ matrix(self.down)).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class EmbeddingLoRA(Family):
    """PEFT on an embedding (num, dim), which it holds the other way round: ΔW = (B · A)ᵀ."""

    name = "LoRA"
    a: Tensor = factor("lora_embedding_A", "r out")
    b: Tensor = factor("lora_embedding_B", "n r")

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if len(shape) != 2:
            raise ShapeError(f"an embedding's factors cannot change a weight of the shape {shape}")

    def low_rank(self) -> tuple[Tensor, Tensor]:
        return matrix(self.a).T, matrix(self.b).T

    def bound(self, peaks: Mapping[str, float]) -> float:
        return self.sizes()["r"] * peaks["lora_embedding_A"] * peaks["lora_embedding_B"]

    def delta(self, base: Tensor) -> Tensor:
        return matrix(self.a).T @ matrix(self.b).T


@dataclass(frozen=True, eq=False)
class SparseLoRA(LoRA):
    """A LoRA with the largest entries of what it missed (LyCORIS' extraction): ΔW = up · down + E.

    E is a matrix of the weight's size: `values` at `indices` (2, nnz), zero elsewhere. A "bias" in name only.
    """

    name = "LoRA + residual"
    indices: Tensor = factor("bias_indices", "two nnz")
    values: Tensor = factor("bias_values", "nnz")
    size: Tensor = factor("bias_size", "two")

    @property
    def label(self) -> str:
        return self.name

    def check(self, shape: tuple[int, ...]) -> None:
        super().check(shape)
        if not self.indices.is_meta and any(
            int(places.max()) >= size for places, size in zip(self._places(), (shape[0], prod(shape[1:])), strict=True)
        ):
            raise ShapeError("its residual has numbers outside of the weight")

    def _places(self) -> Tensor:
        """Rows and columns, (2, nnz)."""
        # indices are int16 in the file, which wraps above 32767: read as unsigned
        return matrix(self.indices).long() % 2**16

    def low_rank(self) -> None:  # type: ignore[override]  # the sum is of full rank
        return None

    def bound(self, peaks: Mapping[str, float]) -> float:
        return super().bound(peaks) + self.values.numel() * peaks["bias_values"]  # one place may be named many times

    def delta(self, base: Tensor) -> Tensor:
        total = matrix(self.up) @ matrix(self.down)
        rows, columns = self._places()
        return total.index_put((rows, columns), self.values.flatten(), accumulate=True).reshape(base.shape)


@dataclass(frozen=True, eq=False)
class TuckerLoRA(Family):
    """LoCon in Tucker (CP) form: 1×1 down, a k×k core, 1×1 up; ΔW[o,i,…] = Σ_pq up[o,p] · mid[p,q,…] · down[q,i]."""

    name = "LoCon Tucker"
    up: Tensor = factor("lora_up.weight", "out r")
    down: Tensor = factor("lora_down.weight", "r in")
    mid: Tensor = factor("lora_mid.weight", "r r *k")

    def shape(self) -> tuple[int | None, int | None]:
        sizes = self.sizes()
        return sizes["out"], sizes["in"] * sizes["*k"]

    def low_rank(self) -> tuple[Tensor, Tensor]:
        # core · down is what a plain LoCon's k×k `down` would have been: ΔW is still a product of rank r
        wide = working_dtype(self.mid)
        return matrix(self.up), fold_core(self.mid.to(wide), self.down.to(wide))

    def bound(self, peaks: Mapping[str, float]) -> float:
        return self.sizes()["r"] ** 2 * prod(peaks.values())

    def delta(self, base: Tensor) -> Tensor:
        up, down = self.low_rank()
        return (up.to(down.dtype) @ down).reshape(base.shape)
