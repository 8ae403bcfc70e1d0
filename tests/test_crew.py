"""Two workers make the sums of large changes: the same bits, all or nothing, and nobody else's threads change."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.errors import PatchError
from lib_locon.families.layer import Layer
from lib_locon.families.tlora import TLoRA
from lib_locon.models.targets import View
from lib_locon.patching import crew as crews
from lib_locon.patching.crew import WORTHWHILE, Crew, Job, crew_for
from lib_locon.patching.engine import Engine
from lib_locon.patching.memory import LARGE, Scratch
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.patching.rounding import Rounding
from tests import random_adapters
from tests.conftest import Whole, Zoo

COUNT = 24
NUMBERS = itertools.count()


@pytest.fixture(autouse=True)
def one_thread_after() -> Iterator[None]:
    yield
    torch.set_num_threads(1)


@pytest.fixture
def interrupts() -> Iterator[None]:
    """A Ctrl-C is one, also where the tests were begun in the background."""
    if os.name == "nt":
        pytest.skip("Windows gives a process no interrupt of its own")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def bits(model: nn.Module) -> dict[str, bytes]:
    return {name: w.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for name, w in model.named_parameters()}


def layers(dtype: torch.dtype = torch.float32, width: int = 24) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(width + i, width - i, bias=False) for i in range(COUNT // 2)))
    model.extend(nn.Conv2d(i + 1, width, 3, bias=False) for i in range(COUNT // 2))
    return model.to(dtype).requires_grad_(False)


class Told(Whole):
    """A ΔW of one number, that does something on the way."""

    def __init__(self, value: float = 1.0, action: Callable[[], object] = object) -> None:
        self.value, self.action = value, action

    def delta(self, base: Tensor) -> Tensor:
        self.action()
        return torch.full_like(base, self.value)


def plan_of(model: nn.Module, make: Callable[[str], Told]) -> Plan:
    source = f"adapter {next(NUMBERS)}"
    return make_plan(Patch(source, View(path), 1.0, make(path)) for path, _ in model.named_parameters())


def constant(model: nn.Module, value: float) -> Plan:
    return plan_of(model, lambda _: Told(value))


def check_base(model: nn.Module, engine: Engine, base: dict[str, bytes]) -> None:
    """The model has its base, nobody writes any more, and the engine goes on."""
    for _ in range(2):
        assert bits(model) == base
        assert not engine.active
        time.sleep(0.3)  # longer than any item of these tests takes
    engine.apply(constant(model, 3.0))
    assert bits(model) != base
    engine.restore()
    assert bits(model) == base


# ---- the workers


def items(count: int) -> list[str]:
    return [str(number) for number in range(count)]


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_each_item_is_done_once_and_the_threads_are_shared_out(threads: int) -> None:
    torch.set_num_threads(threads)
    seen: dict[int, set[int]] = {}
    done: list[str] = []
    both = threading.Barrier(2, timeout=30)

    @contextmanager
    def begin() -> Iterator[Callable[[str], object]]:
        both.wait()  # so that neither does it all

        def do(item: str) -> None:
            seen.setdefault(threading.get_ident(), set()).add(torch.get_num_threads())
            done.append(item)
            time.sleep(0.001)

        yield do

    Crew(threads).do(Job(items(40), begin))
    assert sorted(done) == sorted(items(40))
    assert len(seen) == 2
    assert sorted(counts.pop() for counts in seen.values()) == [threads // 2, threads - threads // 2]
    assert torch.get_num_threads() == threads


def test_threads_of_others_keep_their_number() -> None:
    """torch asks the process's number at a thread's first question, and takes what any thread says for that."""
    torch.set_num_threads(6)
    counts: list[int] = []
    ready, made = threading.Event(), threading.Event()

    def asks_before() -> None:
        counts.append(torch.get_num_threads())
        ready.set()
        made.wait(30)
        counts.append(torch.get_num_threads())

    def makes() -> None:
        """Only itself has four."""
        torch.get_num_threads()
        torch.set_num_threads(4)
        limited.set()
        told.wait(30)
        Crew(4)
        counts.append(torch.get_num_threads())

    limited, told = threading.Event(), threading.Event()
    early, maker = threading.Thread(target=asks_before), threading.Thread(target=makes)
    early.start()
    assert ready.wait(30)
    maker.start()
    assert limited.wait(30)
    torch.set_num_threads(6)
    told.set()
    maker.join(30)
    made.set()
    early.join(30)
    late = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    late.start()
    late.join(30)
    assert counts == [6, 4, 6, 6]
    assert torch.get_num_threads() == 6


def test_what_an_item_raises_is_raised_when_nobody_works_any_more() -> None:
    torch.set_num_threads(2)
    crew = Crew(2)
    done: list[str] = []
    both = threading.Barrier(2, timeout=30)

    def do(item: str) -> None:
        if item in "01":
            both.wait()
        if item == "0":
            raise ValueError("item 0")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match="item 0"):
        crew.do(Job(items(100), lambda: nullcontext(do)))
    assert done == ["1"]
    time.sleep(0.1)
    assert done == ["1"]
    crew.do(Job(["7"], lambda: nullcontext(do)))  # it goes on with other work
    assert done == ["1", "7"]


def test_a_job_that_is_stopped_has_ended() -> None:
    """Whoever is in the middle of an item ends it; who comes later, as behind another job, does nothing."""
    torch.set_num_threads(2)
    crew = Crew(2)
    begun: list[str] = []
    done: list[str] = []
    one_is_busy = threading.Event()

    def slow(item: str) -> None:
        begun.append(item)
        one_is_busy.set()
        time.sleep(0.2)
        done.append(item)

    job = Job(items(100), lambda: nullcontext(slow))
    caller = threading.Thread(target=crew.do, args=(job,))
    caller.start()
    assert one_is_busy.wait(30)
    later = Job(items(100), lambda: nullcontext(slow))
    waits = threading.Thread(target=crew.do, args=(later,))
    waits.start()
    later.stop()
    job.stop()
    assert sorted(done) == sorted(begun)
    assert set(begun) <= {"0", "1"}
    caller.join(30)
    waits.join(30)
    assert not caller.is_alive()
    assert not waits.is_alive()
    assert sorted(done) == sorted(begun)
    untold = Job(items(3), lambda: nullcontext(slow))  # no worker was told of it
    untold.stop()


def test_workers_go_with_their_crew() -> None:
    torch.set_num_threads(2)
    before = set(threading.enumerate())
    crew = Crew(2)
    crew.do(Job(items(4), lambda: nullcontext(lambda _: None)))
    mine = set(threading.enumerate()) - before
    assert len(mine) == 2
    del crew
    for thread in mine:
        thread.join(30)
        assert not thread.is_alive()


def test_who_makes_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crew_for(10 * WORTHWHILE) is None  # with one thread
    torch.set_num_threads(2)
    assert crew_for(WORTHWHILE - 1) is None
    crew = crew_for(WORTHWHILE)
    assert crew is not None
    assert crew_for(10 * WORTHWHILE) is crew
    found: list[Crew | None] = []
    crew.do(Job(["0"], lambda: nullcontext(lambda _: found.append(crew_for(WORTHWHILE)))))
    assert found == [None]  # a worker that waited for itself would wait for ever
    torch.set_num_threads(3)
    assert crew_for(WORTHWHILE) not in (None, crew)
    monkeypatch.setattr(crews, "_counts_by_thread", lambda: False)
    assert crew_for(WORTHWHILE) is None


def test_without_more_threads_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    torch.set_num_threads(2)
    crews._crew.cache_clear()
    monkeypatch.setattr(threading.Thread, "start", refused)
    assert crew_for(WORTHWHILE) is None


FORK = """
import os, sys, torch
from contextlib import nullcontext
from lib_locon.patching.crew import WORTHWHILE, Job, crew_for
torch.set_num_threads(2)
done = []
crew_for(WORTHWHILE).do(Job("0123", lambda: nullcontext(done.append)))
child = os.fork()
if not child:
    crew_for(WORTHWHILE).do(Job("4567", lambda: nullcontext(done.append)))
    os._exit(0 if sorted(done) == list("01234567") else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
AFTER_MAIN = """
import threading, time, torch
from torch import nn
from lib_locon.patching import crew
from lib_locon.patching.engine import Engine
from tests.test_crew import constant, layers
crew.WORTHWHILE = 0
torch.set_num_threads(2)
model = layers()
engine = Engine(model)
def serve():
    engine.apply(constant(model, 1.0))
    threading.main_thread().join()
    print(engine.apply(constant(model, 2.0)), flush=True)
threading.Thread(target=serve).start()
"""

AT_EXIT = """
import atexit
atexit.register(lambda: print(engine.apply(constant(model, 2.0)), flush=True))  # what is told first is done last
import torch
from lib_locon.patching import crew
from lib_locon.patching.engine import Engine
from tests.test_crew import constant, layers
crew.WORTHWHILE = 0
torch.set_num_threads(2)
model = layers()
engine = Engine(model)
engine.apply(constant(model, 1.0))
"""


def run(program: str) -> str:
    ended = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=Path(__file__).parents[1], timeout=120, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="only here do processes fork with threads")
