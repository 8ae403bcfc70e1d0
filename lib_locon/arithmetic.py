"""The arithmetic that all sums are made of: matrices, full fp32 products, and the dtype in which to work."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, List, Optional, Union  # noqa: UP035  in TorchScript

import torch
from torch import Tensor

_AUTOCAST = ("cpu", "cuda", "xpu")
"""Where torch 2.1 knows autocast; it refuses to be told of other devices, also to leave them alone."""
_COMPILING = threading.Lock()
"""Filters of warnings are those of the process: one thread of ours changes them at a time."""


def matrix(tensor: Tensor) -> Tensor:
    """`tensor` as `(first axis, all others)`; a view where the memory allows."""
    return tensor.reshape(tensor.shape[0], -1)


def peak(tensor: Tensor) -> float:
    """The size of its largest number; NaN where there is one, 0 where there is none to see (meta device)."""
    if tensor.is_meta or not tensor.numel():
        return 0.0
    # cast first: torch knows no minimum for fp8
    least, largest = torch.aminmax(tensor.detach().float())
    return float(torch.maximum(-least, largest))


def working_dtype(base: Tensor) -> torch.dtype:
    """In which a change of this weight is made and added: fp32, and fp64 for the rare weight that is stored so."""
    return torch.float64 if base.dtype == torch.float64 else torch.float32


def multiplier(right: Tensor) -> Callable[[Tensor], Tensor]:
    """left ↦ left · right, (m, k) and (k, n) of one dtype, a new tensor; fp32 rounds no factor.

    For several `left`: what `right` needs is done once.
    """
    operator = _onednn() if _is_plain(right) else None
    if operator is None:
        return lambda left: left @ right
    # it takes the transpose of a contiguous matrix as it is; another it would put in order first, at great cost
    transposed = right.contiguous().t()

    def multiply(left: Tensor) -> Tensor:
        # it would lose the gradients of factors that are being trained
        if torch.is_grad_enabled() and (left.requires_grad or right.requires_grad):
            return left @ right
        return operator(left.contiguous(), transposed, None, "none", [], "")

    return multiply


def product_adder(right: Tensor) -> Callable[[Tensor, Tensor, Tensor], None]:
    """(out, base, left): out ← base + left · right, all of one dtype; `base` may be `out`."""
    multiply = multiplier(right) if _is_plain(right) else None

    def add(out: Tensor, base: Tensor, left: Tensor) -> None:
        if multiply is None:
            torch.addmm(base, left, right, out=out)
        else:
            torch.add(base, multiply(left), out=out)

    return add


def add_product(out: Tensor, base: Tensor, left: Tensor, right: Tensor, rows: int) -> bool:
    """out ← base + left · right, by so many `rows` at a time: summed in fp32, and rounded to the dtype of `out` once.

    Factors in fp32, (m, k) and (k, n); `out` and `base` (m, n), contiguous and apart; within `torch.no_grad()`. All is
    one call of torch, which needs nothing of Python in between: so threads that do this do not wait for each other.
    False, and nothing is written, where torch has no such call, where Python code sees each operation, or where these
    do not fit. Raises RuntimeError as torch's operations do (no memory).
    """
    fits = out.shape == base.shape == (left.shape[0], right.shape[1]) and left.shape[1] == right.shape[0]
    add = _by_rows()
    if not fits or not _is_plain(right) or out.device != right.device or add is None or not adds_products():
        return False
    try:
        add(out, base, left.contiguous(), right.contiguous().t(), rows)
    except RuntimeError as error:  # TorchScript tells its own steps first
        raise RuntimeError(str(error).rpartition("\nRuntimeError: ")[2].strip()) from error
    return True


def adds_products() -> bool:
    """Whether `add_product` can do anything here and now."""
    return _onednn() is not None and _by_rows() is not None and not _is_watched()


def _add_by_rows(out: Tensor, base: Tensor, left: Tensor, transposed: Tensor, rows: int) -> None:
    # compiled as TorchScript: there is no other way yet to keep a loop out of Python. Its `zip` stops at the shortest,
    # whatever is said here; and torch 2.1 knows types by their old names only
    none: List[Optional[Union[int, float, complex]]] = []  # noqa: UP006, UP007, UP045
    parts = zip(torch.split(out, rows), torch.split(base, rows), torch.split(left, rows), strict=True)
    for part, pristine, some in parts:
        change = torch.ops.mkldnn._linear_pointwise(some, transposed, None, "none", none, "")
        if part.dtype == change.dtype:
            torch.add(pristine, change, out=part)
        else:
            change.add_(pristine)
            part.copy_(change)


def _is_watched() -> bool:
    """Whether Python code sees each operation (a profiler's, as torch's FlopCounterMode): what it raises, an interrupt
    too, would come out of TorchScript as another error."""
    return torch.utils._python_dispatch._get_current_dispatch_mode() is not None


def _is_plain(factor: Tensor) -> bool:
    return factor.dtype == torch.float32 and factor.device.type == "cpu"


@cache
def has_products(dtype: torch.dtype, device: str) -> bool:
    """Whether torch multiplies matrices of this dtype there. torch 2.1 does not in fp16 on the CPU."""
    try:
        one = torch.ones((1, 1), dtype=dtype, device=device)
        one @ one
    except RuntimeError:
        return False
    return True


def rounded_product(left: Tensor, right: Tensor) -> Tensor:
    """left · right, rounded to their one dtype; by torch's own kernel for it where there is one, else in fp32."""
    if has_products(left.dtype, left.device.type):
        return left @ right
    return (left.float() @ right.float()).to(left.dtype)


