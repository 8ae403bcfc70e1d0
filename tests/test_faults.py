"""All or nothing: whatever goes wrong, and wherever, the model has its base back and the error says so.

Faults are put everywhere by machine, not where a reader expects them: in the ΔW of each weight, at each operation that
torch carries out, and at each line of `lib_locon/patching`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lib_locon
from lib_locon import session as session_module
from lib_locon.errors import PatchError
from lib_locon.models.targets import View
from lib_locon.patching import engine as engine_module
from lib_locon.patching.engine import Engine
from lib_locon.patching.plan import Patch, Plan, make_plan
from tests.conftest import Whole

if TYPE_CHECKING:
    from tests.conftest import MakePatch, WriteAdapter, Zoo

PATHS = ("linear.weight", "conv2d.weight", "embedding.weight", "norm.weight")
WATCHED = (str(Path(engine_module.__file__).parent), session_module.__file__)
ERRORS = (RuntimeError("a kernel failed"), MemoryError("no room"), torch.cuda.OutOfMemoryError("CUDA out of memory"))
INTERRUPTS = (KeyboardInterrupt(), SystemExit(3))


class Failing(Whole):
    """A ΔW that cannot be worked out."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def delta(self, base: Tensor) -> Tensor:
        raise self.error


def weights(model: nn.Module) -> dict[str, bytes]:
    return {
        # not by numpy: whoever shares its memory with that is asked of the system whether it may be written
        name: bytes(p.detach().contiguous().reshape(-1).view(torch.uint8).tolist())
        for name, p in model.named_parameters()
    }


@pytest.fixture
def model(zoo: Zoo) -> nn.Module:
    return zoo(torch.float16)


@pytest.fixture
def plan(patch: MakePatch, model: nn.Module) -> Callable[..., Plan]:
    """plan(seed, paths=PATHS): one random ΔW on each of these weights."""

    def make(seed: int, paths: tuple[str, ...] = PATHS) -> Plan:
        generator = torch.Generator().manual_seed(seed)
        shapes = {path: model.get_parameter(path).shape for path in paths}
        return make_plan(
            patch(path, torch.randn(shape, generator=generator), source=str(seed)) for path, shape in shapes.items()
        )

    return make


def check_works(model: nn.Module, engine: Engine, plan: Plan, base: dict[str, bytes]) -> None:
    """The engine does what a fresh one would, and gives the base back."""
    assert engine.apply(plan) == len(plan)
    mine = weights(model)
    engine.restore()
    assert weights(model) == base
    Engine(model).apply(plan)
    assert weights(model) == mine


# ---- in the ΔW of one weight


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("held", [False, True], ids=["from the base", "from another set"])
@pytest.mark.parametrize("position", range(len(PATHS)))
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_at_any_weight_leaves_the_base_and_says_so(
    model: nn.Module, plan: Callable[..., Plan], error: Exception, position: int, held: bool
) -> None:
    base = weights(model)
    engine = Engine(model)
    if held:
        engine.apply(plan(1))
    bad = Patch("bad", View(PATHS[position]), 1.0, Failing(error))
    wanted = {**plan(2), PATHS[position]: (*plan(2)[PATHS[position]], bad)}
    with pytest.raises(PatchError) as caught:
        engine.apply(wanted)
    assert weights(model) == base
    assert caught.value.__cause__ is error
    for part in (PATHS[position], str(error), "base again"):
        assert part in str(caught.value)
    assert not engine.active
    assert engine.base_bytes == 0
    check_works(model, engine, plan(3), base)


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("held", [False, True], ids=["from the base", "from another set"])
@pytest.mark.parametrize("position", range(len(PATHS)))
@pytest.mark.parametrize("interrupt", INTERRUPTS, ids=lambda error: type(error).__name__)
def test_an_interrupt_at_any_weight_leaves_the_base_and_goes_on_as_itself(
    model: nn.Module, plan: Callable[..., Plan], interrupt: BaseException, position: int, held: bool
) -> None:
    base = weights(model)
    engine = Engine(model)
    if held:
        engine.apply(plan(1))
    bad = Patch("bad", View(PATHS[position]), 1.0, Failing(interrupt))
    with pytest.raises(type(interrupt)) as caught:
        engine.apply({**plan(2), PATHS[position]: (bad,)})
    assert caught.value is interrupt
    assert weights(model) == base
    assert not engine.active
    check_works(model, engine, plan(3), base)


