"""What is to be done to a model, as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from lib_locon.errors import PatchError
from lib_locon.models.targets import View

Adder: TypeAlias = Callable[[Tensor, Tensor, Tensor, int, float], None]
"""(total, augend, base, start, strength): total ← augend + strength · ΔW, some rows of the sum from row `start` on, as
matrices in fp32 (or fp64). `augend` is `total` itself, or shares no memory with it; `base` are the same rows of the
pristine weight in their own dtype or that of `total`, and may be `total` itself: to be read before that is written."""

LowRank: TypeAlias = tuple[Tensor, Tensor, float]
"""`(up, down, scale)`: ΔW = scale · up · down as matrices, `(out, r)` and `(r, n)`, in whatever dtypes are at hand."""


class Delta(Protocol):
    """Whatever knows a ΔW."""

    def adder(self, base: Tensor) -> Adder:
        """What adds it by rows. `base` is the whole pristine weight that ΔW is for, in its own shape and dtype."""
        ...

    def low_rank(self, device: torch.device) -> LowRank | None:
        """ΔW as a product of two matrices, `device` being where it will be needed; None where it is none."""
        ...

    def unscaled(self, weight: Tensor) -> tuple[Tensor, float] | None:
        """(D, scale), ΔW = scale · D for a weight that holds `weight`: D whole, rounded in the dtypes of its factors.

        None where ΔW is to be had by rows only.
        """
        ...

    def bound(self) -> float:
        """What no number of ΔW at strength 1 exceeds in size; infinite where that cannot be told without making ΔW, or
        where a number on the way to it may overflow in fp32."""
        ...


class Patch(NamedTuple):
    """strength · ΔW on a part of one parameter. `source` says where `delta` comes from: equal sources, equal ΔW."""

    source: str
    view: View
    strength: float
    delta: Delta

    @property
    def key(self) -> tuple[str, View, float]:
        """Equal keys change a weight equally."""
        return self.source, self.view, self.strength


def _sum(strengths: Iterable[float]) -> float:
    try:
        strength = math.fsum(strengths)
    except OverflowError:
        strength = math.inf
    if not abs(strength) <= torch.finfo(torch.float32).max:
        raise PatchError("the strengths of one adapter come to no number that fp32 holds; nothing was changed")
    return strength


Plan: TypeAlias = Mapping[str, tuple[Patch, ...]]
"""Parameter path → its patches, in an order that does not depend on the order of the tags unless that is wanted."""


def make_plan(patches: Iterable[Patch], *, as_given: bool = False) -> Plan:
    """Groups by parameter, adds up the strengths of equal sources, drops what comes to 0, and sorts.

    Floating-point sums depend on their order, so the order is fixed here, by source and view; `fsum` rounds once, so
    that three equal sources give the same strength in any order too. `as_given` leaves the patches in their order, each
    where its source came first. Raises PatchError for one that is not finite.
    """
    strengths: dict[tuple[str, View], list[float]] = {}
    deltas: dict[tuple[str, View], Delta] = {}
    for patch in patches:
        strengths.setdefault((patch.source, patch.view), []).append(patch.strength)
        deltas.setdefault((patch.source, patch.view), patch.delta)
    plan: dict[str, tuple[Patch, ...]] = {}
    for (source, view), parts in strengths.items() if as_given else sorted(strengths.items()):
        strength = _sum(parts)
        if strength:
            patch = Patch(source, view, strength, deltas[source, view])
            plan[view.path] = (*plan.get(view.path, ()), patch)
    return plan