def test_a_forked_process_has_workers_of_its_own() -> None:
    run(FORK)


def test_a_server_goes_on_when_the_first_thread_has_ended() -> None:
    """Python then counts the process as ending, and its executors take no more work."""
    assert run(AFTER_MAIN) == f"{COUNT}\n"


def test_a_model_may_be_changed_at_exit() -> None:
    assert run(AT_EXIT) == f"{COUNT}\n"


# ---- the engine with them


@pytest.mark.usefixtures("crew")
def test_two_workers_write_at_a_time_each_with_one_thread(zoo: Zoo) -> None:
    who: dict[int, set[int]] = {}
    both = threading.Barrier(2, timeout=30)

    def note() -> None:
        name = threading.get_ident()
        if name not in who:
            both.wait()
        who.setdefault(name, set()).add(torch.get_num_threads())

    model = zoo()
    Engine(model).apply(plan_of(model, lambda _: Told(1.0, note)))
    assert list(who.values()) == [{1}, {1}]
    assert threading.get_ident() not in who


@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "exact"), (torch.float16, "exact"), (torch.bfloat16, "exact"), (torch.float16, "builtin")],
    ids=str,
)
def test_they_make_the_bits_that_the_caller_makes(
    dtype: torch.dtype, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every family, alone and together, and the way back. By tiles so small that many weights have several."""
    monkeypatch.setattr("lib_locon.patching.compute.TILE", 8000)
    uses = [
        lib_locon.Use(lib_locon.load(path), lib_locon.Strengths.both(0.3 + 0.1 * number))
        for number, path in enumerate(sorted(random_adapters.folder().iterdir()))
    ]
    assert len(uses) > 5

    def found() -> list[dict[str, bytes]]:
        model = TinySD.random(0).to(dtype)
        base = bits(model)
        session = lib_locon.Session(model, rounding=rounding)
        held = [base]
        for chosen in (*([use] for use in uses), uses, uses[2:5], ()):
            session.apply(chosen)
            held.append(bits(model))
        assert held[-1] == base
        return held

    alone = found()
    monkeypatch.setattr(crews, "WORTHWHILE", 0)
    torch.set_num_threads(2)
    assert found() == alone


@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize("error", [RuntimeError("no room"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_worker_that_fails_leaves_no_weight_changed(error: BaseException) -> None:
    """The other worker is in the middle of its weight meanwhile."""
    model = layers()
    base = bits(model)
    engine = Engine(model)
    engine.apply(constant(model, 2.0))
    both = threading.Barrier(2, timeout=30)
    first = itertools.count()

    def action() -> None:
        number = next(first)
        if number < 2:
            both.wait()
        if number == 0:
            raise error
        time.sleep(0.1)

    with pytest.raises((PatchError, KeyboardInterrupt)) as caught:
        engine.apply(plan_of(model, lambda _: Told(3.0, action)))
    if isinstance(error, RuntimeError):
        assert re.match(r"\d+\.weight could not be patched \(no room\)", str(caught.value))
    assert next(first) <= 3
    check_base(model, engine, base)


@pytest.mark.usefixtures("crew", "interrupts")
def test_an_interrupt_of_the_caller_leaves_no_weight_changed() -> None:
    model = layers()
    base = bits(model)
    engine = Engine(model)
    first = itertools.count()

    def action() -> None:
        if next(first) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)

    with pytest.raises(KeyboardInterrupt):
        engine.apply(plan_of(model, lambda _: Told(1.0, action)))
    check_base(model, engine, base)


@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize("second", ["stop", "_settle", "restore"])
def test_a_second_interrupt_straight_after_the_first_loses_no_base(
    second: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end even the way back: then the next change, or the next way back, sets all right."""
    model = layers()
    base = bits(model)
    engine = Engine(model)

    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        monkeypatch.setattr(crews, "WORTHWHILE", 0)
        raise KeyboardInterrupt

    def first(job: Job) -> None:
        time.sleep(0.05)
        monkeypatch.setattr(Job if second == "stop" else Engine, second, interrupted)
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "wait", first)
    with pytest.raises(KeyboardInterrupt):
        engine.apply(plan_of(model, lambda _: Told(1.0, lambda: time.sleep(0.2))))
    engine.restore()
    check_base(model, engine, base)


