"""Where pristine weights are kept: every policy gives the same bits back, whatever becomes of the checkpoint file."""

from __future__ import annotations

import gc
import itertools
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from lib_locon.errors import FileError, PatchError
from lib_locon.files import pristine
from lib_locon.files.pristine import CheckpointSource
from lib_locon.files.reader import SafetensorsFile
from lib_locon.models.checkpoint_keys import checkpoint_keys
from lib_locon.patching.bits import same_bits
from lib_locon.patching.engine import Engine
from lib_locon.patching.memory import LARGE, SMALL, Scratch, allocate
from lib_locon.patching.plan import Plan, make_plan
from lib_locon.patching.readback import BaseLost
from lib_locon.patching.store import POLICIES, BaseStore, Policy
from tests.test_engine import grid
from tests.test_faults import FaultAt, operations

if TYPE_CHECKING:
    from tests.conftest import MakePatch, Zoo

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
HOLDS = pytest.mark.parametrize("hold", [True, False], ids=["handle held", "opened per read"])
HOUR = 3_600_000_000_000


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bits(parameter) for name, parameter in model.named_parameters()}


def checkpoint(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Written an hour ago, as checkpoints are."""
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
    back = path.stat().st_mtime_ns - HOUR
    os.utime(path, ns=(back, back))
    return path


def source_of(path: Path, *, hold: bool = True) -> CheckpointSource:
    file = SafetensorsFile(path)
    return CheckpointSource(file, checkpoint_keys(file.entries, file.entries), hold=hold)


def store_of(path: Path, policy: Policy = "auto", *, hold: bool = True) -> BaseStore:
    return BaseStore(policy, source_of(path, hold=hold))


def ways(store: BaseStore) -> dict[str, int]:
    return dict(store.report().weights)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def plan(patch: MakePatch) -> Callable[..., Plan]:
    """plan(model, seed): a random ΔW on each weight."""

    def make(model: nn.Module, seed: int) -> Plan:
        generator = torch.Generator().manual_seed(seed)
        return make_plan(
            patch(path, torch.randn(weight.shape, generator=generator), source=str(seed))
            for path, weight in model.named_parameters()
        )

    return make


# ---- each policy


@pytest.mark.parametrize("known", [True, False], ids=["with a file", "without"])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_patches_and_gives_back_the_same_bits(
    zoo: Zoo, plan: Callable[..., Plan], tmp_path: Path, policy: Policy, known: bool
) -> None:
    model, reference = zoo(), zoo()
    base = weights(model)
    source = source_of(checkpoint(tmp_path / "model.safetensors", model.state_dict())) if known else None
    engine, plain = Engine(model), Engine(reference)
    engine.store = store = BaseStore(policy, source)
    for seed in (1, 2):
        engine.apply(plan(model, seed))
        plain.apply(plan(reference, seed))
        assert weights(model) == weights(reference) != base
        read_back = known and policy in ("auto", "checkpoint")
        assert ways(store) == {"checkpoint" if read_back else "ram": len(base)}
    engine.restore()
    assert weights(model) == base
    assert (ways(store), store.nbytes) == ({}, 0)


@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_saved_first_stays(policy: Policy, tmp_path: Path) -> None:
    weight = randn(6, 5)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": weight}), policy)
    first = bits(weight)
    assert bits(store.save("w", weight)) == first
    weight.fill_(7)
    assert bits(store.save("w", weight)) == first
    store.drop("w")
    assert bits(store.save("w", weight)) == bits(weight)
    assert ways(store) == {"ram": 1}
    store.keep([])
    assert (ways(store), store.nbytes) == ({}, 0)


def test_bytes_count_copies_and_not_what_is_in_the_file(tmp_path: Path) -> None:
    tensors = {"same": randn(100, 100), "edited": randn(10, 10), "large": randn(1024, 1024)}
    store = store_of(checkpoint(tmp_path / "a.safetensors", tensors))
    store.save("same", tensors["same"])
    assert store.nbytes == 0
    store.save("edited", tensors["edited"] + 1)
    assert store.nbytes == 400
    store.save("large", tensors["large"])
    assert store.nbytes == 400 + (4 << 20)  # one buffer for reading back
    report = store.report()
    assert report.nbytes == {"checkpoint": 40_000 + (4 << 20), "ram": 400}
    for part in ("2 weights (4 MiB) read back", "1 weights (0 MiB) copied to RAM", "1 not read back: the model's"):
        assert part in str(report)
    store.keep(["edited"])
    assert store.nbytes == 400
    store.drop("edited")
    assert str(store.report()) == "base (auto): nothing is kept"
    assert "nothing is kept" in str(BaseStore().report())


def test_a_policy_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="auto, checkpoint, ram, device"):
        BaseStore("disk")  # type: ignore[arg-type]


# ---- the proof, bit for bit


@pytest.mark.parametrize("model_dtype", FLOATS, ids=str)
@pytest.mark.parametrize("file_dtype", FLOATS, ids=str)
def test_every_pair_of_dtypes(file_dtype: torch.dtype, model_dtype: torch.dtype, tmp_path: Path) -> None:
    stored = (randn(70, 30) * 3).to(file_dtype)
    weight = stored.to(model_dtype)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    for _ in range(2):
        base = store.save("w", weight)
        assert (base.dtype, bits(base)) == (model_dtype, bits(weight))
    assert ways(store) == {"checkpoint": 1}
    store.drop("w")
    changed = weight.clone()
    changed.view(torch.uint8)[-1, -1] ^= 1  # the lowest bit of one number, or its sign's byte
    assert bits(store.save("w", changed)) == bits(changed)
    assert ways(store) == {"ram": 1}


def test_a_cast_in_many_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pristine, "TILE", 37)
    stored = randn(41, 29).half()
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    assert bits(store.save("w", stored.float())) == bits(stored.float())
    assert ways(store) == {"checkpoint": 1}


def strange_numbers(dtype: torch.dtype) -> Tensor:
    """NaN with payloads, both zeros, infinities, the smallest number."""
    tensor = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), torch.finfo(dtype).tiny, 1, 2, 3], dtype=dtype)
    integers = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    nan = torch.tensor(float("nan"), dtype=dtype).view(integers)
    return torch.cat([tensor, torch.stack([nan, nan + 3, ~nan + 1]).view(dtype)])


@pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
def test_nan_payloads_and_negative_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = strange_numbers(dtype)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": weight, "zero": torch.zeros(4, dtype=dtype)}))
    for _ in range(2):
        assert bits(store.save("w", weight)) == bits(weight)
    assert ways(store) == {"checkpoint": 1}
    negative = -torch.zeros(4, dtype=dtype)
    assert bits(store.save("zero", negative)) == bits(negative)
    assert ways(store) == {"checkpoint": 1, "ram": 1}


def test_a_nan_that_would_have_to_be_cast_is_kept_in_ram(tmp_path: Path) -> None:
    stored = torch.ones(1000)
    stored[999] = float("nan")
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    assert bits(store.save("w", stored.half())) == bits(stored.half())
    assert ways(store) == {"ram": 1}
    assert "NaN" in str(store.report())


@pytest.mark.parametrize(
    "form", [lambda w: w.to(memory_format=torch.channels_last), lambda w: torch.cat([w, w])[8:], lambda w: w.clone()]
)
def test_weights_of_any_layout(form: Callable[[Tensor], Tensor], tmp_path: Path) -> None:
    stored = randn(8, 4, 3, 3)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    base = store.save("w", form(stored))
    assert base.is_contiguous()
    assert bits(base) == bits(stored)
    assert ways(store) == {"checkpoint": 1}


@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (3, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_and_empty_weights(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    stored = torch.full(shape, 2.5)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    assert bits(store.save("w", stored.to(dtype))) == bits(stored.to(dtype))
    assert ways(store) == {"checkpoint": 1}


def test_what_the_file_does_not_have_is_kept_in_ram(tmp_path: Path) -> None:
    stored = {"w": randn(4, 6), "turned": randn(6, 4)}
    store = store_of(checkpoint(tmp_path / "a.safetensors", stored))
    model = {"w": randn(4, 6, seed=1), "turned": randn(4, 6), "missing": randn(3)}
    for path, weight in model.items():
        assert bits(store.save(path, weight)) == bits(weight)
    assert ways(store) == {"ram": 3}
    assert sorted(store.report().reasons) == [
        "the checkpoint file has no such weight",
        "the checkpoint file has the weight in another shape",
        "the model's weight is not the checkpoint's",
    ]


def test_a_model_whose_dtype_changes_keeps_the_base_that_it_had(tmp_path: Path) -> None:
    stored = randn(50, 50)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": stored}))
    store.save("w", stored.half())
    assert bits(store.save("w", stored.half().float())) == bits(stored.half()), "the file's fp32 was never the base"


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(FLOATS[:4], 2)), ids=str)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("anew", [False, True], ids=["the same parameters", "new parameters"])
def test_a_model_moved_to_another_dtype_between_two_sets(
    zoo: Zoo, patch: MakePatch, tmp_path: Path, policy: Policy, first: torch.dtype, second: torch.dtype, anew: bool
) -> None:
    """The base of a weight is what it held when it was first changed; nothing of the set before the move is left."""
    model, untouched = zoo(first), zoo(first)
    base = {name: weight.detach().clone() for name, weight in untouched.named_parameters()}
    untouched.to(second)
    engine = Engine(model)
    engine.store = store = store_of(checkpoint(tmp_path / "model.safetensors", zoo().state_dict()), policy)
    one, two = grid((8, 12), 1), grid((8, 4, 3, 3), 2)
    early = make_plan([patch("linear.weight", one)])
    engine.apply(early)
    read_back = policy in ("auto", "checkpoint")
    assert ways(store) == {"checkpoint" if read_back else "ram": 1}
    torch.__future__.set_overwrite_module_params_on_conversion(anew)
    try:
        model.to(second)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert engine.apply(early) == 0
    engine.apply(make_plan([patch("linear.weight", one, strength=0.5), patch("conv2d.weight", two)]))
    expected = {"linear.weight": base["linear.weight"].double() + 0.5 * one}
    expected["conv2d.weight"] = untouched.get_parameter("conv2d.weight").detach().double() + two
    for name, total in expected.items():
        assert bits(model.get_parameter(name)) == bits(total.to(second)), name
    engine.restore()
    assert weights(model) == weights(untouched)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_the_file_has_the_base_is_the_weight(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    shape = tuple(data.draw(st.lists(st.integers(0, 5), max_size=3)))
    dtypes = st.sampled_from(FLOATS)
    raw = torch.randint(
        0, 256, (*shape, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    )
    file_dtype, model_dtype = data.draw(dtypes), data.draw(dtypes)
    stored = (
        raw.view(torch.float64)[..., 0].to(file_dtype) if data.draw(st.booleans()) else randn(*shape).to(file_dtype)
    )
    weight = stored.to(model_dtype)
    if data.draw(st.booleans()) and weight.numel():
        weight = weight.contiguous()
        weight.view(-1)[:1].view(torch.uint8)[0] ^= 1 << data.draw(st.integers(0, 7))
    pristine_bits = bits(weight)
    store = store_of(checkpoint(tmp_path_factory.mktemp("any") / "a.safetensors", {"w": stored}))
    assert bits(store.save("w", weight)) == pristine_bits
    weight.copy_(torch.ones(shape))
    assert bits(store.save("w", weight)) == pristine_bits


# ---- what users do with the file


def overwrite(path: Path) -> None:
    """As `cp` does over a file that is there: the same inode, and here also the same size."""
    tensors = {key: torch.ones_like(randn(*entry.shape)) for key, entry in SafetensorsFile(path).entries.items()}
    other = checkpoint(path.with_name("other.safetensors"), tensors)
    assert other.stat().st_size == path.stat().st_size
    with path.open("r+b") as file:
        file.write(other.read_bytes())


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def delete(path: Path) -> None:
    path.unlink()


def replace(path: Path) -> None:
    checkpoint(path.with_name("new.safetensors"), {"w": torch.ones(6, 7)}).replace(path)


def replace_by_equal(path: Path) -> None:
    other = path.with_name("copy.safetensors")
    other.write_bytes(path.read_bytes())
    os.utime(other, ns=(path.stat().st_mtime_ns,) * 2)
    other.replace(path)


def touch(path: Path) -> None:
    path.touch()


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


IN_PLACE = (overwrite, truncate, empty, touch)
ASIDE = (delete, replace, replace_by_equal, make_folder)
EVENTS = pytest.mark.parametrize("event", [*IN_PLACE, *ASIDE], ids=lambda event: event.__name__)


@HOLDS
@EVENTS
def test_a_file_that_changes_before_the_first_change_of_a_weight(
    event: Callable[[Path], None], hold: bool, tmp_path: Path
) -> None:
    weight = randn(6, 7)
    path = checkpoint(tmp_path / "a.safetensors", {"w": weight})
    store = store_of(path, hold=hold)
    event(path)
    for _ in range(2):
        assert bits(store.save("w", weight)) == bits(weight)
    assert ways(store) == {"ram": 1}


@HOLDS
@EVENTS
def test_a_file_that_changes_while_a_weight_is_patched(
    event: Callable[[Path], None], hold: bool, tmp_path: Path
) -> None:
    stored = {"w": randn(6, 7), "later": randn(6, 7, seed=1)}
    path = checkpoint(tmp_path / "a.safetensors", stored)
    store = store_of(path, hold=hold)
    store.save("w", stored["w"])
    event(path)
    patched = stored["w"] + 1
    if hold and event in ASIDE:
        assert bits(store.save("w", patched)) == bits(stored["w"]), "what was opened is still there"
    else:
        for _ in range(2):
            with pytest.raises(BaseLost, match="load the checkpoint again") as caught:
                store.save("w", patched)
        assert isinstance(caught.value, PatchError)
    assert store.report().file_changed
    assert "not there any more as it was" in str(store.report())
    assert bits(store.save("later", stored["later"])) == bits(stored["later"])
    assert ways(store) == {"checkpoint": 1, "ram": 1}


@HOLDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("event", IN_PLACE, ids=lambda event: event.__name__)
def test_a_file_that_changes_during_a_read(
    event: Callable[[Path], None], hold: bool, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of the points where the reading can be caught: before and after each piece of the file."""
    monkeypatch.setattr(pristine, "TILE", 16)
    stored, fill = randn(6, 7), pristine.fill
    for first in (True, False):
        for moment in range(2 if dtype == torch.float32 else 6):
            path = checkpoint(tmp_path / "a.safetensors", {"w": stored})
            store = store_of(path, hold=hold)
            weight = stored.to(dtype)
            if not first:
                store.save("w", weight)
            calls = [0]

            def filling(*args: Any, moment: int = moment, path: Path = path, calls: list[int] = calls) -> None:
                for before in (True, False):
                    now, calls[0] = calls[0], calls[0] + 1
                    if now == moment:
                        event(path)
                    if before:
                        fill(*args)

            with monkeypatch.context() as caught:
                caught.setattr(pristine, "fill", filling)
                if first:
                    assert bits(store.save("w", weight)) == bits(weight)
                    assert ways(store) == {"ram": 1}
                else:
                    with pytest.raises(BaseLost):
                        store.save("w", weight + 1)
            assert calls[0] > moment


def test_a_file_that_was_moved_away_and_back(tmp_path: Path) -> None:
    weight = randn(6, 7)
    path = checkpoint(tmp_path / "a.safetensors", {"w": weight})
    store = store_of(path, hold=False)
    store.save("w", weight)
    path.rename(tmp_path / "b")
    with pytest.raises(BaseLost, match="No such file"):
        store.save("w", weight)
    (tmp_path / "b").rename(path)
    assert bits(store.save("w", weight)) == bits(weight)


def test_after_a_loss_another_checkpoint_is_the_base(tmp_path: Path) -> None:
    old, new = randn(6, 7), randn(6, 7, seed=1)
    path = checkpoint(tmp_path / "a.safetensors", {"w": old})
    store = store_of(path)
    store.save("w", old)
    truncate(path)
    store.source = source_of(checkpoint(tmp_path / "b.safetensors", {"w": new}))
    with pytest.raises(BaseLost):
        store.save("w", old + 1)  # still patched: the host has not loaded it yet
    for _ in range(2):
        assert bits(store.save("w", new)) == bits(new)
    assert ways(store) == {"checkpoint": 1}


def test_weights_held_under_one_checkpoint_keep_it_when_another_is_set(tmp_path: Path) -> None:
    old, new = randn(6, 7), randn(6, 7, seed=1)
    store = store_of(checkpoint(tmp_path / "a.safetensors", {"w": old}))
    store.save("w", old)
    store.source = source_of(checkpoint(tmp_path / "b.safetensors", {"w": new}))
    assert bits(store.save("w", new)) == bits(old)


def test_a_file_too_new_to_be_relied_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(6, 7)
    path = checkpoint(tmp_path / "a.safetensors", {"w": weight})
    path.touch()
    store = store_of(path)
    store.save("w", weight)
    assert ways(store) == {"ram": 1}
    store.drop("w")
    written = path.stat().st_mtime_ns
    monkeypatch.setattr(pristine.time, "time_ns", lambda: written + HOUR)
    store.save("w", weight)
    assert ways(store) == {"checkpoint": 1}
    monkeypatch.setattr(pristine.time, "time_ns", lambda: written)  # a clock that is set back takes no base away
    assert bits(store.save("w", weight + 1)) == bits(weight)
    assert not store.report().file_changed


def test_a_file_that_changed_after_its_header_was_read(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", {"w": randn(6, 7)})
    file = SafetensorsFile(path)
    path.touch()
    with pytest.raises(FileError, match="changed since its header was read"):
        CheckpointSource(file, {"w": "w"})
    path.unlink()
    with pytest.raises(FileError, match="No such file"):
        CheckpointSource(file, {"w": "w"})


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells which files are open")
@HOLDS
def test_the_handle_is_closed_with_the_source(hold: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a.safetensors", {"w": randn(6, 7)})

    def handles() -> int:
        return sum(1 for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and fd.readlink() == path)

    store = store_of(path, hold=hold)
    store.save("w", randn(6, 7))
    assert handles() == hold
    store.source = None
    assert handles() == hold, "a weight still relies on it"
    store.drop("w")
    gc.collect()
    assert handles() == 0


# ---- through the engine


@pytest.fixture
def loaded(zoo: Zoo, tmp_path: Path) -> tuple[nn.Module, Engine, Path]:
    """A model with its engine and its checkpoint."""
    model = zoo()
    path = checkpoint(tmp_path / "model.safetensors", model.state_dict())
    engine = Engine(model)
    engine.store = store_of(path)
    return model, engine, path


def test_a_lost_base_writes_nothing_wrong(
    loaded: tuple[nn.Module, Engine, Path], plan: Callable[..., Plan], patch: MakePatch
) -> None:
    model, engine, path = loaded
    engine.apply(make_plan([patch("linear.weight", randn(8, 12))]))
    before = weights(model)
    overwrite(path)
    for attempt in (lambda: engine.apply(plan(model, 2)), lambda: engine.apply({}), engine.restore):
        with pytest.raises(PatchError, match="load the checkpoint again"):
            attempt()
        assert weights(model) == before
        assert engine.active


def test_a_checkpoint_loaded_after_a_loss_sets_all_right(
    loaded: tuple[nn.Module, Engine, Path], plan: Callable[..., Plan], zoo: Zoo, tmp_path: Path
) -> None:
    model, engine, path = loaded
    engine.apply(plan(model, 1))
    truncate(path)
    new = zoo(seed=1)
    model.load_state_dict(new.state_dict())
    engine.store.source = source_of(checkpoint(tmp_path / "new.safetensors", new.state_dict()))
    engine.apply(plan(model, 2))
    Engine(reference := zoo(seed=1)).apply(plan(reference, 2))
    assert weights(model) == weights(reference)
    engine.restore()
    assert weights(model) == weights(new)
    assert not engine.active


def test_a_lost_base_keeps_no_other_weight_from_getting_its_own(
    loaded: tuple[nn.Module, Engine, Path], plan: Callable[..., Plan]
) -> None:
    model, engine, path = loaded
    base, wanted = weights(model), plan(model, 1)
    first = dict(list(wanted.items())[:2])
    engine.apply(first)
    truncate(path)
    engine.apply(wanted)  # the first two hold what they should; the others are copied to RAM
    patched = weights(model)
    with pytest.raises(PatchError, match="load the checkpoint again"):
        engine.restore()
    assert weights(model) == {**base, **{name: patched[name] for name in first}}


@pytest.mark.parametrize("error", [torch.cuda.OutOfMemoryError, KeyboardInterrupt], ids=lambda error: error.__name__)
def test_a_fault_at_any_operation_leaves_the_base(
    loaded: tuple[nn.Module, Engine, Path], zoo: Zoo, plan: Callable[..., Plan], error: type[BaseException]
) -> None:
    model, engine, path = loaded
    base = weights(model)
    old, new = (dict(list(plan(model, seed).items())[seed : seed + 3]) for seed in (1, 2))
    other_model = zoo()
    other = Engine(other_model)
    other.store = store_of(path)
    other.apply(old)
    for number in range(operations(lambda: other.apply(new))):
        engine.apply(old)
        with FaultAt((number,), error, after=True), pytest.raises((PatchError, error)):
            engine.apply(new)
        assert weights(model) == base, number
        assert (engine.active, engine.store.nbytes) == (False, 0)


# ---- memory


def test_the_buffer_is_lent_again_only_when_nothing_stands_on_it() -> None:
    scratch, shape = Scratch(), (LARGE // 4 + 1,)
    first = scratch.lend(shape, torch.float32)
    address, part = first.data_ptr(), first[5:].view(-1, 2)[:, 0]
    first.fill_(1)
    del first
    second = scratch.lend(shape, torch.float32).fill_(2)
    assert second.data_ptr() != address
    assert bool((part == 1).all())
    address = second.data_ptr()
    del second
    third = scratch.lend((LARGE,), torch.uint8)
    assert third.data_ptr() == address
    scratch.free()
    third.fill_(3)
    assert bool((part == 1).all())
    assert scratch.nbytes == 0


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_memory_of_its_own(dtype: torch.dtype) -> None:
    for shape in ((3, 1 << 20), (), (0,), (7,), (3, 1 << 15)):
        tensor = allocate(shape, dtype)
        assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
        tensor.copy_(torch.ones(shape))


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="only Linux has large pages to ask for")
@pytest.mark.parametrize("size", [SMALL, LARGE - 1, LARGE, LARGE + 1])
def test_what_stays_is_not_among_what_comes_and_goes(size: int) -> None:
    tensors = [allocate((size,), torch.uint8) for _ in range(4)]
    assert {tensor.data_ptr() % mmap.PAGESIZE for tensor in tensors} == {0}  # malloc's have its own note before them


def test_bits_are_compared_not_numbers() -> None:
    nan = torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone())
    assert not same_bits(torch.zeros(1), -torch.zeros(1))
    assert not same_bits(torch.zeros(1), torch.zeros(1, dtype=torch.int32))
    assert not same_bits(torch.zeros(1), torch.zeros(1, 1))


MEASURE = """
import json, os, sys, torch
from pathlib import Path
from torch import nn
from safetensors.torch import save_file
import lib_locon
from benchmarks.memory import anonymous, settle, watch

folder, policy = Path(sys.argv[1]), sys.argv[2]
WIDTH, LAYERS = 1024, 96  # 384 MiB in fp32
model = nn.Module()
model.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
path = folder / "model.safetensors"
save_file(model.state_dict(), path)
os.utime(path, ns=(0, 0))

def adapter(name, layers):
    factors = {}
    for i in range(layers):
        factors[f"lora_unet_layers_{i}.lora_up.weight"] = torch.randn(WIDTH, 8).half()
        factors[f"lora_unet_layers_{i}.lora_down.weight"] = torch.randn(8, WIDTH).half()
    save_file(factors, folder / name)
    return folder / name

every, some = adapter("every.safetensors", LAYERS), adapter("some.safetensors", 2)
session = lib_locon.Session(model)
session.read_bases_from(path)
store = session.engine.store
store.policy = policy
use = lambda path, strength: lib_locon.Use(lib_locon.load(path), lib_locon.Strengths.both(strength))
session.apply([use(some, 1.0)])  # torch and its libraries set up what they need once
session.restore()
settle()
with watch() as peak:
    session.apply([use(every, 1.0)])
touched = LAYERS * WIDTH * WIDTH * 4
ways = dict(store.report().weights)
sets = [[use(some, 1.0)], [use(some, 0.5), use(every, 1.0)], [use(every, 1.0)]]
levels = []
for number in range(200):
    session.apply(sets[number % 3] if number % 40 == 0 else [use(some, number / 7 + 1)])
    settle()  # a tile's buffer more or less in the allocator's hands is no growth
    levels.append(anonymous())
session.restore()
settle()
print(json.dumps({"share": peak.over_rest / touched, "ways": ways, "levels": levels, "touched": touched}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells RssAnon")
@pytest.mark.parametrize(("policy", "bar"), [("ram", 1.1), ("checkpoint", 0.1)])
def test_anonymous_memory(policy: str, bar: float, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", MEASURE, str(tmp_path), policy]
    # blocks of the system's own, given back when they are freed: what the store takes is counted here, not the holes in
    # glibc's heap, which come together where layers are all alike; benchmarks.memory_bars measures a true model
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ways"] == {policy: 96}
    assert (0.95 if policy == "ram" else 0) < found["share"] <= bar
    settled = [level for number, level in enumerate(found["levels"]) if number >= 45 and number % 40 >= 5]
    assert max(settled) - min(settled) < 0.05 * found["touched"], "200 switches leave it flat"


# ---- names


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "model.diffusion_model.input_blocks.0.0.weight"),
        ("model.diffusion_model._orig_mod.out.2.bias", "model.diffusion_model.out.2.bias"),
        (
            "cond_stage_model.wrapped.transformer.text_model.embeddings.token_embedding.wrapped.weight",
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
        ),
        (
            "cond_stage_model.wrapped.transformer.text_model.encoder.layers.0.mlp.fc1.weight",
            "cond_stage_model.transformer.encoder.layers.0.mlp.fc1.weight",
        ),
        (
            "cond_stage_model.wrapped.model.transformer.resblocks.0.ln_1.weight",
            "conditioner.embedders.0.model.transformer.resblocks.0.ln_1.weight",
        ),
        (
            "conditioner.embedders.0.wrapped.transformer.text_model.final_layer_norm.bias",
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
        ),
        (
            "conditioner.embedders.1.wrapped.model.token_embedding.wrapped.weight",
            "conditioner.embedders.1.model.token_embedding.weight",
        ),
        ("diffusion_model.out.2.weight", "model.diffusion_model.out.2.weight"),
        ("linear.weight", "linear.weight"),
    ],
)
def test_a_parameter_s_key(path: str, key: str) -> None:
    assert checkpoint_keys([path, "not.there"], {key: None, "other": None}) == {path: key}


def test_the_name_as_it_is_comes_before_other_spellings() -> None:
    for path, other in (("diffusion_model.a", "model.diffusion_model.a"), ("a.wrapped.b", "a.b")):
        assert checkpoint_keys([path], {path, other}) == {path: path}


# ---- copies that nobody uses now


@pytest.mark.parametrize("policy", ["ram", "device"])
def test_an_unused_copy_serves_the_next_adapter(zoo: Zoo, plan: Callable[..., Plan], policy: Policy) -> None:
    model = zoo()
    base = weights(model)
    engine = Engine(model)
    engine.store = store = BaseStore(policy)
    engine.apply(plan(model, 1))
    places = {path: store.save(path, weight).data_ptr() for path, weight in model.named_parameters()}
    engine.apply({})
    assert (engine.active, ways(store)) == (False, {})
    assert store.nbytes == sum(weight.nbytes for weight in model.parameters())
    engine.apply(plan(model, 2))
    assert {path: store.save(path, weight).data_ptr() for path, weight in model.named_parameters()} == places
    engine.restore()
    assert (weights(model), store.nbytes) == (base, 0)


def test_an_unused_copy_is_given_back_where_that_is_asked_for(zoo: Zoo, plan: Callable[..., Plan]) -> None:
    model = zoo()
    engine = Engine(model)
    for early in (True, False):
        engine.store.free_unused = early
        engine.apply(plan(model, 1))
        assert engine.base_bytes > 0
        engine.apply({})
        assert (engine.base_bytes > 0) is not early
        assert ("wait for the next adapter" in str(engine.store.report())) is not early
    engine.store.free_unused = True  # what is kept already, too
    assert engine.base_bytes == 0


def test_an_unused_copy_is_never_taken_for_a_base_that_it_is_not(zoo: Zoo, plan: Callable[..., Plan]) -> None:
    model = zoo()
    engine = Engine(model)
    engine.apply(plan(model, 1))
    engine.apply({})
    for weight in model.parameters():
        weight.data[..., :1] += 1  # through `.data`: torch does not count this write
    base = weights(model)
    engine.apply(plan(model, 2))
    assert weights(model) != base
    engine.apply({})
    assert weights(model) == base


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (8,), (3, 5, 3, 3), (4, 4, 3, 3)])
@pytest.mark.parametrize("offset", [0, 1, 4])
def test_every_bit_is_compared(dtype: torch.dtype, shape: tuple[int, ...], offset: int) -> None:
    # eight bytes at a time where the memory allows: the last number must not be left out, nor the sign of a zero
    size = torch.Size(shape).numel()
    one = torch.zeros(offset + size, dtype=dtype)[offset:].view(shape)
    assert same_bits(one, torch.zeros(shape, dtype=dtype))
    other = torch.zeros(shape, dtype=dtype)
    other.view(-1)[-1] = -0.0
    assert not same_bits(one, other)
    assert not same_bits(other, one)
    if len(shape) == 4:
        assert not same_bits(one, other.contiguous(memory_format=torch.channels_last))
        assert same_bits(other.contiguous(memory_format=torch.channels_last), other)
