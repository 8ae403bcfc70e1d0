"""A ΔW as a branch beside its layer, y + strength · B(A x), for weights that cannot hold the sum.

A branch is the family's ΔW left in pieces and run over the layer's input: nothing of the weight's size is made (LoHa, a
product of elements, is made in tiles). Which families have one is in `branch_of`; the others need the base weight.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_locon.arithmetic import matrix
from lib_locon.families.convolve import CONVS, apply_pointwise, apply_weight, channel_axis, groups, per_group
from lib_locon.families.tucker import rebuild

B = TypeVar("B", bound="Branch")
TILE = 2**20
"""Numbers of ΔW that a dense branch makes at a time: 4 MiB in fp32."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """Tensors and a number, `scale`, that together are ΔW at strength 1. The first field takes the scale."""

    scale: float = 1.0

    def to(self: B, device: torch.device, dtype: torch.dtype) -> B:
        """Ready for inputs of this kind: the scale folded in, in fp32, and every factor rounded once."""
        return self._converted(device, dtype, {})

    def _converted(self: B, device: torch.device, dtype: torch.dtype, others: dict[str, Any]) -> B:
        wide = torch.promote_types(dtype, torch.float32)
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        moved = {name: value.to(device).to(wide) for name, value in held.items() if isinstance(value, Tensor)}
        for name in list(moved)[:1]:
            moved[name] = moved[name] * self.scale
        narrow = {name: value.to(dtype) for name, value in moved.items()}
        return dataclasses.replace(self, **{**narrow, **others, "scale": 1.0})

    def rows(self: B, start: int, length: int) -> B:
        """The branch of these rows of ΔW."""
        raise NotImplementedError

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        """ΔW's part of the layer's output for the input `x`, in the dtype of `x`; call `to` first."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """ΔW as a matrix (out, n), without the scale."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False, kw_only=True)
class LowRank(Branch):
    """`up` (out, r) · `down` (r, n): two layers, `down` with the layer's kernel and geometry, `up` 1×1."""

    up: Tensor
    down: Tensor

    def rows(self, start: int, length: int) -> LowRank:
        return dataclasses.replace(self, up=self.up[start : start + length])

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        return apply_pointwise(apply_weight(x, layer, per_group(self.down, layer)), layer, self.up)

    def matrix(self) -> Tensor:
        return self.up @ self.down


@dataclass(frozen=True, eq=False, kw_only=True)
class Tucker(Branch):
    """Three layers: `down` (q, in) 1×1, `core` (p, q, *k) with the layer's geometry, `up` (out, p) 1×1."""

    up: Tensor
    core: Tensor
    down: Tensor

    def rows(self, start: int, length: int) -> Tucker:
        return dataclasses.replace(self, up=self.up[start : start + length])

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        # the 1×1 goes first: a linear map of the channels and the padding of the pixels may change places
        narrow = apply_pointwise(x, layer, per_group(self.down, layer))
        return apply_pointwise(apply_weight(narrow, layer, per_group(matrix(self.core), layer)), layer, self.up)

    def matrix(self) -> Tensor:
        return rebuild(self.core, self.up, self.down)


@dataclass(frozen=True, eq=False, kw_only=True)
class Kronecker(Branch):
    """w1 ⊗ w2: `first` (a, b) mixes b groups of channels, `second` (c, d·k) works inside each of them."""

    first: Tensor
    second: Branch
    start: int = 0
    length: int = -1

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        return self._converted(device, dtype, {"second": self.second.to(device, dtype)})

    def rows(self, start: int, length: int) -> Kronecker:
        return dataclasses.replace(self, start=start, length=length)

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        if groups(layer) > 1:  # its blocks and the groups' cross; such weights are small
            return apply_weight(x, layer, self._kept(self.matrix(), 0))
        axis = channel_axis(x, layer)
        lead, space = x.shape[:axis], x.shape[axis + 1 :]
        inner = x.reshape(*lead, self.first.shape[1], -1, *space)
        wide = self.first.shape[0] > self.first.shape[1]
        if not wide:  # fewer channels come out than go in: mixed first, the larger factor has less to do
            inner = self._mixed(inner, axis)
        inner = self.second.run(inner.flatten(0, axis), layer)
        inner = inner.reshape(*lead, -1, *inner.shape[1:])
        mixed = self._mixed(inner, axis) if wide else inner
        return self._kept(mixed.flatten(axis, axis + 1), axis)

    def _mixed(self, x: Tensor, axis: int) -> Tensor:
        """`first` along `axis`: (*lead, b, channels, *space) → (*lead, a, channels, *space)."""
        if x.ndim == axis + 2:  # pixels or tokens: one product for all of them rather than one for each
            return torch.nn.functional.linear(x.mT, self.first).mT
        return (self.first @ x.flatten(axis + 1)).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def _kept(self, x: Tensor, axis: int) -> Tensor:
        return x if self.length < 0 else x.narrow(axis, self.start, self.length)

    def matrix(self) -> Tensor:
        return torch.kron(self.first.contiguous(), self.second.matrix().contiguous())


@dataclass(frozen=True, eq=False, kw_only=True)
class Dense(Branch):
    """A ΔW that is no product of small layers: made in tiles of rows, in fp32, each used and let go."""

    start: int = 0
    length: int

    def to(self: D, device: torch.device, dtype: torch.dtype) -> D:
        # two products of small numbers multiplied would vanish in fp16: only the finished tile is rounded
        return self._converted(device, torch.promote_types(dtype, torch.float32), {})

    def rows(self: D, start: int, length: int) -> D:
        return dataclasses.replace(self, start=self.start + start, length=length)

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        step = self.length if groups(layer) > 1 else max(1, TILE // self._columns())
        stops = range(self.start, self.start + self.length, step)
        tiles = (self.block(at, min(at + step, self.start + self.length)) for at in stops)
        parts = [apply_weight(x, layer, tile.to(x.dtype)) for tile in tiles]
        return parts[0] if len(parts) == 1 else torch.cat(parts, channel_axis(parts[0], layer))

    def _columns(self) -> int:
        raise NotImplementedError

    def block(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of ΔW, (stop - start, n)."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        return self.block(self.start, self.start + self.length)


D = TypeVar("D", bound=Dense)


@dataclass(frozen=True, eq=False, kw_only=True)
class Hadamard(Dense):
    """(a1 · b1) ⊙ (a2 · b2)."""

    a1: Tensor
    b1: Tensor
    a2: Tensor
    b2: Tensor

    def _columns(self) -> int:
        return self.b1.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        return (self.a1[start:stop] @ self.b1).mul_(self.a2[start:stop] @ self.b2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Whole(Dense):
    """A matrix that is stored as it is."""

    weight: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Whole:
        return self._converted(device, dtype, {})  # nothing is multiplied any more

    def _columns(self) -> int:
        return self.weight.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        return self.weight[start:stop]


@dataclass(frozen=True, eq=False, kw_only=True)
class Shift(Branch):
    """A change of the bias: the same numbers (out,) at every place."""

    vector: Tensor

    def rows(self, start: int, length: int) -> Shift:
        return dataclasses.replace(self, vector=self.vector[start : start + length])

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        return self.vector.reshape(-1, *(1 for _ in layer.kernel_size)) if isinstance(layer, CONVS) else self.vector