@pytest.mark.usefixtures("hands")
@pytest.mark.parametrize("moved", [False, True], ids=["written", "known again"])
def test_a_sum_is_made_apart_from_what_the_host_has_chosen(moved: bool) -> None:
    """Also where a weight that was moved is known again by its numbers."""
    model = layers()
    engine = Engine(model)
    seen: set[tuple[bool, bool, str]] = set()

    def look() -> None:
        autocast = torch.get_autocast_dtype("cpu") if hasattr(torch, "get_autocast_dtype") else None
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        seen.add((torch.is_grad_enabled(), product.dtype == autocast, torch.get_float32_matmul_precision()))

    plan = plan_of(model, lambda _: Told(1.0, look))
    if moved:
        engine.apply(plan)
        seen.clear()
        for module in model:
            module.weight = nn.Parameter(module.weight.detach().clone())
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert engine.apply(plan) == (0 if moved else COUNT)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == {(False, False, "highest")}


@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize("ask", [Engine.unchanged, Engine.restore, lambda engine: engine.apply({})])
def test_what_asks_the_engine_from_within_a_change_is_refused(ask: Callable[[Engine], object]) -> None:
    """It would wait for the change that waits for it."""
    model = layers()
    base = bits(model)
    engine = Engine(model)
    with pytest.raises(PatchError, match="in the middle of another one"):
        engine.apply(plan_of(model, lambda _: Told(1.0, lambda: ask(engine))))
    assert bits(model) == base
    other = layers(torch.bfloat16)
    engine.apply(plan_of(model, lambda _: Told(1.0, lambda: Engine(other).apply(constant(other, 1.0)))))
    engine.restore()
    assert bits(model) == base


