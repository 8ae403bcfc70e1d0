"""Whether merged weights are right, and whether the base came back: against sums in fp64, and bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

ROUNDINGS = 4.0
"""The largest error of a merge that agrees, in machine epsilons of the dtype times the weight's largest value. One
rounding is half of one; a ΔW that is rounded, scaled and rounded again before it is added comes to two."""
STRENGTH = 1e-3
"""How far the strength that the weights show may be from the one asked for."""
_BLOCK = 1 << 17  # elements at a time: the sums in fp64 stay in the cache, and small beside the model
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Factors:
    """A LoCon layer as its file has it: ΔW = scale · up · down."""

    up: Tensor
    down: Tensor
    scale: float

    def delta(self, rows: slice) -> Tensor:
        """These rows of ΔW, as a matrix in fp64."""
        up, down = self.up.flatten(1)[rows].double(), self.down.flatten(1).double()
        return (up @ down) * self.scale

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
        """Module as kohya names it → its factors, of all tensors of a file."""
        modules = sorted({name.partition(".")[0] for name in tensors})
        return {module: cls._of(tensors, module) for module in modules}

    @classmethod
    def _of(cls, tensors: Mapping[str, Tensor], module: str) -> Factors:
        up, down = (tensors[f"{module}.lora_{side}.weight"] for side in ("up", "down"))
        return cls(up, down, float(tensors[f"{module}.alpha"]) / down.shape[0])


@dataclass(frozen=True)
class Agreement:
    """`error` is in machine epsilons times the largest value of a weight; `strength` is what the weights show."""

    error: float
    strength: float
    agrees: bool

    as_json = asdict


def agreement(
    weights: Mapping[str, Tensor], bases: Mapping[str, Tensor], factors: Mapping[str, Factors], strength: float
) -> Agreement:
    """Compares every weight with base + strength · ΔW in fp64.

    The strength that the weights show is the least-squares one over all of them: roundings cancel out in it, so that a
    wrong scale is seen in half precision too, where one element cannot tell it from a rounding.
    """
    worst, along, square = 0.0, 0.0, 0.0
    for name, weight in weights.items():
        error, largest = 0.0, 0.0
        for rows in _blocks(weight):
            base, now = (tensor.flatten(1)[rows].double() for tensor in (bases[name], weight))
            delta = factors[name].delta(rows)
            change = now - base
            along += float(torch.dot(change.flatten(), delta.flatten()))
            square += float(torch.dot(delta.flatten(), delta.flatten()))
            error = _largest(error, change.sub_(delta, alpha=strength))
            largest = _largest(largest, base.add_(delta, alpha=strength))
        worst = max(worst, error / (largest * torch.finfo(weight.dtype).eps))
    found = along / square
    return Agreement(worst, found, worst <= ROUNDINGS and abs(found - strength) <= STRENGTH)


def difference(weights: Mapping[str, Tensor], bases: Mapping[str, Tensor]) -> tuple[float, float]:
    """The share of elements whose bits differ, and the largest difference of values."""
    differing, total, largest = 0, 0, 0.0
    for name, weight in weights.items():
        for rows in _blocks(weight):
            now, base = (tensor.flatten(1)[rows] for tensor in (weight, bases[name]))
            bits = _BITS[now.element_size()]
            differing += int((now.view(bits) != base.view(bits)).sum())
            largest = _largest(largest, now.double() - base.double())
        total += weight.numel()
    return differing / total, largest


def _blocks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _BLOCK // max(1, weight[0].numel()))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def _largest(so_far: float, values: Tensor) -> float:
    """NaN counts as infinite: it must never pass for agreement."""
    low, high = (float(value) for value in values.aminmax())
    return math.inf if math.isnan(low) else max(so_far, -low, high)
