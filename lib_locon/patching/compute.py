"""base + Σ strength · ΔW, made in fp32 and rounded once. The one place where the sum is made: for weights and files.

The sum goes by tiles of rows that stay in the processor's cache: each byte of the base is read once, each byte of the
weight written once, and no ΔW of the weight's size is made. The low-rank patches of a weight become one product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lib_locon.arithmetic import exact_arithmetic, matrix, working_dtype
from lib_locon.models.targets import View
from lib_locon.patching.half_products import adds_in_half
from lib_locon.patching.overflow import Watch
from lib_locon.patching.plan import Adder, LowRank, Patch
from lib_locon.patching.readback import ReadBack
from lib_locon.patching.workspace import TILE, Workspace
from lib_locon.products import add_product, adds_products, product_adder, rows_of

PART = 2
"""Tiles of the base that are read from a file at a time."""


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


def write_sum(out: Tensor, base: Tensor, patches: Sequence[Patch], space: Workspace | None = None) -> Tensor | None:
    """out ← base + Σ strength · ΔW, within `exact_sums`. Both of one shape and on one device, with no memory in common.

    Every ΔW is taken from the pristine base, so that no adapter sees another's work. The order of `patches` is the
    order of the sum (`make_plan` fixes it). Returns the extremes of the sum before its rounding, for `overflows`: on
    the device, so that looking at those of a whole model waits for a GPU only once. None where the factors are too
    small for any overflow.
    """
    watch, space = Watch(out, base, patches), space or Workspace()
    if not out.ndim or not all(_is_rows(patch.view) for patch in patches):
        _write_views(out, base, patches, watch)
        return watch.extremes()
    # channels_last: by the same steps, so to the same bits
    straight = out if out.is_contiguous() else space.take("whole", tuple(out.shape), out.dtype, out.device)
    pristine = base.contiguous()
    factors = [patch.delta.low_rank(out.device) for patch in patches]
    if watch.needed or not _write_product(straight, pristine, patches, factors, space):
        _write_rows(straight, pristine, patches, factors, watch, space)
    if straight is not out:
        out.copy_(straight)
    return watch.extremes()


def only_product(out: Tensor, patches: Sequence[Patch], space: Workspace) -> tuple[Tensor, Tensor] | None:
    """Up and down in fp32, where the sum is the base and their product, no number can overflow, and torch makes it in
    one call: so that no more is needed of the base at a time than some rows."""
    if not _adds_products_to(out) or Watch(out, out, patches).needed:
        return None
    factors = []
    for patch in patches:
        factors.append(patch.delta.low_rank(out.device))
        if factors[-1] is None:
            return None
    return _product(out, patches, factors, space)


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


def _is_rows(view: View) -> bool:
    return not view.transposed and (view.length < 0 or view.axis == 0)


def _is_whole(view: View) -> bool:
    return not view.transposed and view.length < 0


def _write_views(out: Tensor, base: Tensor, patches: Sequence[Patch], watch: Watch) -> None:
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


def _adds_products_to(out: Tensor) -> bool:
    return working_dtype(out) == torch.float32 and adds_products()


def _product(
    out: Tensor, patches: Sequence[Patch], factors: Sequence[LowRank | None], space: Workspace
) -> tuple[Tensor, Tensor] | None:
    """Up and down in the working dtype, where all that is added to a weight is their product; strengths in it."""
    products = [
        (found, patch.strength)
        for patch, found in zip(patches, factors, strict=True)
        if found is not None and _is_whole(patch.view)
    ]
    if len(products) < len(patches) or not products:
        return None
    up, down = _side_by_side(products, out, space, 0)
    return (up, down) if (up.shape[0], down.shape[1]) == matrix(out).shape else None


def _write_product(
    out: Tensor, base: Tensor, patches: Sequence[Patch], factors: Sequence[LowRank | None], space: Workspace
) -> bool:
    """As `_write_rows` does, in a few calls of torch for a whole weight, and without a look at the sums. False, and
    nothing is written, where that cannot be."""
    target, source, work = matrix(out), matrix(base), working_dtype(out)
    if out.is_cpu:
        product = _product(out, patches, factors, space) if _adds_products_to(out) else None
        return product is not None and add_product(target, source, *product, TILE)
    scaled = _scaled_product(out, patches, factors, space)
    if scaled is None:
        return False
    up, down, scale = scaled
    if adds_in_half(target, source, up, down):
        torch.addmm(source, up, down, alpha=scale, out=target)
        return True
    total = target
    if out.dtype != work:
        total = space.take("tile", tuple(target.shape), work, out.device)
        source = total.copy_(source)
    torch.addmm(source, up.to(work), down.to(work), alpha=scale, out=total)
    if total is not target:
        target.copy_(total)
    return True


def _scaled_product(
    out: Tensor, patches: Sequence[Patch], factors: Sequence[LowRank | None], space: Workspace
) -> LowRank | None:
    """As `_product`; a single one as it is stored: its strength is for the sum to multiply by."""
    if len(patches) != 1 or factors[0] is None or not _is_whole(patches[0].view):
        product = _product(out, patches, factors, space)
        return None if product is None else (*product, 1.0)
    up, down, scale = factors[0]
    return (up, down, patches[0].strength * scale) if (up.shape[0], down.shape[1]) == matrix(out).shape else None


def _write_rows(
    out: Tensor,
    base: Tensor,
    patches: Sequence[Patch],
    factors: Sequence[LowRank | None],
    watch: Watch,
    space: Workspace,
) -> None:
    target, source, work = matrix(out), matrix(base), working_dtype(base)
    rows, columns = target.shape
    ranges = list(_ranges(base, patches, factors, space))
    whole = ranges[0] if len(ranges) == 1 and ranges[0].covers(rows) else None  # as nearly always
    step = rows_of(TILE, columns) if out.is_cpu else max(1, rows)
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


def _ranges(
    base: Tensor, patches: Sequence[Patch], factors: Sequence[LowRank | None], space: Workspace
) -> Iterator[_Range]:
    """The patches by the rows that they change; the low-rank ones of equal rows side by side in one product."""
    views: dict[View, list[tuple[Patch, LowRank | None]]] = {}
    for patch, found in zip(patches, factors, strict=True):
        views.setdefault(patch.view, []).append((patch, found))
    for number, (view, group) in enumerate(views.items()):
        part = view.of(base)
        products = [(found, patch.strength) for patch, found in group if found is not None]
        adders = [(patch.delta.adder(part), patch.strength) for patch, found in group if found is None]
        if products:
            adders.insert(0, (_product_adder(*_side_by_side(products, base, space, number)), 1.0))
        first = view.start if view.length >= 0 else 0
        yield _Range(first, first + part.shape[0], adders)


def _product_adder(up: Tensor, down: Tensor) -> Adder:
    """Adds up · down; the strengths are in it."""
    add = product_adder(down)

    def add_rows(total: Tensor, augend: Tensor, base: Tensor, start: int, strength: float) -> None:
        del base, strength
        add(augend, up[start : start + len(total)], total)

    return add_rows


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
        left, right = (ups, downs) if len(products) == 1 else (ups[:, start:stop], downs[start:stop])
        left.copy_(up).mul_(strength * scale)
        right.copy_(down)
        start = stop
    return ups, downs
