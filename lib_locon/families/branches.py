"""A ΔW as a branch beside its layer, y + strength · B(A x), for weights that cannot hold the sum.

A branch is the family's ΔW left in pieces and run over the layer's input: nothing of the weight's size is made (LoHa, a
product of elements, is made in tiles). Which families have one is in `branch_of`; the others need the base weight.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lib_locon.arithmetic import matrix, peak
from lib_locon.families.convolve import CONVS, apply_pointwise, apply_weight, channel_axis, groups, per_group
from lib_locon.families.tucker import rebuild

B = TypeVar("B", bound="Branch")
TILE = 2**20
"""Numbers of ΔW that a dense branch makes at a time: 4 MiB in fp32."""
MOST_POWER = 126
"""Of 2, that a factor is multiplied by: fp32 holds it, and one over it."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Branch:
    """Tensors and a number, `scale`, that together are ΔW at strength 1."""

    scale: float = 1.0
    powers: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """By tensor: the power of 2 that `to` multiplies it by, and the scale by one over it."""

    def sized(self: B) -> B:
        """The same with its `powers` chosen; looks at every number of the factors."""
        # fp16 ends at 65504: however a file shares ΔW's size out among its factors, each of them is to hand on numbers
        # about as large as it is given. What they are worth is in the scale, for the finished change. Powers of 2 are
        # exact
        powers = {name: _power(tensor, self._summed(name, tensor)) for name, tensor in self._tensors()}
        return dataclasses.replace(self, powers=powers)

    def to(self: B, device: torch.device, dtype: torch.dtype) -> B:
        """Ready for inputs of this kind: every factor multiplied by its power, in fp32, and rounded once.

        The first takes the scale's digits too: of that a power of 2 is left, which no dtype of the layer's rounds.
        """
        wide = torch.promote_types(dtype, torch.float32)
        digits = math.frexp(self.scale)[0] or 1.0
        moved: dict[str, Tensor] = {}
        for name, tensor in self._tensors():
            factor = 2.0 ** self.powers.get(name, 0) * (1.0 if moved else digits)
            moved[name] = (tensor.to(device).to(wide) * factor).to(dtype)
        scale = self.scale / digits * 2.0 ** -sum(self.powers.values())
        return dataclasses.replace(self, **moved, scale=scale, powers={})

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        return [tensor for _, tensor in self._tensors()]

    def with_tensors(self: B, tensors: Iterator[Tensor]) -> B:
        """The same of the next ones of these, in the order of `tensors()`."""
        others: dict[str, Any] = {name: next(tensors) for name, _ in self._tensors()}
        return dataclasses.replace(self, **others)

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        held = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return ((name, value) for name, value in held if isinstance(value, Tensor))

    def _summed(self, name: str, tensor: Tensor) -> int:
        """How many of its numbers, each times one of the input, come to one of the output."""
        del name
        return matrix(tensor).shape[1]

    def rows(self: B, start: int, length: int) -> B:
        """The branch of these rows of ΔW."""
        raise NotImplementedError

    def run(self, x: Tensor, layer: nn.Module) -> Tensor:
        """ΔW's part of the layer's output for `x`, without the scale, in the dtype of `x`; call `to` first."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """ΔW as a matrix (out, n), without the scale."""
        raise NotImplementedError


def _power(tensor: Tensor, summed: int) -> int:
    """Which brings its largest number to about one over the root of `summed`."""
    power = -math.frexp(peak(tensor))[1] - summed.bit_length() // 2
    return max(-MOST_POWER, min(MOST_POWER, power))


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

    def sized(self) -> Kronecker:
        return dataclasses.replace(super().sized(), second=self.second.sized())

    def to(self, device: torch.device, dtype: torch.dtype) -> Kronecker:
        moved, second = super().to(device, dtype), self.second.to(device, dtype)
        return dataclasses.replace(moved, second=second, scale=moved.scale * second.scale)

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
        return super().to(device, torch.promote_types(dtype, torch.float32))

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

    def _summed(self, name: str, tensor: Tensor) -> int:
        # the two products meet element by element: only one of them is to be as small as a weight
        return 1 if name == "b2" else super()._summed(name, tensor)

    def _columns(self) -> int:
        return self.b1.shape[1]

    def block(self, start: int, stop: int) -> Tensor:
        return (self.a1[start:stop] @ self.b1).mul_(self.a2[start:stop] @ self.b2)


@dataclass(frozen=True, eq=False, kw_only=True)
class Whole(Dense):
    """A matrix that is stored as it is."""

    weight: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Whole:
        return Branch.to(self, device, dtype)  # nothing is multiplied any more

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
