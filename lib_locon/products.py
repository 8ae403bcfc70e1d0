"""Products of fp32 matrices on the CPU, and base + product: by the fastest that torch brings, to the same bits."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Callable
from functools import cache
from typing import List, Optional, Union  # noqa: UP035  in TorchScript

import torch
from torch import Tensor

_COMPILING = threading.Lock()
"""Filters of warnings are those of the process: one thread of ours changes them at a time."""
_EVEN = 16
"""MKL sums each number of a product in the order of its terms, as oneDNN does, where rows and columns are multiples of
this; by other kernels elsewhere."""
_DEEPEST = 192
"""Terms that MKL sums before it adds them to what is there."""
_WIDEST = 3072
"""Columns of a tile for MKL, which orders the right factor anew for each tile: many rows of few columns are best."""


def multiplier(right: Tensor) -> Callable[[Tensor], Tensor]:
    """left ↦ left · right, (m, k) and (k, n) of one dtype, a new tensor; fp32 rounds no factor.

    For several `left`: what `right` needs is done once.
    """
    by_onednn = _onednn() if _is_plain(right) else None
    if by_onednn is None:
        return lambda left: left @ right
    # it takes the transpose of a contiguous matrix as it is; another it would put in order first, at great cost
    transposed = right.contiguous().t()

    def multiply(left: Tensor) -> Tensor:
        # oneDNN's would lose the gradients of factors that are being trained
        trained = torch.is_grad_enabled() and (left.requires_grad or right.requires_grad)
        if trained or _suits_mkl(left, right):
            return left @ right
        return by_onednn(left.contiguous(), transposed)

    return multiply


def product_adder(right: Tensor) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """(base, left, out) ↦ base + left · right, all of one dtype: in `out`, which may be `base`, or a new tensor.

    For several `left`, as `multiplier`.
    """
    multiply = multiplier(right) if _is_plain(right) else None

    def add(base: Tensor, left: Tensor, out: Tensor | None) -> Tensor:
        if multiply is None or _suits_mkl(left, right):
            return torch.addmm(base, left, right) if out is None else torch.addmm(base, left, right, out=out)
        # into the product, which is a new tensor and still in the cache
        return multiply(left).add_(base) if out is None else torch.add(base, multiply(left), out=out)

    return add


def add_product(out: Tensor, base: Tensor, left: Tensor, right: Tensor, numbers: int) -> bool:
    """out ← base + left · right, so many `numbers` at a time: summed in fp32, and rounded to the dtype of `out` once.

    Factors in fp32, (m, k) and (k, n); `out` and `base` (m, n), contiguous and apart; within `torch.no_grad()`. All is
    one call of torch, which needs nothing of Python in between: so threads that do this do not wait for each other.
    False, and nothing is written, where torch has no such call, where Python code sees each operation, or where these
    do not fit. Raises RuntimeError as torch's operations do (no memory).
    """
    fits = out.shape == base.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    add = _by_tiles()
    if not fits or not _is_plain(right) or out.device != right.device or add is None or not adds_products():
        return False
    even, width = _even(right), right.shape[1]
    if even:
        width = -(-width // (-(-width // _WIDEST) * even)) * even  # as few panels as may be, all of nearly one width
    try:
        add(out, base, left.contiguous(), right.contiguous(), rows_of(numbers, width), width, even)
    except RuntimeError as error:  # TorchScript tells its own steps first
        raise RuntimeError(str(error).rpartition("\nRuntimeError: ")[2].strip()) from error
    return True


def rows_of(numbers: int, columns: int) -> int:
    """As many rows as have no more `numbers` than that, and as products are made of fastest; at least one."""
    rows = max(1, numbers // max(1, columns))
    return rows - rows % _EVEN if rows > _EVEN and _mkl_is_as_good() else rows


def adds_products() -> bool:
    """Whether `add_product` can do anything here and now."""
    return _onednn() is not None and _by_tiles() is not None and not _is_watched()


def _add_by_tiles(out: Tensor, base: Tensor, left: Tensor, right: Tensor, rows: int, width: int, even: int) -> None:
    # compiled as TorchScript: there is no other way yet to keep a loop out of Python. Its `zip` stops at the shortest,
    # whatever is said here; and torch 2.1 knows types by their old names only
    none: List[Optional[Union[int, float, complex]]] = []  # noqa: UP006, UP007, UP045
    rounds = out.dtype != right.dtype
    space = torch.empty([rows * width if rounds and even > 0 else 0], dtype=right.dtype, device=right.device)
    panels = zip(torch.split(out, width, 1), torch.split(base, width, 1), torch.split(right, width, 1), strict=True)
    for panel, source, some in panels:
        fits = even > 0 and panel.shape[1] % even == 0
        factor = some if fits and len(left) % even == 0 else some.contiguous()
        transposed = factor.t()
        tiles = zip(torch.split(panel, rows), torch.split(source, rows), torch.split(left, rows), strict=True)
        for tile, pristine, ups in tiles:
            total = tile
            if fits and len(tile) % even == 0:
                if rounds:
                    total = space[: tile.numel()].view(tile.shape[0], tile.shape[1])
                    pristine = total.copy_(pristine)
                torch.addmm(pristine, ups, factor, out=total)
            else:
                total = torch.ops.mkldnn._linear_pointwise(ups, transposed, None, "none", none, "")
                total = total.add_(pristine) if rounds else torch.add(pristine, total, out=tile)
            if rounds:
                tile.copy_(total)


def _suits_mkl(left: Tensor, right: Tensor) -> bool:
    """Whether MKL gives the bits of oneDNN for all of left · right, faster."""
    even = _even(right)
    return even > 0 and len(left) % even == 0 and right.shape[1] % even == 0


def _even(right: Tensor) -> int:
    """Of what MKL wants rows and columns to be multiples to give the bits of oneDNN, faster; 0 where it does not."""
    return _EVEN if right.shape[0] <= _DEEPEST and _mkl_is_as_good() else 0


def _is_watched() -> bool:
    """Whether Python code sees each operation (a profiler's, as torch's FlopCounterMode): what it raises, an interrupt
    too, would come out of TorchScript as another error."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _is_plain(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and factor.device.type == "cpu"