def add_scaled(total: Tensor, augend: Tensor, change: Tensor, strength: float) -> None:
    """total ← augend + strength · change, in one pass; `augend` is `total` itself, or shares no memory with it."""
    if augend is total:  # so that it can be trained through
        total.add_(change, alpha=strength)
    else:
        torch.add(augend, change, alpha=strength, out=total)


def add_scaled_product(total: Tensor, augend: Tensor, one: Tensor, other: Tensor, strength: float) -> None:
    """total ← augend + strength · one ⊙ other, as `add_scaled`; torch stretches the factors to fit."""
    if augend is total:
        total.addcmul_(one, other, value=strength)
    else:
        torch.addcmul(augend, one, other, value=strength, out=total)


@cache
def _onednn() -> Callable[..., Tensor] | None:
    """torch's operator for left · right by oneDNN, which it brings beside MKL; None where it has none, or it is wrong.

    On AMD's processors MKL's fp32 product has half the speed. torch takes oneDNN's for half precision only, and the
    operator is not among its documented ones: so it is tried on a small product first, and done without on any doubt.
    """
    try:
        operator: Callable[..., Tensor] = torch.ops.mkldnn._linear_pointwise.default
        generator = torch.Generator(device="cpu").manual_seed(0)
        # told everything: the host may have set other defaults
        cpu, fp32 = torch.device("cpu"), torch.float32
        left = torch.rand((33, 24), generator=generator, dtype=fp32, device=cpu)
        right = torch.rand((24, 65), generator=generator, dtype=fp32, device=cpu)
        found = operator(left, right.t(), None, "none", [], "")
        return operator if torch.allclose(found, left @ right, rtol=1e-5, atol=1e-5) else None
    except (AttributeError, RuntimeError, TypeError, NotImplementedError):
        return None


@cache
def _by_rows() -> Callable[[Tensor, Tensor, Tensor, Tensor, int], None] | None:
    """`_add_by_rows` without Python; None where torch cannot compile it (any more: TorchScript is deprecated)."""
    try:
        with _COMPILING, warnings.catch_warnings():
            # this one only: another thread that notes the filters now puts them back later
            warnings.filterwarnings("ignore", message=".*torch.jit.script")
            compiled: Callable[[Tensor, Tensor, Tensor, Tensor, int], None] = torch.jit.script(_add_by_rows)
    except Exception:  # noqa: BLE001  whatever it is: the same sum is made without
        return None
    return compiled


@contextmanager
def for_later() -> Iterator[None]:
    """What is made within can be written into later, in any mode: torch refuses that, outside of inference mode, for a
    tensor that was made in it."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Operations keep the dtypes of their arguments."""
    asked = getattr(torch.amp, "is_autocast_available", None)  # torch 2.4
    known = asked(device) if asked is not None else device in _AUTOCAST
    return torch.autocast(device, enabled=False) if known else nullcontext()


@contextmanager
def exact_arithmetic(*devices: str) -> Iterator[None]:
    """Full fp32 products on these: TF32 keeps 10 bits of a factor, autocast computes in half."""
    with _FULL_PRECISION, ExitStack() as left_alone:
        for device in devices:
            left_alone.enter_context(without_autocast(device))
        yield


class _FullPrecision:
    """The process's precision of fp32 products: full while anybody is inside, then what the host had chosen.

    The choice is one for all threads, so whoever comes first notes it, and whoever leaves last puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._put_back: Callable[[], None] = _nothing

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = _set_full_precision()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


def _set_full_precision() -> Callable[[], None]:
    """Returns what puts the host's choice back."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch 2.9 on: the host has chosen by the newer switches, and the two do not mix
        switches: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
        chosen = [switch.fp32_precision for switch in switches]
        for switch in switches:
            switch.fp32_precision = "ieee"
        return lambda: _set_switches(switches, chosen)
    torch.set_float32_matmul_precision("highest")
    return lambda: torch.set_float32_matmul_precision(before)


def _set_switches(switches: Iterable[Any], chosen: Iterable[str]) -> None:
    for switch, precision in zip(switches, chosen, strict=True):
        switch.fp32_precision = precision


def _nothing() -> None: ...


_FULL_PRECISION = _FullPrecision()
