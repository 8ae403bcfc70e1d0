"""Where a ΔW goes: a weight, or a part of one, or several parts one below the other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class View(NamedTuple):
    """A parameter of the model by its dotted path, or a part of it. Comparable, and sorted in a fixed order.

    `axis`, `start`, `length` narrow it (q, k or v inside a fused projection; the first input channels of a wider
    convolution); `transposed` turns a matrix that the model holds the other way round.
    """

    path: str
    axis: int = 0
    start: int = 0
    length: int = -1
    transposed: bool = False

    def of(self, tensor: Tensor) -> Tensor:
        """This part of `tensor`, sharing its memory; `tensor` has the whole parameter's shape."""
        part = tensor if self.length < 0 else tensor.narrow(self.axis, self.start, self.length)
        return part.mT if self.transposed else part

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of `of` for a parameter of the shape `whole`."""
        shape = list(whole)
        if self.length >= 0:
            shape[self.axis] = self.length
        return (*shape[:-2], shape[-1], shape[-2]) if self.transposed else tuple(shape)


@dataclass(frozen=True)
class Target:
    """A module of the model as adapters see it: its component and its parameters ("weight", "bias").

    Each parameter is one view, or several whose rows stand one below the other in the adapter's weight: an adapter on
    a fused projection meets a model that holds q, k and v apart.
    """

    component: str
    name: str
    """The module's own dotted name in the model."""
    views: Mapping[str, tuple[View, ...]]