@cache
def _onednn() -> Callable[[Tensor, Tensor], Tensor] | None:
    """(left, rightᵀ) ↦ left · right, of contiguous ones, by oneDNN, which torch brings beside MKL; None where it has
    none, or it is wrong.

    On AMD's processors with AVX-512 MKL's fp32 product has half the speed. torch takes oneDNN's for half precision
    only, and the operator is not among its documented ones: so it is tried on a small product first, and done without
    on any doubt.
    """
    try:
        operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default

        def multiply(left: Tensor, transposed: Tensor) -> Tensor:
            return operator(left, transposed, None, "none", [], "")

        some = _numbers()
        left, right = some(33, 24), some(24, 65)
        return multiply if torch.allclose(multiply(left, right.t()), left @ right, rtol=1e-5, atol=1e-5) else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None


@cache
def _mkl_is_as_good() -> bool:
    """Whether MKL adds a product to a base faster than oneDNN makes it, as where the processor has AVX2 and no more.

    To the same bits, or it is done without: an image must not depend on which of them a weight's shape suits. Nor on
    the shape of a tile, as with older versions of oneDNN (torch 2.1): there the tiles stay as they are for it alone.
    """
    by_onednn = _onednn()
    if by_onednn is None or torch.backends.cpu.get_cpu_capability() != "AVX2" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    some = _numbers()
    for m, k, n in ((3 * _EVEN, 8, 20 * _EVEN), (4 * _EVEN, _DEEPEST, 40 * _EVEN), (77, 96, 1283)):
        base, left, right = some(m, n), some(m, k), some(k, n)
        whole = by_onednn(left, right.t())
        if not m % _EVEN and not torch.equal(torch.addmm(base, left, right), base + whole):
            return False
        for rows, columns in itertools.product((slice(1), slice(3, 33)), (slice(None), slice(16, 64), slice(5, 60))):
            part = by_onednn(left[rows].clone(), right[:, columns].contiguous().t())
            if not torch.equal(part, whole[rows, columns]):
                return False
    return True


def _numbers() -> Callable[..., Tensor]:
    """shape ↦ random numbers in fp32 on the CPU, whatever else the host may have set; the same ones each time."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


@cache
def _by_tiles() -> Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], None] | None:
    """`_add_by_tiles` without Python; None where torch cannot compile it (any more: TorchScript is deprecated)."""
    try:
        with _COMPILING, warnings.catch_warnings():
            # this one only: another thread that notes the filters now puts them back later
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            compiled: Callable[[Tensor, Tensor, Tensor, Tensor, int, int, int], None] = torch.jit.script(_add_by_tiles)
    except Exception:  # noqa: BLE001  whatever it is: the same sum is made without
        return None
    return compiled
