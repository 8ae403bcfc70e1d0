"""base + Σ strength · ΔW, made in fp32 and rounded once. The one place where the sum is made: for weights and files.

The sum goes by tiles of rows that stay in the processor's cache: each byte of the base is read once, each byte of the
weight written once, and no ΔW of the weight's size is made. The low-rank patches of a weight become one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lib_locon.arithmetic import exact_arithmetic, for_later, matrix, working_dtype
from lib_locon.models.targets import View
from lib_locon.patching.memory import allocate
from lib_locon.patching.plan import Adder, LowRank, Patch
from lib_locon.patching.readback import ReadBack
from lib_locon.products import add_product, adds_products, product_adder, rows_of

TILE = 2 << 18
"""Numbers in a tile on the CPU: 2 MiB of fp32. Smaller tiles lose to overhead; of larger ones the cache does not hold
what two workers need at a time."""
PART = 2
"""Tiles of the base that are read from a file at a time."""

_HARMLESS = {torch.float16: 8.0, torch.bfloat16: 2.0**100, torch.float32: 2.0**100, torch.float64: 2.0**900}
"""A change that no number of the dtype can leave its range by: under half of the step between its largest numbers."""

_USUAL = 2.0**16
"""Of a strength: beyond it the products on the way may overflow, though their sum does not."""


def patched(base: Tensor, patches: Sequence[Patch], dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor | None]:
    """A new tensor with the sum, in `dtype` (that of `base` if None), and its extremes; `base` is not changed."""
    out = torch.empty(base.shape, dtype=dtype or base.dtype, device=base.device)
    with exact_sums(out.device.type):
        return out, write_sum(out, base, patches)


@contextmanager
def exact_sums(*devices: str) -> Iterator[None]:
    """What sums on these devices are made within. Once for many of them: for a small weight it takes longer than the
    sum does. Until it ends, products of the process's other threads are in full precision too."""
    with torch.no_grad(), exact_arithmetic(*devices):
        yield