@pytest.mark.usefixtures("crew")
def test_a_set_on_other_weights_takes_no_second_copy_of_the_base() -> None:
    """The copies of the weights that get their base back are given back before others are made."""
    model = layers(torch.float32, 32)
    paths = [path for path, _ in model.named_parameters()]
    engine = Engine(model)
    engine.store.free_unused = True
    one, other = (
        {path: patches for path, patches in constant(model, 1.0).items() if path in chosen}
        for chosen in (paths[::2], paths[1::2])
    )
    engine.apply(one)
    most: list[int] = []
    save = engine.store.save

    def watched(path: str, weight: Tensor) -> Tensor:
        copy = save(path, weight)
        most.append(engine.base_bytes)
        return copy

    engine.store.save = watched  # type: ignore[method-assign]
    engine.apply(other)
    sizes = {path: weight.nbytes for path, weight in model.named_parameters()}
    assert max(most) <= max(sum(sizes[path] for path in half) for half in (one, other)) + max(sizes.values())


@pytest.mark.parametrize("convert", ["clone", "to", "same id"])
def test_a_change_made_with_more_threads_is_known_again(convert: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A singular value's last bits depend on the number of threads; the base must not be lost for that."""
    monkeypatch.setattr(crews, "WORTHWHILE", 0)
    torch.set_num_threads(2)
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(*(nn.Linear(320, 320, bias=False) for _ in range(4))).requires_grad_(False)
    base = bits(model)
    shapes = {"q_layer.weight": (8, 320), "p_layer.weight": (320, 8), "lambda_layer": (1, 8)}
    engine = Engine(model)

    def layer() -> Layer:
        factors = {name: torch.randn(shape, generator=generator) * 0.02 for name, shape in shapes.items()}
        return Layer(TLoRA.build(factors), None, 1.0)

    engine.apply(make_plan(Patch("t", View(path), 1.0, layer()) for path, _ in model.named_parameters()))
    if convert == "clone":
        for module in model:
            # as if another processor had made it: the last bits of some numbers
            noise = torch.randn(module.weight.shape, generator=generator) * 1e-7
            module.weight = nn.Parameter(module.weight + noise, requires_grad=False)
    elif convert == "to":
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.to(torch.float64).to(torch.float32)
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
    else:
        for module in model:
            noise = torch.randn(module.weight.shape, generator=generator) * 1e-7
            replace_at_the_same_id(module, module.weight + noise)
    assert engine.apply({}) == 4
    assert bits(model) == base


def replace_at_the_same_id(module: nn.Module, value: Tensor) -> None:
    """Puts a new parameter in place of the module's weight, which is freed and whose `id` the new one takes over."""
    before = id(module.weight)
    others = []  # kept alive, so that each try is at another address
    del module.weight
    for _ in range(1000):
        weight = nn.Parameter(value, requires_grad=False)
        if id(weight) == before:
            module.weight = weight
            return
        others.append(weight)
    pytest.skip("no new tensor took the id of the freed one")


def test_the_least_change_of_a_weight_by_others_stays() -> None:
    model = layers()
    engine = Engine(model)
    engine.apply(constant(model, 1.0))
    for weight in model.parameters():
        weight.view(-1)[0] += 1e-6
    changed = bits(model)
    assert engine.apply({}) == 0
    assert bits(model) == changed


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.1])
def test_what_is_only_near_a_change_is_a_new_base(share: float) -> None:
    """Another checkpoint put in the weights' place, be it the base itself or half of the way to it."""
    model = layers()
    base = {name: weight.clone() for name, weight in model.named_parameters()}
    engine = Engine(model)
    engine.apply(constant(model, 0.01))
    for name, weight in base.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        module.weight = nn.Parameter(weight + share * 0.01, requires_grad=False)
    loaded = bits(model)
    assert engine.apply({}) == 0
    assert bits(model) == loaded


