"""All or nothing where most adapters go: products in one call of torch, two workers, and a session around them.

`test_faults` puts its faults into whole ΔW, and at operations that it sees; a compiled loop shows none of its own.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import lib_locon
from lib_locon import products
from lib_locon.errors import PatchError
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Plan, make_plan
from tests.test_faults import fault_at_line, weights
from tests.test_laws import lora
from tests.test_side_path import hooked

if TYPE_CHECKING:
    from tests.conftest import MakePatch, WriteAdapter, Zoo

PATHS = ("linear.weight", "fused.weight", "conv1d.weight", "conv2d.weight", "conv3d.weight", "embedding.weight")
compiled = pytest.mark.skipif(
    products._onednn() is None or products._by_tiles() is None, reason="this torch compiles no loop"
)


def product_plan(patch: MakePatch, model: nn.Module, paths: tuple[str, ...], seed: int) -> Plan:
    """A small random product on each of these weights."""
    generator = torch.Generator().manual_seed(seed)

    def factors(path: str) -> dict[str, Tensor]:
        shape = model.get_parameter(path).shape
        up, down = (shape[0], 2), (2, shape[1:].numel())
        return {"up": 0.1 * torch.randn(up, generator=generator), "down": torch.randn(down, generator=generator)}

    return make_plan(patch(path, source=str(seed), **factors(path)) for path in paths)


class Breaking:
    """Stands in `add_product`'s place, and fails at one call: before it writes, when half is written, or after."""

    def __init__(self, at: int, when: str, error: BaseException) -> None:
        self.at, self.when, self.error = at, when, error
        self.calls = itertools.count()

    def __call__(self, out: Tensor, base: Tensor, left: Tensor, right: Tensor, numbers: int) -> bool:
        fails = next(self.calls) == self.at
        if fails and self.when == "before":
            raise self.error
        done = products.add_product(out, base, left, right, numbers)
        assert done, "made in another way"
        if fails:
            if self.when == "half way":
                out[len(out) // 2 :].fill_(torch.nan)
            raise self.error
        return done


@compiled
@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("when", ["before", "half way", "after"])
@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_fault_at_any_product_leaves_the_base(
    zoo: Zoo, patch: MakePatch, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, error: BaseException, when: str
) -> None:
    model = zoo(dtype)
    old, new = product_plan(patch, model, PATHS[:4], 1), product_plan(patch, model, PATHS[1:], 2)
    base, engine = weights(model), Engine(model)
    engine.apply(new)
    wanted = weights(model)
    engine.restore()
    told = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else PatchError
    for number in range(len(new)):
        engine.apply(old)
        with monkeypatch.context() as broken:
            broken.setattr("lib_locon.patching.compute.add_product", Breaking(number, when, error))
            with pytest.raises(told):
                engine.apply(new)
            assert weights(model) == base, number
            assert (engine.active, engine.base_bytes) == (False, 0)
        assert engine.apply(new) == len(new)
        assert weights(model) == wanted
        engine.restore()
        assert weights(model) == base
    with monkeypatch.context() as counted:
        counted.setattr("lib_locon.patching.compute.add_product", counting := Breaking(-1, when, error))
        engine.apply(new)
    assert next(counting.calls) == len(new), "each weight is one call"


@compiled
@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize(
    "error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=lambda error: type(error).__name__
)
def test_a_worker_in_the_middle_of_its_product_writes_before_the_base_comes_back(
    zoo: Zoo, patch: MakePatch, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    model = zoo(torch.float16)
    base, engine = weights(model), Engine(model)
    both, calls, late = threading.Barrier(2, timeout=30), itertools.count(), []

    def product(out: Tensor, *others: object) -> bool:
        number = next(calls)
        both.wait()  # the third call never comes
        if number == 0:
            raise error
        time.sleep(0.1)
        late.append(products.add_product(out, *others))  # type: ignore[arg-type]
        return True

    monkeypatch.setattr("lib_locon.patching.compute.add_product", product)
    with pytest.raises((PatchError, KeyboardInterrupt)):
        engine.apply(product_plan(patch, model, PATHS, 1))
    assert late == [True]
    for _ in range(2):
        assert weights(model) == base
        time.sleep(0.15)


# ---- a session, at each of its lines and the engine's


@pytest.fixture
def adapters(write_adapter: WriteAdapter, tmp_path: Path) -> list[lib_locon.Adapter]:
    """Two of products, and of norms, which never run beside their layer."""
    groups = [
        {
            "linear": lora(8, 12, seed=seed),
            "embedding": lora(10, 8, seed=seed),
            "norm": {"w_norm": torch.ones(8) * seed},
        }
        for seed in (1, 2)
    ]
    return [lib_locon.load(write_adapter(tmp_path / f"{i}.safetensors", group)) for i, group in enumerate(groups)]


State = tuple[dict[str, bytes], list[float]]


def state(model: nn.Module) -> State:
    """The weights, and what the layer beside which an adapter may run gives."""
    with torch.no_grad():
        return weights(model), model.linear(torch.linspace(-1, 1, 12)).tolist()


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("side_path", [False, True], ids=["merged", "beside"])
@pytest.mark.parametrize("step", ["apply", "change", "remove", "restore"])
def test_an_interrupt_at_any_line_of_a_session_mixes_no_sets(
    zoo: Zoo, adapters: list[lib_locon.Adapter], step: str, side_path: bool
) -> None:
    model = zoo()
    session = lib_locon.Session(model, side_path=side_path)
    old, new = [lib_locon.Use(adapters[0])], [lib_locon.Use(adapters[1])]
    before = [] if step == "apply" else old
    wanted = [] if step in ("remove", "restore") else new
    states = []
    for uses in ([], before, wanted):
        session.apply(uses)
        states.append(state(model))
    base, started, done = states
    act: Callable[[], object] = session.restore if step == "restore" else lambda: session.apply(wanted)
    number = 0
    while True:
        session.apply(before)
        with fault_at_line(number) as seen:
            try:
                act()
            except KeyboardInterrupt:
                where = f"{number}: {seen[-1]}"
            else:
                break
        now = state(model)
        if step != "restore":
            assert now in (base, started, done), where
        assert session.active or now == base, where
        session.apply(new)
        session.apply(wanted)
        assert state(model) == done, where
        session.restore()
        assert state(model) == base, where
        assert hooked(model) == [], where
        number += 1
    assert any(line.startswith("session.py") for line in seen)
    assert number > 90
