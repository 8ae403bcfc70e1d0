"""base + Σ strength · ΔW, made in fp32 and rounded once. The one place where the sum is made: for weights and files.

The sum goes by tiles of rows that stay in the processor's cache: each byte of the base is read once, each byte of the
weight written once, and no ΔW of the weight's size is made. The low-rank patches of a weight become one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.models.targets import View
from lib_locon.patching.plan import Adder, Patch
from lib_locon.patching.precision import exact_arithmetic

TILE = 3 << 18
"""Numbers in a tile on the CPU: 3 MiB of fp32. Smaller tiles lose to overhead, larger ones leave the cache."""


def patched(base: Tensor, patches: Sequence[Patch], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """A new tensor with the sum, in `dtype` (that of `base` if None), and its extremes; `base` is not changed."""
    out = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    return out, write_sum(out, base, patches)


def write_sum(out: Tensor, base: Tensor, patches: Sequence[Patch]) -> Tensor:
    """out ← base + Σ strength · ΔW. Both of one shape and on one device; `base` shares no memory with `out`.

    Every ΔW is taken from the pristine base, so that no adapter sees another's work. The order of `patches` is the
    order of the sum (`make_plan` fixes it). Returns the extremes of the sum before its rounding, for `overflows`: on
    the device, so that looking at those of a whole model waits for a GPU only once.
    """
    with torch.no_grad(), exact_arithmetic(out.device.type):
        if out.ndim and out.is_contiguous() and all(_is_rows(patch.view) for patch in patches):
            return _write_rows(out, base.contiguous(), patches)
        return _write_views(out, base, patches)


def overflows(extremes: Tensor, dtype: torch.dtype) -> bool:
    """Whether a sum with these extremes has numbers that `dtype` cannot hold, or NaN. Waits for the device."""
    return not bool((extremes.abs() <= torch.finfo(dtype).max).all())


def _extremes(tile: Tensor) -> Tensor:
    """(2,): the least and the largest number; NaN where there is one."""
    least, largest = torch.aminmax(tile)
    return torch.stack((least, largest))


def _is_rows(view: View) -> bool:
    return not view.transposed and (view.length < 0 or view.axis == 0)


def _write_views(out: Tensor, base: Tensor, patches: Sequence[Patch]) -> Tensor:
    """For the few parts that are no rows (a transposed projection, some input channels): whole, not by tiles."""
    pristine = base.to(_working(base))
    total = pristine.clone(memory_format=torch.contiguous_format)
    for patch in patches:
        part, source = patch.view.of(total), patch.view.of(pristine).contiguous()
        change = torch.zeros_like(source)
        patch.delta.adder(source)(_matrix(change), _matrix(source), 0, patch.strength)
        part.add_(change)
    out.copy_(total)
    return _extremes(total)


@dataclass
class _Range:
    """Rows `start` to `stop` of a weight, and what is added to them."""

    start: int
    stop: int
    factors: tuple[Tensor, Tensor] | None
    adders: list[tuple[Adder, float]]


def _write_rows(out: Tensor, base: Tensor, patches: Sequence[Patch]) -> Tensor:
    target, source, work = _matrix(out), _matrix(base), _working(base)
    rows, columns = target.shape
    ranges = list(_ranges(base, patches, work))
    step = max(1, (TILE if out.device.type == "cpu" else rows * columns) // columns)
    scratch = None if out.dtype == work else torch.empty(min(step, rows), columns, dtype=work, device=out.device)
    extremes = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        tile = target[start:stop] if scratch is None else scratch[: stop - start]
        tile.copy_(source[start:stop])
        for part in ranges:
            _add_range(tile, source, start, stop, part)
        extremes.append(_extremes(tile))  # while it is in the cache
        if scratch is not None:
            target[start:stop].copy_(tile)
    return extremes[0] if len(extremes) == 1 else torch.cat(extremes)


def _add_range(tile: Tensor, source: Tensor, start: int, stop: int, part: _Range) -> None:
    """Adds the rows of `part` that lie in the tile (rows `start` to `stop`)."""
    low, high = max(start, part.start), min(stop, part.stop)
    if low >= high:
        return
    total = tile[low - start : high - start]
    if part.factors is not None:
        up, down = part.factors
        total.addmm_(up[low - part.start : high - part.start], down)
    for adder, strength in part.adders:
        adder(total, source[low:high], low - part.start, strength)


def _ranges(base: Tensor, patches: Sequence[Patch], work: torch.dtype) -> Iterator[_Range]:
    """The patches by the rows that they change; the low-rank ones of equal rows side by side in one product."""
    views: dict[View, list[Patch]] = {}
    for patch in patches:
        views.setdefault(patch.view, []).append(patch)
    for view, group in views.items():
        part = view.of(base)
        ups, downs, adders = [], [], []
        for patch in group:
            factors = patch.delta.low_rank(base.device)
            if factors is None:
                adders.append((patch.delta.adder(part), patch.strength))
            else:
                ups.append(factors[0].to(work) * patch.strength)
                downs.append(factors[1].to(work))
        first = view.start if view.length >= 0 else 0
        product = (torch.cat(ups, 1), torch.cat(downs)) if ups else None
        yield _Range(first, first + part.shape[0], product, adders)


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.view(tensor.shape[0], -1) if tensor.ndim > 1 else tensor.view(-1, 1)


def _working(base: Tensor) -> torch.dtype:
    """In which the sum is made: fp32, and fp64 for the rare weight that is stored so."""
    return torch.float64 if base.dtype == torch.float64 else torch.float32