def test_a_weight_that_the_model_does_not_have(model: nn.Module, plan: Callable[..., Plan], patch: MakePatch) -> None:
    base = weights(model)
    with pytest.raises(PatchError, match=r"no\.such\.weight"):
        Engine(model).apply({**plan(1), "no.such.weight": (patch("no.such.weight", torch.ones(1)),)})
    assert weights(model) == base


def test_a_session_that_failed_goes_on_with_other_adapters(
    model: nn.Module, write_adapter: WriteAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = weights(model)
    factors = {"lora_up.weight": torch.randn(8, 2), "lora_down.weight": torch.randn(2, 12)}
    adapter = lib_locon.load(write_adapter(tmp_path / "a.safetensors", {"linear": factors, "norm": {}}))
    session = lib_locon.Session(model)

    def no_room(*_: object, **__: object) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as broken:
        broken.setattr("lib_locon.patching.compute._side_by_side", no_room)
        with pytest.raises(PatchError, match="out of memory"):
            session.apply([lib_locon.Use(adapter)])
    assert weights(model) == base
    assert session.apply([lib_locon.Use(adapter)]).written == 1
    assert weights(model) != base


def test_a_weight_that_cannot_be_written_spoils_no_other(patch: MakePatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = nn.Parameter(torch.zeros(1, 1).expand(4, 4))  # one number seen sixteen times: torch refuses
    base = weights(model)
    engine = Engine(model)
    engine.apply(make_plan([patch("2.weight", torch.ones(4, 4))]))
    paths = ("0.weight", "1.weight", "2.weight")
    with pytest.raises(PatchError, match=r"1\.weight"):
        engine.apply(make_plan(patch(path, torch.ones(4, 4), strength=2.0) for path in paths))
    assert weights(model) == base
    assert engine.apply(make_plan([patch("0.weight", torch.ones(4, 4))])) == 1
    assert torch.equal(model[1].weight, torch.zeros(4, 4))


# ---- at each operation of torch


class FaultAt(TorchDispatchMode):
    """Raises at the operations with these numbers, before they are carried out or right after."""

    def __init__(self, numbers: tuple[int, ...], error: type[BaseException], after: bool) -> None:
        super().__init__()
        self.numbers, self.error, self.after = numbers, error, after
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.count = self.count, self.count + 1
        if number in self.numbers and not self.after:
            raise self.error("injected")
        result = func(*args, **(kwargs or {}))
        if number in self.numbers:
            raise self.error("injected")
        return result


def operations(run: Callable[[], object]) -> int:
    with FaultAt((), Exception, after=False) as mode:
        run()
    return mode.count


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_fault_at_any_operation_leaves_the_base(
    zoo: Zoo, model: nn.Module, plan: Callable[..., Plan], error: type[BaseException], after: bool
) -> None:
    base = weights(model)
    old, new = plan(1), plan(2, (*PATHS[1:], "fused.weight"))
    like = zoo(torch.float16)
    other = Engine(like)
    other.apply(old)
    total = operations(lambda: other.apply(new))
    assert total > 3 * len(new)
    engine = Engine(model)
    for number in range(total):
        engine.apply(old)
        told = KeyboardInterrupt if error is KeyboardInterrupt else (PatchError, error)
        with FaultAt((number,), error, after), pytest.raises(told):
            engine.apply(new)
        assert weights(model) == base, number
        assert not engine.active
        assert engine.base_bytes == 0
    check_works(model, engine, new, base)


def test_an_interrupt_in_the_rescue_does_not_stop_it(model: nn.Module, plan: Callable[..., Plan]) -> None:
    base = weights(model)
    engine = Engine(model)
    engine.apply(plan(1))
    second = operations(lambda: engine.apply(plan(2))) - 1  # the last operation: all weights are to be rescued
    engine.restore()
    for gap in range(1, 12):
        engine.apply(plan(1))
        presses = (second, second + gap, second + gap + 1, second + 2 * gap + 2)
        with FaultAt(presses, KeyboardInterrupt, after=True) as mode, pytest.raises(KeyboardInterrupt):
            engine.apply(plan(2))
        assert mode.count > second + 1
        assert weights(model) == base, gap
        assert not engine.active


def test_after_a_rescue_that_failed_restore_still_has_the_base(model: nn.Module, plan: Callable[..., Plan]) -> None:
    base = weights(model)
    engine = Engine(model)
    engine.apply(plan(1))
    last = operations(lambda: engine.apply(plan(2))) - 1
    engine.restore()
    for number in range(last + 1, last + 9):
        engine.apply(plan(1))
        with (
            FaultAt((last, number), torch.cuda.OutOfMemoryError, after=False),
            pytest.raises(Exception, match="injected"),
        ):
            engine.apply(plan(2))
        if weights(model) != base:
            assert engine.active
        engine.restore()
        assert weights(model) == base, number
    check_works(model, engine, plan(3), base)


# ---- at each line of the engine


@contextmanager
def fault_at_line(number: int) -> Iterator[list[str]]:
    """KeyboardInterrupt at the line of `WATCHED` that is reached as the `number`-th; yields lines seen."""
    seen: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(WATCHED):
            return None
        if event == "line":
            seen.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
            if len(seen) == number + 1:
                raise KeyboardInterrupt
        return trace

    before, grad = sys.gettrace(), torch.is_grad_enabled()
    sys.settrace(trace)
    try:
        yield seen
    finally:
        sys.settrace(before)
        torch.set_grad_enabled(grad)  # a fault on the way out of `with torch.no_grad()` skips its end


LOADED = "change after a checkpoint was loaded"


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("step", ["apply", "change", "remove", "restore", LOADED])
def test_an_interrupt_at_any_line_leaves_no_weight_half_way(
    zoo: Zoo, model: nn.Module, plan: Callable[..., Plan], step: str
) -> None:
    """No weight is in between, no two sets are mixed, and nothing old is left over to come back later."""
    old, new, fresh = plan(1, PATHS[:3]), plan(2, PATHS[1:]), zoo(torch.float16, seed=9).state_dict()
    loaded = step == LOADED
    before = {} if step == "apply" else old
    wanted = {} if step in ("remove", "restore") else new
    start, other = zoo(torch.float16).state_dict(), zoo(torch.float16, seed=5).state_dict()
    model.load_state_dict(start)
    expected = states(model, before, wanted, fresh if loaded else None)
    engine = Engine(model)
    number = 0
    while True:
        model.load_state_dict(start)
        base, started, done = expected
        engine.apply(before)
        if loaded:
            model.load_state_dict(fresh)
        with fault_at_line(number) as seen:
            try:
                engine.restore() if step == "restore" else engine.apply(wanted)
            except KeyboardInterrupt:
                where = f"{number}: {seen[-1]}"
            else:
                break
        now = weights(model)
        if step == "restore":
            assert all(now[name] in (base[name], started[name]) for name in now), where
        else:
            assert now in (base, started, done), where
        model.load_state_dict(other)
        base = weights(model)
        engine.apply(new)
        engine.restore()
        assert weights(model) == base, f"after {where}: an old base came back"
        number += 1
    assert number > 90


def states(
    model: nn.Module, before: Plan, wanted: Plan, loaded: dict[str, Tensor] | None
) -> tuple[dict[str, bytes], dict[str, bytes], dict[str, bytes]]:
    """What the model may hold: its base, the set that it held when the fault came, and the set asked for."""
    helper = Engine(model)
    helper.apply(before)
    started = weights(model)
    helper.restore()
    if loaded is not None:
        model.load_state_dict(loaded)
        started = weights(model)
    base = weights(model)
    helper.apply(wanted)
    done = weights(model)
    helper.restore()
    return base, started, done


# ---- numbers that the dtype cannot hold


def test_a_sum_beyond_fp16_leaves_the_base_and_says_so(patch: MakePatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    base = weights(model)
    changes = [patch("0.weight", torch.ones(4, 4)), patch("1.weight", torch.ones(4, 4), strength=1e6)]
    with pytest.raises(PatchError, match=r"1\.weight .* beyond those of its dtype"):
        Engine(model).apply(make_plan(changes))
    assert weights(model) == base


def test_a_base_that_is_not_finite_itself_is_no_reason_to_refuse(patch: MakePatch) -> None:
    model = nn.Sequential(nn.Linear(4, 4)).half()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    assert Engine(model).apply(make_plan([patch("0.weight", torch.ones(4, 4))])) == 1
