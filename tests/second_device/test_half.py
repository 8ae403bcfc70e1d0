"""One product on a half-precision weight: by one call of a GPU, where that sums in fp32 and rounds once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lib_locon.arithmetic import exact_arithmetic
from lib_locon.patching import half_products
from lib_locon.patching.compute import patched
from lib_locon.patching.half_products import adds_in_half
from tests.conftest import MakePatch
from tests.second_device.device import DEVICES, counted

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    half_products._sums_in_fp32.cache_clear()
    yield
    half_products._sums_in_fp32.cache_clear()


def some(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICES[0], dtype)


class AddsOtherwise(TorchFunctionMode):
    """A device whose `addmm` of halves differs from that of these devices."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is not torch.addmm or args[0].dtype not in HALVES:
            return function(*args, **kwargs)
        if self.how.startswith("refuses"):
            raise TypeError("no halves here") if "type" in self.how else RuntimeError("not implemented for 'Half'")
        base, left, right = (self.read(matrix) for matrix in args)
        half, alpha = args[0].dtype, kwargs["alpha"]
        if self.how == "rounds the scale":
            alpha = float(torch.tensor(alpha, dtype=half))
        middle = left.shape[1] // 2
        parts = [left[:, :middle] @ right[:middle], left[:, middle:] @ right[middle:]]
        if self.how == "adds in half":
            parts = [rounded(part, half) for part in parts]
        if self.how == "adds in 14 bits":
            parts = [(part / 2**4).round() * 2**4 for part in parts]
        product = parts[1] + parts[0]
        if self.how == "rounds before it scales":
            product = rounded(product, half)
        change = alpha * product
        if self.how == "rounds twice":
            change = rounded(change, half)
        return kwargs.get("out", args[0].clone()).copy_(base + change)

    def read(self, matrix: Tensor) -> Tensor:
        """In fp32."""
        wide = matrix.float()
        if self.how == "reads bf16":
            return rounded(wide, torch.bfloat16)
        tiny = torch.finfo(matrix.dtype).tiny
        return wide * (wide.abs() >= tiny) if self.how == "takes the smallest for 0" else wide


def rounded(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    return matrix.to(dtype).float()


@contextmanager
def other_device(how: str) -> Iterator[None]:
    if how == "as it is":
        yield
    else:
        with AddsOtherwise(how):
            yield


WRONG = ("refuses", "refuses by its type", "rounds the scale", "adds in half", "adds in 14 bits", "rounds twice")
WRONG += ("rounds before it scales", "reads bf16", "takes the smallest for 0")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("how", ["as it is", "in another order", *WRONG])
def test_a_device_is_asked_what_it_does(how: str, dtype: torch.dtype) -> None:
    matrices = [some(4, 4, seed=0, dtype=dtype) for _ in range(4)]
    right = how not in WRONG
    if dtype == torch.bfloat16:  # as small as its smallest number no adapter has any
        right |= how in ("reads bf16", "takes the smallest for 0")
    with other_device(how), exact_arithmetic("cuda"):
        counted()
        assert adds_in_half(*matrices) == right
        assert counted().get("waits", 0) == (1 if "refuses" in how else 2)
        assert adds_in_half(*matrices) == right
        assert counted() == {}
        assert not adds_in_half(*(matrix.float() for matrix in matrices))
        assert not adds_in_half(*(matrix.cpu() for matrix in matrices))
        assert not adds_in_half(*matrices[:3], matrices[3].float())


@pytest.mark.parametrize("dtype", HALVES)
def test_what_a_device_is_asked_has_one_answer(dtype: torch.dtype) -> None:
    for probe in half_products._probes(dtype):
        base, left, right = probe
        assert all(torch.equal(matrix.to(dtype).double(), matrix) for matrix in probe)
        for exact in (base + half_products._SCALE * (left @ right), left.abs() @ right.abs()):
            assert torch.equal(exact.float().double(), exact)


@pytest.mark.parametrize("how", ["as it is", *WRONG])
@pytest.mark.parametrize("dtype", HALVES)
def test_whatever_a_device_does_the_sum_is_rounded_once(dtype: torch.dtype, how: str, patch: MakePatch) -> None:
    small = 2.0**-12  # with subnormal numbers among the factors in fp16
    base = some(96, 160, seed=0, dtype=dtype) * small
    factors = {"up": some(96, 8, seed=1, dtype=dtype) * small / 4, "down": some(8, 160, seed=2, dtype=dtype) / 4}
    wide = {name: factor.cpu().double() for name, factor in factors.items()}
    exact = (base.cpu().double() + 0.3 * (wide["up"] @ wide["down"])).to(dtype)
    with other_device(how):
        found, extremes = patched(base, [patch("w", **factors, strength=0.3)])
    assert extremes is None
    # fp32 is a bit off, and so comes to lie on the other side of the middle between two halves once in a while
    assert (found.cpu() != exact).double().mean() < 2e-3
    assert not torch.equal(found, base)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_nothing_to_add_is_the_base(dtype: torch.dtype) -> None:
    base = some(8, 8, seed=0, dtype=dtype)
    assert torch.equal(patched(base, [])[0], base)


@pytest.mark.parametrize(("factor", "kernels"), [(torch.float16, 1), (torch.float32, 3), (torch.bfloat16, 5)], ids=str)
def test_one_product_takes_few_calls(
    factor: torch.dtype, kernels: int, patch: MakePatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = some(64, 64, seed=0, dtype=torch.float16)
    one = patch("w", up=some(64, 4, seed=1, dtype=factor) / 4, down=some(4, 64, seed=2, dtype=factor) / 4, strength=0.5)
    monkeypatch.setattr(type(one.delta), "bound", lambda self: 1.0)  # that of an adapter is known before
    patched(base, [one])
    counted()
    patched(base, [one])
    found = counted()
    assert found["kernels"] == kernels
    assert "waits" not in found