class Workspace:
    """Buffers for the sums of one model, one after the other: memory taken anew for each would cost as much as they do.

    What was taken under a name is overwritten by the next that takes it.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        # glibc gives each large block back to the system at once, until it has seen one of the size freed, and what
        # lies free at the end of a heap from twice that size on: without this, every product of a tile would be made in
        # fresh pages, at three times its cost. It holds for the whole process. Not a page of this one is touched
        torch.empty(8 * TILE, dtype=torch.float32, device="cpu")  # freed here

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous tensor, numbers undefined."""
        size, key = prod(shape), (name, dtype, device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            if device.type == "cpu":
                # tiles differ a little from weight to weight: one buffer is to do for nearly all
                made = allocate((max(size, TILE) if 2 * size > TILE else size,), dtype)
            else:
                with for_later():  # for the weights of a change, of which some may be inference tensors
                    made = torch.empty(size, dtype=dtype, device=device)
            buffer = self._buffers[key] = made
        return buffer[:size].view(shape)


def write_sum(out: Tensor, base: Tensor, patches: Sequence[Patch], space: Workspace | None = None) -> Tensor | None:
    """out ← base + Σ strength · ΔW, within `exact_sums`. Both of one shape and on one device, with no memory in common.

    Every ΔW is taken from the pristine base, so that no adapter sees another's work. The order of `patches` is the
    order of the sum (`make_plan` fixes it). Returns the extremes of the sum before its rounding, for `overflows`: on
    the device, so that looking at those of a whole model waits for a GPU only once. None where the factors are too
    small for any overflow.
    """
    watch, space = _Watch(out, base, patches), space or Workspace()
    if not out.ndim or not all(_is_rows(patch.view) for patch in patches):
        _write_views(out, base, patches, watch)
    elif out.is_contiguous():
        _write_rows(out, base.contiguous(), patches, watch, space)
    else:  # channels_last: by the same steps, so to the same bits
        straight = space.take("whole", tuple(out.shape), out.dtype, out.device)
        _write_rows(straight, base.contiguous(), patches, watch, space)
        out.copy_(straight)
    return watch.extremes()


def only_product(out: Tensor, patches: Sequence[Patch], space: Workspace) -> tuple[Tensor, Tensor] | None:
    """Up and down in fp32, where the sum is the base and their product, no number can overflow, and torch makes it in
    one call: so that no more is needed of the base at a time than some rows."""
    if working_dtype(out) != torch.float32 or not adds_products() or _Watch(out, out, patches).needed:
        return None
    products = []
    for patch in patches:
        factors = patch.delta.low_rank(out.device) if patch.view == View(patch.view.path) else None
        if factors is None:
            return None
        products.append((factors, patch.strength))
    up, down = _side_by_side(products, out, space, 0)
    return (up, down) if (len(up), down.shape[1]) == matrix(out).shape else None


def write_from_file(out: Tensor, base: ReadBack, product: tuple[Tensor, Tensor] | None, space: Workspace) -> None:
    """out ← base (+ up · down), with a base that is read by rows: it never leaves the processor's cache.

    As `write_sum`; `out` is contiguous, on the CPU, and has the dtype of the base. Raises BaseLost.
    """
    target = matrix(out)
    step = PART * rows_of(TILE, target.shape[1])
    for start in range(0, len(target), step):
        rows = target[start : start + step]
        pristine = base.read_rows(start, space.take("pristine", tuple(rows.shape), rows.dtype, rows.device))
        if product is None:
            rows.copy_(pristine)
        else:
            up, down = product
            left = up[start : start + len(rows)]
            if not add_product(rows, pristine, left, down, TILE):  # a profiler came meanwhile
                rows.copy_(torch.addmm(pristine.float(), left, down))


def overflows(extremes: Tensor, dtype: torch.dtype) -> bool:
    """Whether a sum with these extremes has numbers that `dtype` cannot hold, or NaN. Waits for the device."""
    return not bool((extremes.abs() <= torch.finfo(dtype).max).all())


def overflowing(noted: Mapping[str, tuple[Tensor, torch.dtype]]) -> list[str]:
    """Those of many sums, by name with their extremes and dtypes, that overflow. Waits once for each dtype and device,
    where all is well: a model may be on several."""
    alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    for name, (extremes, dtype) in noted.items():
        alike.setdefault((dtype, extremes.device), []).append(name)
    bad: list[str] = []
    for (dtype, _), names in alike.items():
        if overflows(torch.cat([noted[name][0] for name in names]), dtype):
            bad += [name for name in names if overflows(noted[name][0], dtype)]
    return bad


class _Watch:
    """Notes the extremes of a sum, tile by tile, where they are needed: to look costs a third of the sum itself."""

    def __init__(self, out: Tensor, base: Tensor, patches: Sequence[Patch]) -> None:
        most = sum(abs(patch.strength) * patch.delta.bound() for patch in patches)
        usual = most < _HARMLESS.get(out.dtype, 0.0) and all(abs(patch.strength) <= _USUAL for patch in patches)
        self.needed = base.dtype != out.dtype or not usual
        self._seen: list[Tensor] = []

    def look(self, tile: Tensor) -> None:
        """At a part of the sum, in the working dtype."""
        if self.needed:
            self._seen += torch.aminmax(tile)  # NaN where there is one

    def extremes(self) -> Tensor | None:
        """The least and the largest numbers; None where nothing needed to be looked at."""
        return torch.stack(self._seen) if self._seen else None


def _is_rows(view: View) -> bool:
    return not view.transposed and (view.length < 0 or view.axis == 0)


def _write_views(out: Tensor, base: Tensor, patches: Sequence[Patch], watch: _Watch) -> None:
    """For the few parts that are no rows (a transposed projection, some input channels): whole, not by tiles."""
    pristine = base.to(working_dtype(base))
    total = pristine.clone(memory_format=torch.contiguous_format)
    for patch in patches:
        part, source = patch.view.of(total), patch.view.of(pristine).contiguous()
        rows = matrix(source)
        change = torch.zeros_like(rows)
        patch.delta.adder(source)(change, change, rows, 0, patch.strength)
        part.add_(change.view(source.shape))
    watch.look(total)
    out.copy_(total)


def _write_rows(out: Tensor, base: Tensor, patches: Sequence[Patch], watch: _Watch, space: Workspace) -> None:
    target, source, work = matrix(out), matrix(base), working_dtype(base)
    rows, columns = target.shape
    ranges = list(_ranges(base, patches, space))
    whole = ranges[0] if len(ranges) == 1 and ranges[0].covers(rows) else None  # as nearly always
    step = rows_of(TILE, columns) if out.device.type == "cpu" else max(1, rows)
    if whole is not None and whole.product is not None and not watch.needed:
        up, down = whole.product
        if add_product(target, source, up, down, TILE):
            return
    scratch = None if out.dtype == work else space.take("tile", (min(step, rows), columns), work, out.device)
    start = 0
    for part, pristine in zip(torch.split(target, step), torch.split(source, step), strict=True):
        tile = part if scratch is None else scratch[: len(part)]
        if whole is not None:  # no copy that only the sum reads
            whole.write(tile, pristine, start)
        else:
            tile.copy_(pristine)
            for some in ranges:
                some.add(tile, pristine, start)
        watch.look(tile)  # while it is in the cache
        if scratch is not None:
            part.copy_(tile)
        start += len(part)


@dataclass
class _Range:
    """Rows `start` to `stop` of a weight, and what is added to them."""

    start: int
    stop: int
    adders: list[tuple[Adder, float]]
    product: tuple[Tensor, Tensor] | None
    """Up and down, where their product is all that is added; the strengths are in it."""

    def covers(self, rows: int) -> bool:
        """Whether these are all rows of the weight."""
        return self.start == 0 and self.stop == rows

    def add(self, tile: Tensor, base: Tensor, start: int) -> None:
        """Adds what lies in the tile, whose rows begin with the weight's row `start`."""
        low, high = max(start, self.start) - start, min(start + len(tile), self.stop) - start
        if low < high:
            total, pristine = tile[low:high], base[low:high]
            self._add(total, total, pristine, pristine, start + low - self.start)

    def write(self, tile: Tensor, base: Tensor, start: int) -> None:
        """tile ← base + all changes, from row `start` on."""
        pristine = base if base.dtype == tile.dtype else tile.copy_(base)
        self._add(tile, pristine, pristine, base, start)

    def _add(self, total: Tensor, augend: Tensor, pristine: Tensor, base: Tensor, start: int) -> None:
        # `pristine`: `base`, or the same in the working dtype where `total` will be: until that is written
        for adder, strength in self.adders:
            adder(total, augend, pristine, start, strength)
            augend, pristine = total, base


def _ranges(base: Tensor, patches: Sequence[Patch], space: Workspace) -> Iterator[_Range]:
    """The patches by the rows that they change; the low-rank ones of equal rows side by side in one product."""
    views: dict[View, list[Patch]] = {}
    for patch in patches:
        views.setdefault(patch.view, []).append(patch)
    for number, (view, group) in enumerate(views.items()):
        part = view.of(base)
        products, adders = [], []
        for patch in group:
            factors = patch.delta.low_rank(base.device)
            if factors is None:
                adders.append((patch.delta.adder(part), patch.strength))
            else:
                products.append((factors, patch.strength))
        product = _side_by_side(products, base, space, number) if products else None
        only = None if adders else product
        if product is not None:
            adders.insert(0, (_product_adder(*product), 1.0))
        first = view.start if view.length >= 0 else 0
        yield _Range(first, first + part.shape[0], adders, only)


def _product_adder(up: Tensor, down: Tensor) -> Adder:
    """Adds up · down; the strengths are in it."""
    add = product_adder(down)
    return lambda total, augend, base, start, strength: add(total, augend, up[start : start + len(total)])


def _side_by_side(
    products: Sequence[tuple[LowRank, float]], base: Tensor, space: Workspace, number: int
) -> tuple[Tensor, Tensor]:
    """One (out, Σ r) and one (Σ r, n) whose product is Σ strength · ΔW."""
    rank = sum(up.shape[1] for (up, _, _), _ in products)
    (first, second, _), _ = products[0]
    work, device = working_dtype(base), base.device
    ups = space.take(f"up {number}", (first.shape[0], rank), work, device)
    downs = space.take(f"down {number}", (rank, second.shape[1]), work, device)
    start = 0
    for (up, down, scale), strength in products:
        stop = start + up.shape[1]
        ups[:, start:stop].copy_(up).mul_(strength * scale)
        downs[start:stop].copy_(down)
        start = stop
    return ups, downs
