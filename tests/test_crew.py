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
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lib_locon
from extensions_builtin_shim.tiny_sd import TinySD
from lib_locon.errors import PatchError
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import SafetensorsFile
from lib_locon.models.targets import View
from lib_locon.patching import crew as crews
from lib_locon.patching.crew import WORTHWHILE, Crew, crew_for
from lib_locon.patching.engine import Engine
from lib_locon.patching.memory import LARGE, Scratch
from lib_locon.patching.plan import Patch, Plan, make_plan
from lib_locon.patching.rounding import Rounding
from lib_locon.patching.store import BaseStore
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


# ---- the workers


@pytest.mark.parametrize("threads", [2, 3, 8])
def test_each_item_is_done_once_and_the_threads_are_shared_out(threads: int) -> None:
    torch.set_num_threads(threads)
    seen: dict[str, set[int]] = {}
    done: list[int] = []
    both = threading.Barrier(2, timeout=30)

    def begin() -> Callable[[int], object]:
        both.wait()  # so that neither does it all

        def do(item: int) -> None:
            seen.setdefault(threading.current_thread().name, set()).add(torch.get_num_threads())
            done.append(item)
            time.sleep(0.001)

        return do

    crew = Crew(threads)
    crew.run(range(40), begin)
    assert sorted(done) == list(range(40))
    assert len(seen) == 2
    assert sorted(counts.pop() for counts in seen.values()) == sorted([threads // 2, threads - threads // 2])
    assert torch.get_num_threads() == threads


def test_threads_of_others_keep_their_number() -> None:
    """torch asks the process's number at a thread's first question, and takes what any thread says for that."""
    torch.set_num_threads(4)
    counts: list[int] = []
    asked, made = threading.Event(), threading.Event()

    def before() -> None:
        counts.append(torch.get_num_threads())
        asked.set()
        made.wait(30)
        counts.append(torch.get_num_threads())

    early = threading.Thread(target=before)
    early.start()
    assert asked.wait(30)
    Crew(4).run([1], lambda: lambda _: None)
    made.set()
    late = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
    late.start()
    early.join(30)
    late.join(30)
    assert counts == [4, 4, 4]
    assert torch.get_num_threads() == 4


def test_what_an_item_raises_is_raised_when_nobody_works_any_more() -> None:
    torch.set_num_threads(2)
    crew = Crew(2)
    done: list[int] = []
    both = threading.Barrier(2, timeout=30)

    def do(item: int) -> None:
        if item < 2:
            both.wait()
        if item == 0:
            raise ValueError("item 0")
        time.sleep(0.05)
        done.append(item)

    with pytest.raises(ValueError, match="item 0"):
        crew.run(range(100), lambda: do)
    assert done == [1]
    time.sleep(0.1)
    assert done == [1]
    crew.run([7], lambda: do)  # it goes on with other work
    assert done == [1, 7]


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_waits_for_what_is_being_done() -> None:
    """Also a second one, that comes while the first one waits."""
    torch.set_num_threads(2)
    crew = Crew(2)
    begun: list[int] = []
    done: list[int] = []
    both = threading.Barrier(2, timeout=30)

    def do(item: int) -> None:
        begun.append(item)
        both.wait()
        if item == 0:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        done.append(item)

    with pytest.raises(KeyboardInterrupt):
        crew.run(range(100), lambda: do)
    assert sorted(done) == sorted(begun) == [0, 1]


def test_who_makes_a_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    assert crew_for(10 * WORTHWHILE) is None  # with one thread
    torch.set_num_threads(2)
    assert crew_for(WORTHWHILE - 1) is None
    crew = crew_for(WORTHWHILE)
    assert crew is not None
    assert crew_for(10 * WORTHWHILE) is crew
    torch.set_num_threads(3)
    assert crew_for(WORTHWHILE) not in (None, crew)
    monkeypatch.setattr(crews, "_counts_by_thread", lambda: False)
    assert crew_for(WORTHWHILE) is None


def test_without_more_threads_the_caller_works_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    torch.set_num_threads(2)
    crews._crew.cache_clear()
    monkeypatch.setattr("lib_locon.patching.crew.ThreadPoolExecutor", refused)
    assert crew_for(WORTHWHILE) is None


FORK = """
import os, sys, torch
from torch import nn
from lib_locon.patching.crew import WORTHWHILE, crew_for
torch.set_num_threads(2)
done = []
crew_for(WORTHWHILE).run(range(4), lambda: done.append)
child = os.fork()
if not child:
    crew_for(WORTHWHILE).run(range(4, 8), lambda: done.append)
    os._exit(0 if sorted(done) == list(range(8)) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only here do processes fork with threads")
def test_a_forked_process_has_workers_of_its_own() -> None:
    ended = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK], timeout=120, check=False, capture_output=True)
    assert ended.returncode == 0, ended.stderr.decode()


# ---- the engine with them


@pytest.mark.usefixtures("crew")
def test_two_workers_write_at_a_time_each_with_one_thread(zoo: Zoo) -> None:
    who: dict[str, set[int]] = {}
    both = threading.Barrier(2, timeout=30)

    def note() -> None:
        name = threading.current_thread().name
        if name not in who:
            both.wait()
        who.setdefault(name, set()).add(torch.get_num_threads())

    model = zoo()
    Engine(model).apply(plan_of(model, lambda _: Told(1.0, note)))
    assert list(who.values()) == [{1}, {1}]
    assert threading.current_thread().name not in who


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
    assert bits(model) == base
    time.sleep(0.15)
    assert bits(model) == base
    assert not engine.active
    engine.apply(constant(model, 3.0))
    engine.restore()
    assert bits(model) == base


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
    assert bits(model) == base
    time.sleep(0.1)
    assert bits(model) == base
    assert not engine.active


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
    engine = Engine(model)
    file = SafetensorsFile(path)
    engine.store = BaseStore("checkpoint", CheckpointSource(file, {name: name for name in file.entries}))
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