@pytest.mark.usefixtures("crew")
def test_two_engines_share_the_workers() -> None:
    models = [layers(), layers(torch.bfloat16)]
    bases, engines = [bits(model) for model in models], [Engine(model) for model in models]

    def change(number: int) -> None:
        for value in range(1, 30):
            engines[number].apply(constant(models[number], float(value)))

    threads = [threading.Thread(target=change, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for model, base, engine in zip(models, bases, engines, strict=True):
        mine = bits(model)
        engine.restore()
        assert bits(model) == base
        Engine(model).apply(constant(model, 29.0))
        assert bits(model) == mine


@pytest.mark.usefixtures("crew")
def test_what_runs_the_code_of_others_stays_with_the_caller(zoo: Zoo) -> None:
    """A weight of 8 bits is read and rounded as its module says, and that may know of one thread only."""
    who: dict[str, str] = {}
    model = zoo()
    model.linear.to(torch.float8_e4m3fn)

    def told(path: str) -> Told:
        return Told(1.0, lambda: who.setdefault(path, threading.current_thread().name))

    Engine(model).apply(plan_of(model, told))
    here = threading.current_thread().name
    assert who["linear.weight"] == who["linear.bias"] == here
    assert here not in {name for path, name in who.items() if not path.startswith("linear.")}


@pytest.mark.usefixtures("crew")
@pytest.mark.parametrize("stored", [torch.float32, torch.float16], ids=["as it is", "cast"])
def test_bases_that_two_workers_read_back(stored: torch.dtype, tmp_path: Path) -> None:
    """Weights above the size from which on a buffer is lent, read from the file while the other's is still in use."""
    model = nn.Sequential(*(nn.Linear(1024, LARGE // 1024 // 4 + 8 * i, bias=False) for i in range(8)))
    model.requires_grad_(False)
    for weight in model.parameters():
        weight.copy_(weight.half())
    path = tmp_path / "model.safetensors"
    save_file({name: weight.to(stored) for name, weight in model.state_dict().items()}, path)
    os.utime(path, (1, 1))  # a file so new is not relied upon
    base = bits(model)
    session = lib_locon.Session(model)
    session.read_bases_from(path)
    engine = session.engine
    for value in (1.0, 2.0, 3.0):
        engine.apply(constant(model, value))
        for name, weight in model.named_parameters():
            pristine = torch.frombuffer(bytearray(base[name]), dtype=torch.float32).view(weight.shape)
            assert torch.equal(weight, pristine + value), name
    report = engine.store.report()
    assert (report.weights, report.reasons) == ({"checkpoint": 8}, {})
    largest = max(weight.nbytes for weight in model.parameters())
    assert 0 < engine.store.nbytes <= 2 * largest
    engine.restore()
    assert bits(model) == base
    assert engine.store.nbytes == 0


def test_each_tensor_alive_has_a_buffer_of_its_own() -> None:
    scratch = Scratch()
    one, two = scratch.lend((LARGE,), torch.uint8).fill_(1), scratch.lend((LARGE,), torch.uint8).fill_(2)
    assert scratch.nbytes == 2 * LARGE
    assert bool((one == 1).all())
    places = {one.data_ptr(), two.data_ptr()}
    del one, two
    again = [scratch.lend((LARGE,), torch.uint8) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} == places
    del again
    larger = scratch.lend((3 * LARGE,), torch.uint8)
    assert scratch.nbytes == larger.nbytes  # those that were too small went first
