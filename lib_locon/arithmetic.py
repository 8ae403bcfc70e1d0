"""What all sums are made within and of: the dtype in which to work, full precision, and scaled additions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

_AUTOCAST = ("cpu", "cuda", "xpu")
"""Where torch 2.1 knows autocast; it refuses to be told of other devices, also to leave them alone."""


_SUMS_IN_HALF = (
    "allow_fp16_reduced_precision_reduction",
    "allow_bf16_reduced_precision_reduction",
    "allow_fp16_accumulation",  # torch 2.7
)
"""By which torch lets NVIDIA's libraries add in half precision what they multiplied in it."""


def matrix(tensor: Tensor) -> Tensor:
    """`tensor` as `(first axis, all others)`; a view where the memory allows, itself where it is a matrix."""
    return tensor if tensor.ndim == 2 else tensor.reshape(tensor.shape[0], -1)


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
    """Full fp32 products on these, and sums in fp32 of halves: TF32 keeps 10 bits of a factor, autocast computes in
    half, and so may a GPU add."""
    with _FULL_FACTORS, _FULL_SUMS if "cuda" in devices else nullcontext(), ExitStack() as left_alone:
        for device in devices:
            left_alone.enter_context(without_autocast(device))
        yield


class _Meanwhile:
    """A setting of the process: ours while anybody is inside, then what the host had chosen.

    It is one for all threads, so whoever comes first notes it, and whoever leaves last puts it back.
    """

    def __init__(self, choose: Callable[[], Callable[[], None]]) -> None:
        """`choose` sets it, and returns what puts the host's choice back."""
        self._lock = threading.Lock()
        self._inside = 0
        self._choose = choose
        self._put_back: Callable[[], None] = _nothing

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._put_back = self._choose()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._put_back()


def _choose_full_factors() -> Callable[[], None]:
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


def _choose_full_sums() -> Callable[[], None]:
    products: Any = torch.backends.cuda.matmul
    before = {name: _chosen(products, name) for name in _SUMS_IN_HALF if _has(products, name)}
    for name in before:
        setattr(products, name, False)

    def put_back() -> None:
        for name, value in before.items():
            setattr(products, name, value)

    return put_back


def _chosen(products: Any, name: str) -> object:
    """What a host has set, in the form in which it is set: newer versions of torch read the two halves of a pair by two
    names."""
    second = f"{name}_split_k"
    return (getattr(products, name), getattr(products, second)) if _has(products, second) else getattr(products, name)


def _has(products: Any, name: str) -> bool:
    try:
        getattr(products, name)
    except (AttributeError, AssertionError):  # the latter in torch 2.1
        return False
    return True


def _set_switches(switches: Iterable[Any], chosen: Iterable[str]) -> None:
    for switch, precision in zip(switches, chosen, strict=True):
        switch.fp32_precision = precision


def _nothing() -> None: ...


_FULL_FACTORS, _FULL_SUMS = _Meanwhile(_choose_full_factors), _Meanwhile(_choose_full_sums)
